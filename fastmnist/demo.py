"""A page on this machine where one draws a digit and sees what a run's model makes of it."""

from __future__ import annotations

import atexit
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import nn

from fastmnist.data.normalise import Normaliser
from fastmnist.data.picture import mnist_like
from fastmnist.errors import ConfigError, FastmnistError
from fastmnist.runfolder import RUNS
from fastmnist.training.checkpoint import WEIGHTS, ModelCard, load_weights

HOST = "127.0.0.1"  # never a name or address that others on the network reach
NAMES = (HOST, "localhost")
TEMPLATE = "demo.html.jinja"
MOST_BYTES = 2_000_000  # of a drawing: a PNG of the page's canvas has some thousand
POLICY = "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class Seen:
    """probabilities: (classes,) float32. image: (H, W) uint8, what the model was given."""

    probabilities: np.ndarray
    image: np.ndarray


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
        self._lock = threading.Lock()  # requests come in threads of their own

    @torch.inference_mode()
    def read(self, drawing: bytes) -> Seen:
        """A picture in any format that Pillow reads, light on dark or dark on light.

        Raises:
            FastmnistError: it is no picture, or nothing is on it.
        """
        try:
            with Image.open(io.BytesIO(drawing)) as picture:
                image = mnist_like(picture, self.size)
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise FastmnistError(f"the drawing cannot be read: {error}") from error
        batch = torch.from_numpy(image).view(1, 1, self.size, self.size)
        with self._lock:
            probabilities = self.model(self._normalise(batch)).softmax(1)[0].numpy()
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
        any_name: answer also what is asked for under another name than this machine's, as a proxy may do.

    Raises:
        FastmnistError: as `Reader`; the port is taken.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port}: must be 0 to 65535")
    reader = Reader(run)
    handler = type("Handler", (_Handler,), {"reader": reader, "content": page(reader.card), "any_name": any_name})
    try:
        server = ThreadingHTTPServer((HOST, port), handler)
    except OSError as error:
        raise FastmnistError(f"--port {port} cannot be had: {error.strerror}; leave it out for a free one") from error
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="fastmnist-demo", daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


class _Handler(BaseHTTPRequestHandler):
    """GET / is the page; POST /predict takes a drawing and answers with probabilities and the model's own view."""

    reader: Reader
    content: bytes
    any_name: bool
    timeout = 10  # seconds that a client may be silent

    def do_GET(self) -> None:
        if self._is_for_us("/"):
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", self.content)

    def do_POST(self) -> None:
        if not self._is_for_us("/predict"):
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or not 0 < int(length) <= MOST_BYTES:
            self._problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a drawing has 1 to {MOST_BYTES:,} bytes")
            return
        try:
            seen = self.reader.read(self.rfile.read(int(length)))
        except FastmnistError as error:
            self._problem(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
            return
        found = {"probabilities": seen.probabilities.tolist(), "image": seen.image.tolist()}
        self._answer(HTTPStatus.OK, "application/json", json.dumps(found).encode())

    def _is_for_us(self, path: str) -> bool:
        # A page of another site can make a browser ask here under that site's name.
        if not self.any_name and self.headers.get("Host", "").rpartition(":")[0] not in NAMES:
            self._problem(HTTPStatus.FORBIDDEN, "asked for under another name")
            return False
        if self.path != path:
            self._problem(HTTPStatus.NOT_FOUND, "there is / and /predict")
            return False
        return True

    def _problem(self, status: HTTPStatus, text: str) -> None:
        self.close_connection = True  # what was sent has not been read
        self._answer(status, "application/json", json.dumps({"error": text}).encode())

    def _answer(self, status: HTTPStatus, kind: str, content: bytes) -> None:
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
