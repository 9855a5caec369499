"""Demo: a local web page on which one draws a digit and sees a run's model read it."""

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
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastmnist.errors import ConfigError, FastmnistError, check_limits
from fastmnist.inference.picture import mnist_like
from fastmnist.inference.predict import PictureModel
from fastmnist.sources.pictures import open_picture
from fastmnist.training.checkpoint import WEIGHTS, ModelCard
from fastmnist.training.run_folder import RUNS

HOST = "127.0.0.1"  # never a name or address that others on the network reach
LOCAL_NAMES = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?", re.IGNORECASE)  # a browser leaves out ":80"
TIMEOUT = 10.0  # seconds: for a request to arrive, for an answer to leave, and for the model to be free
MAX_BYTES = 2_000_000  # of a drawing; a PNG of the page's canvas has some thousand
POLICY = "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Reading(NamedTuple):
    """probabilities: (classes,) float32. image: (size, size) uint8, the model's input."""

    probabilities: np.ndarray
    image: np.ndarray


class BusyError(FastmnistError):
    """Other drawings are being read; the same request may succeed later."""


class DrawingReader(PictureModel):
    """A run's model for the drawings that a server's threads receive, one at a time."""

    def __init__(self, run: Path) -> None:
        super().__init__(run, drawn=True)
        self._lock = threading.Lock()  # a large picture takes much memory

    def read(self, drawing: bytes) -> Reading:
        """Reads a picture in any format that Pillow opens, light on dark or dark on light.

        Raises:
            FastmnistError: it is no picture, too large, damaged or blank.
            BusyError: other drawings took TIMEOUT seconds.
        """
        if not self._lock.acquire(timeout=TIMEOUT):
            raise BusyError("other drawings are being read; try again")
        try:
            image = mnist_like(open_picture(io.BytesIO(drawing), "the drawing"), self.size[0])
            return Reading(self.probabilities(image)[0], image)
        finally:
            self._lock.release()


def render_page(card: ModelCard, script: str = "demo_server.js.jinja", **values: Any) -> bytes:
    """The page as one HTML file that loads nothing else.

    Args:
        script: template that defines `read`, from a drawing to {probabilities, image} or an Error.
        values: for the templates.
    """
    import jinja2

    loader = jinja2.PackageLoader("fastmnist", "inference")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    trained_on = Path(card.dataset).name  # of a folder, its name alone
    settings = {"dataset": trained_on, "names": list(card.class_names), "size": card.image_shape[0], "shared": None}
    return environment.get_template("demo.html.jinja").render(backend=script, **settings | values).encode()


def latest_run(runs: Path = RUNS) -> Path:
    """The newest run's folder that holds weights; raises ConfigError where there is none."""
    weights = sorted(runs.glob(f"*/{WEIGHTS}"), key=lambda path: path.stat().st_mtime)
    if not weights:
        raise ConfigError(
            f"there is no finished run in {runs.resolve()}; make one with fastmnist train, or name its folder"
        )
    return weights[-1].parent


@contextmanager
def serving(run: Path, port: int = 0, *, any_name: bool = False) -> Iterator[str]:
    """Serves a run's page on 127.0.0.1 until the block ends; gives its address.

    Args:
        port: 0 takes a free one.
        any_name: accept requests under any host name and from pages of any origin, for use behind a proxy.

    Raises:
        FastmnistError: as `PictureModel`; the port is taken.
    """
    check_limits("--port", port, 0, 65535)
    reader = DrawingReader(run)
    attributes = {"reader": reader, "page": render_page(reader.card), "any_name": any_name}
    try:
        server = _Server((HOST, port), type("Handler", (_Handler,), attributes))
    except OSError as error:
        raise FastmnistError(
            f"--port {port} is not available: {error.strerror}; leave it out for a free one"
        ) from error
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


class _RequestStream(io.RawIOBase):
    """A connection's bytes under one deadline for the whole request, so that a slow client cannot stay."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._deadline = time.monotonic() + TIMEOUT

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took too long to arrive")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    """GET / answers with the page, POST /predict with a drawing's probabilities and the model's view of it."""

    reader: DrawingReader
    page: bytes
    any_name: bool

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_RequestStream(self.connection))

    def do_GET(self) -> None:
        if self._accepts("/"):
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", self.page)

    def do_POST(self) -> None:
        if not self._accepts("/predict"):
            return
        length = self.headers.get("Content-Length")
        if length is None:
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing")
        elif not re.fullmatch("[0-9]+", length) or not length.strip("0"):
            self._refuse(HTTPStatus.BAD_REQUEST, f"Content-Length must be 1 to {MAX_BYTES}")
        elif len(length) > len(str(MAX_BYTES)) or int(length) > MAX_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a drawing has 1 to {MAX_BYTES:,} bytes")
        else:
            self._predict(int(length))

    def _predict(self, length: int) -> None:
        try:
            drawing = self.rfile.read(length)
        except TimeoutError as error:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, str(error))
            return
        if len(drawing) < length:
            self._refuse(HTTPStatus.BAD_REQUEST, f"{len(drawing)} bytes came, not {length}")
            return
        try:
            reading = self.reader.read(drawing)
        except BusyError as error:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        except FastmnistError as error:
            self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        else:
            content = {name: values.tolist() for name, values in reading._asdict().items()}
            self._answer(HTTPStatus.OK, "application/json", json.dumps(content).encode())

    def _accepts(self, path: str) -> bool:
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        # Another site's page can make a browser send requests here, under that site's name or under ours.
        if not self.any_name and (not LOCAL_NAMES.fullmatch(host) or origin not in (None, f"http://{host}")):
            self._refuse(HTTPStatus.FORBIDDEN, "asked for under another name, or by another site's page")
            return False
        if self.path != path:
            self._refuse(HTTPStatus.NOT_FOUND, "there is / and /predict")
            return False
        return True

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self.close_connection = True  # the rest of the request was not read
        self._answer(status, "application/json", json.dumps({"error": reason}).encode())

    def _answer(self, status: HTTPStatus, content_type: str, content: bytes) -> None:
        self.connection.settimeout(TIMEOUT)
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Logs nothing: a line per stroke would bury the address."""


def show_in_notebook(run: Path, height: int = 760) -> None:
    """Shows the page in a notebook's cell, on Colab and in Jupyter on this machine, until the kernel ends.

    Raises:
        FastmnistError: as `serving`.
    """
    try:
        from google.colab import output
    except ImportError:
        output = None
    # Colab reaches the port through a proxy of its own, for the notebook's owner alone.
    server = serving(run, any_name=output is not None)
    address = server.__enter__()
    atexit.register(server.__exit__, None, None, None)
    if output is not None:
        output.serve_kernel_port_as_iframe(int(address.rstrip("/").rpartition(":")[2]), height=str(height))
        return
    from IPython.display import IFrame, display

    display(IFrame(address, "100%", height))
    print(f"or open {address} in a browser on this machine")
