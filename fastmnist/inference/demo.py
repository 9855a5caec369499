"""A page on this machine where one draws a digit and sees what a run's model makes of it."""

from __future__ import annotations

import atexit
import io
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastmnist.errors import ConfigError, FastmnistError
from fastmnist.inference.picture import mnist_like, open_picture
from fastmnist.loader.normalise import Normaliser
from fastmnist.training.checkpoint import WEIGHTS, ModelCard, load_weights
from fastmnist.training.run_folder import RUNS

HOST = "127.0.0.1"  # never a name or address that others on the network reach
NAMES = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?", re.IGNORECASE)  # a browser leaves out ":80"
TEMPLATE = "demo.html.jinja"
PATIENCE = 10.0  # seconds: for a request to arrive, for an answer to leave, and for a turn to be read
MOST_BYTES = 2_000_000  # of a drawing: a PNG of the page's canvas has some thousand
POLICY = "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class Seen:
    """probabilities: (classes,) float32. image: (H, W) uint8, what the model was given."""

    probabilities: np.ndarray
    image: np.ndarray


class BusyError(FastmnistError):
    """Other drawings are being read; the same request may succeed later."""


class Reader:
    """A run's model, ready to read drawings.

    Raises:
        DataError: the folder holds no weights. ConfigError: the model does not take square grey images.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.model, self.card = load_for_drawings(run)
        self.size = self.card.image_shape[0]
        self._normalise = Normaliser(self.card.mean, self.card.std)
        self._turn = threading.Lock()  # requests come in threads of their own; a large picture takes much memory

    @torch.inference_mode()
    def read(self, drawing: bytes) -> Seen:
        """A picture in any format that Pillow reads, light on dark or dark on light.

        Raises:
            FastmnistError: it is no picture, too large, damaged, or nothing is on it. BusyError: for PATIENCE
            seconds other drawings were being read.
        """
        if not self._turn.acquire(timeout=PATIENCE):
            raise BusyError("other drawings are being read; try again")
        try:
            image = mnist_like(open_picture(io.BytesIO(drawing), "the drawing"), self.size)
            batch = torch.from_numpy(image).view(1, 1, self.size, self.size)
            probabilities = self.model(self._normalise(batch)).softmax(1)[0].numpy()
        finally:
            self._turn.release()
        return Seen(probabilities, image)


def load_for_drawings(run: Path) -> tuple[nn.Module, ModelCard]:
    """As `load_weights`; raises ConfigError as well: the model does not take square grey images."""
    model, card = load_weights(run)
    height, width, channels = card.image_shape
    if channels != 1 or height != width:
        raise ConfigError(f"{run}: demo takes models of square grey images, this one has {card.image_shape}")
    return model, card


def page(card: ModelCard) -> bytes:
    """The page for that model: one file, which asks nobody but the server that it came from."""
    return render("demo_server.js.jinja", card)


def render(backend: str, card: ModelCard, **more: Any) -> bytes:
    """The page with a script of that name, which defines `read`: a drawing to {probabilities, image} or an Error."""
    import jinja2

    loader = jinja2.PackageLoader("fastmnist", "report")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    settings = {"dataset": card.dataset, "names": list(card.class_names), "size": card.image_shape[0]}
    return environment.get_template(TEMPLATE).render(backend=backend, **{"shared": None, **settings, **more}).encode()


def latest_run(runs: Path = RUNS) -> Path:
    """The newest run's folder with weights. Raises ConfigError when there is none yet."""
    found = sorted(runs.glob(f"*/{WEIGHTS}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigError(
            f"there is no finished run in {runs.resolve()}; make one with fastmnist train, or name its folder"
        )
    return found[-1].parent


@contextmanager
def serving(run: Path, port: int = 0, *, any_name: bool = False) -> Iterator[str]:
    """Serves the page for a run on 127.0.0.1 until the block ends; gives its address.

    Args:
        port: 0 takes a free one.
        any_name: answer also what is asked for under another name than this machine's, or from a page of another
            origin, as a proxy may do.

    Raises:
        FastmnistError: as `Reader`; the port is taken.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port}: must be 0 to 65535")
    reader = Reader(run)
    handler = type("Handler", (_Handler,), {"reader": reader, "content": page(reader.card), "any_name": any_name})
    try:
        server = _Server((HOST, port), handler)
    except OSError as error:
        raise FastmnistError(f"--port {port} cannot be had: {error.strerror}; leave it out for a free one") from error
    thread = threading.Thread(target=server.serve_forever, name="fastmnist-demo", daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that left is no error of ours
            super().handle_error(request, client_address)


class _Arriving(io.RawIOBase):
    """A connection's bytes, all of which are to arrive before PATIENCE is over, however they drip in."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._until = time.monotonic() + PATIENCE

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took too long to arrive")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    """GET / is the page; POST /predict takes a drawing and answers with probabilities and the model's own view."""

    reader: Reader
    content: bytes
    any_name: bool

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_Arriving(self.connection))

    def do_GET(self) -> None:
        if self._is_for_us("/"):
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", self.content)

    def do_POST(self) -> None:
        if not self._is_for_us("/predict"):
            return
        length = self.headers.get("Content-Length")
        if length is None:
            self._problem(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing")
        elif not re.fullmatch("[0-9]+", length) or not length.strip("0"):
            self._problem(HTTPStatus.BAD_REQUEST, f"Content-Length must be 1 to {MOST_BYTES}")
        elif len(length) > len(str(MOST_BYTES)) or int(length) > MOST_BYTES:
            self._problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a drawing has 1 to {MOST_BYTES:,} bytes")
        else:
            self._read(int(length))

    def _read(self, length: int) -> None:
        try:
            drawing = self.rfile.read(length)
        except TimeoutError as error:
            self._problem(HTTPStatus.REQUEST_TIMEOUT, str(error))
            return
        if len(drawing) < length:
            self._problem(HTTPStatus.BAD_REQUEST, f"{len(drawing)} bytes came, not {length}")
            return
        try:
            seen = self.reader.read(drawing)
        except BusyError as error:
            self._problem(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        except FastmnistError as error:
            self._problem(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        else:
            found = {"probabilities": seen.probabilities.tolist(), "image": seen.image.tolist()}
            self._answer(HTTPStatus.OK, "application/json", json.dumps(found).encode())

    def _is_for_us(self, path: str) -> bool:
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        # A page of another site can make a browser ask here, under that site's name or under ours.
        if not self.any_name and (not NAMES.fullmatch(host) or origin not in (None, f"http://{host}")):
            self._problem(HTTPStatus.FORBIDDEN, "asked for under another name, or by another site's page")
            return False
        if self.path != path:
            self._problem(HTTPStatus.NOT_FOUND, "there is / and /predict")
            return False
        return True

    def _problem(self, status: HTTPStatus, text: str) -> None:
        self.close_connection = True  # what was sent has not been read
        self._answer(status, "application/json", json.dumps({"error": text}).encode())

    def _answer(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.connection.settimeout(PATIENCE)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing: a line per stroke would bury the address."""


def show_in_notebook(run: Path, height: int = 760) -> None:
    """Shows the page in a notebook's cell, on Colab and in Jupyter on this machine; it is served until the kernel ends.

    Raises:
        FastmnistError: as `Reader`.
    """
    try:
        from google.colab import output
    except ImportError:
        output = None
    # Colab reaches the port through a proxy of its own, for the notebook's owner alone.
    served = serving(run, any_name=output is not None)
    address = served.__enter__()
    atexit.register(served.__exit__, None, None, None)
    if output is not None:
        output.serve_kernel_port_as_iframe(int(address.rstrip("/").rpartition(":")[2]), height=str(height))
        return
    from IPython.display import IFrame, display

    display(IFrame(address, "100%", height))
    print(f"or open {address} in a browser on this machine")
