"""The demo's page and server, and a stroke drawn in a real browser."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmnist.beton.reader import Beton
from fastmnist.cli.main import main
from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError, FastmnistError
from fastmnist.inference import demo
from fastmnist.inference.demo import MAX_BYTES, latest_run, render_page, serving
from fastmnist.inference.picture import mnist_like
from fastmnist.inference.predict import predict
from fastmnist.prepare.prepare import beton_path, cache_folder
from fastmnist.runs.train import train
from fastmnist.sources.pictures import MAX_PIXELS
from fastmnist.training.checkpoint import ModelCard, save_weights

DIGITS = {"dataset": "digits", "model": "small-cnn", "batch_size": 64, "quiet": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "runs" / "one"
    return train(TrainConfig(**DIGITS, epochs=12, out=str(out))).folder


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    with serving(run) as address:
        yield address


@pytest.fixture(scope="module")
def drawings(run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Ten test images as large pictures."""
    folder = tmp_path_factory.mktemp("drawings")
    with Beton(beton_path("digits", "test", cache_folder())) as test:
        images = test.images(np.arange(10)).reshape(-1, 28, 28)
    paths = []
    for number, image in enumerate(images):
        paths.append(folder / f"{number}.png")
        Image.fromarray(image).resize((280, 280)).save(paths[-1])
    return paths


def ask(
    address: str, path: str, body: bytes | Iterator[bytes] | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    host = address.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(host, timeout=20)
    try:
        connection.request("GET" if body is None else "POST", path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def test_answers_equal_predict(address: str, run: Path, drawings: list[Path]) -> None:
    for expected in predict(run, drawings):
        status, _, content = ask(address, "/predict", expected.path.read_bytes())
        reading = json.loads(content)
        assert status == 200
        np.testing.assert_allclose(reading["probabilities"], expected.probabilities, atol=1e-5)
        assert np.array(reading["image"]).shape == (28, 28)


def test_predict_without_pictures(run: Path) -> None:
    with pytest.raises(ConfigError):
        predict(run, [])


def test_the_page_loads_nothing_from_elsewhere(address: str) -> None:
    status, headers, content = ask(address, "/")
    text = content.decode()
    assert status == 200
    assert address.startswith("http://127.0.0.1:")
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    assert "//" not in text.replace("// ", "")  # no address of another server
    assert "digits" in text


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/other", None, {}, 404),
        ("/", None, {"Host": "example.org:80"}, 403),
        ("/", None, {"Host": "localhost.example.org"}, 403),
        ("/", None, {"Host": ""}, 403),
        ("/", None, {"Origin": "http://example.org"}, 403),
        ("/predict", b"x", {"Origin": "http://example.org"}, 403),
        ("/predict", b"x", {"Origin": "null"}, 403),
        ("/predict", b"x", {"Origin": "http://127.0.0.1:1"}, 403),
        ("/predict", b"no picture", {}, 422),
        ("/predict", b"", {}, 400),
        ("/predict", b"x", {"Content-Length": "-1"}, 400),
        ("/predict", b"x", {"Content-Length": "\u00b2"}, 400),
        ("/predict", b"x", {"Content-Length": str(MAX_BYTES + 1)}, 413),
        ("/predict", b"x", {"Content-Length": "9" * 5000}, 413),
        ("/predict", iter([b"x"]), {"Transfer-Encoding": "chunked"}, 411),
    ],
)
def test_refused_requests(
    address: str,
    capfd: pytest.CaptureFixture[str],
    path: str,
    body: bytes | Iterator[bytes] | None,
    headers: dict[str, str],
    status: int,
) -> None:
    answered, _, content = ask(address, path, body, headers)
    assert answered == status
    assert json.loads(content).keys() == {"error"}
    assert capfd.readouterr().err == ""


def png(width: int = 280, height: int = 280, stroke: int = 200) -> bytes:
    content = io.BytesIO()
    picture = Image.new("L", (width, height))
    picture.paste(255, (width // 2, 5, width // 2 + 3, 5 + min(stroke, height - 10)))
    picture.save(content, "png")
    return content.getvalue()


def test_its_own_page_and_programs_may_ask(address: str) -> None:
    host = address.removeprefix("http://").rstrip("/")
    port = host.rpartition(":")[2]
    for headers in (
        {"Origin": f"http://{host}"},
        {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"},
        {"Host": "127.0.0.1", "Origin": "http://127.0.0.1"},  # as a browser asks at port 80
        {"Host": "localhost"},
    ):
        assert ask(address, "/predict", png(), headers)[0] == 200
        assert ask(address, "/", None, headers)[0] == 200


def test_a_proxy_may_ask_under_another_name(run: Path) -> None:
    with serving(run, any_name=True) as address:
        headers = {"Host": "a.example.org", "Origin": "https://b.example.org"}
        assert ask(address, "/predict", png(), headers)[0] == 200


@pytest.mark.parametrize(
    "drawing", [png()[:-40], png(stroke=-5), b"P5 %d 1 255\n" % (MAX_PIXELS + 1)], ids=["damaged", "blank", "too large"]
)
def test_pictures_that_cannot_be_read(address: str, capfd: pytest.CaptureFixture[str], drawing: bytes) -> None:
    status, _, content = ask(address, "/predict", drawing)
    assert (status, json.loads(content).keys()) == (422, {"error"})
    assert capfd.readouterr().err == ""


def test_one_picture_at_a_time(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is read, another waits and is refused after a while; the page itself comes at once."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(picture: Image.Image, size: int) -> np.ndarray:
        begun.set()
        assert go_on.wait(20)
        return mnist_like(picture, size)

    monkeypatch.setattr(demo, "mnist_like", slow)
    statuses = []
    first = threading.Thread(target=lambda: statuses.append(ask(address, "/predict", png())[0]))
    first.start()
    assert begun.wait(20)
    monkeypatch.setattr(demo, "TIMEOUT", 0.2)
    status, _, content = ask(address, "/predict", png())
    assert (status, "error" in json.loads(content)) == (503, True)
    monkeypatch.undo()
    assert ask(address, "/")[0] == 200
    go_on.set()
    first.join(20)
    assert statuses == [200]
    assert ask(address, "/predict", png())[0] == 200


def connected(address: str) -> socket.socket:
    host, _, port = address.removeprefix("http://").rstrip("/").partition(":")
    return socket.create_connection((host, int(port)), timeout=20)


POST = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "drop", "answer"),
    [
        (b"", b"", b""),
        (b"GET / HT", b"", b""),
        (b"GET / HTTP/1.1\r\nA: ", b"a", b""),
        (POST, b"", b"HTTP/1.0 408"),
        (POST + b"\x89PNG", b"p", b"HTTP/1.0 408"),
    ],
)
def test_a_slow_client_is_dropped(
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    sent: bytes,
    drop: bytes,
    answer: bytes,
) -> None:
    """One that is silent, and one that sends a byte now and then; others are answered meanwhile."""
    monkeypatch.setattr(demo, "TIMEOUT", 0.5)
    with connected(address) as client:
        client.sendall(sent)
        assert ask(address, "/")[0] == 200
        client.settimeout(0.02)
        received = b""
        for _ in range(900):  # bytes that would keep it for 18 seconds
            try:
                part = client.recv(4096)
            except TimeoutError:
                with contextlib.suppress(ConnectionError):  # what was answered before is still to be received
                    client.sendall(drop)
                continue
            except ConnectionError:
                break  # it left while a byte was under way
            if not part:
                break
            received += part
        else:
            pytest.fail("it was still served")
    assert received[: len(answer)] == answer
    assert bool(received) == bool(answer)
    assert capfd.readouterr().err == ""


def test_clients_that_leave(address: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Reset in the middle of a request, or closed with less than was promised: no traceback, and the demo goes on."""
    for sent in (b"", b"GET / HT", POST, POST + b"\x89PNG", b"\r\n\r\n", b"\x00\xff\r\n\r\n", b"GET /\r\n\r\n"):
        with connected(address) as client:
            client.sendall(sent)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closing is a reset
    with connected(address) as client:
        client.sendall(POST + b"\x89PNG")
        client.shutdown(socket.SHUT_WR)
        assert client.recv(4096).startswith(b"HTTP/1.0 400")
    assert ask(address, "/predict", png())[0] == 200
    assert capfd.readouterr().err == ""


def test_another_dataset_s_classes_are_shown() -> None:
    names = ["T-shirt/top", "</script>", "Bag & belt"]
    card = ModelCard("small-cnn", "imagenet", "fashion", names, (28, 28, 1), (0.3,), (0.4,))
    text = render_page(card).decode()
    assert "<span>Bag &amp; belt</span>" in text
    assert "trained on fashion" in text
    assert text.count("</script>") == 1, "no name ends the script"
    assert json.loads(re.findall(r"const names = (.*);", text)[0]) == names


@pytest.mark.parametrize("shape", [(28, 28, 3), (28, 32, 1), (28, 28, 4)])
def test_models_of_other_than_square_grey_images_are_refused(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    """Except that predict takes RGB."""
    moments = (0.5,) * shape[2]
    card = ModelCard("small-cnn", "imagenet", "digits", list("0123456789"), shape, moments, moments)
    save_weights(tmp_path, card.build(), card)
    uses = [lambda: serving(tmp_path).__enter__(), lambda: predict(tmp_path, ["a.png"])]
    for use in uses[: 1 if shape[2] == 3 else 2]:
        with pytest.raises(ConfigError, match=re.escape(str(shape))):
            use()


def test_which_run_it_takes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert latest_run(run.parent) == run
    with pytest.raises(ConfigError, match=str(tmp_path)):
        latest_run(tmp_path)
    assert main(["demo", str(tmp_path / "none")]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


def test_a_port_that_is_taken(address: str, run: Path) -> None:
    port = int(address.rstrip("/").rpartition(":")[2])
    with pytest.raises(FastmnistError, match=f"--port {port}"), serving(run, port):
        pass
    with pytest.raises(ConfigError, match="--port 70000"), serving(run, 70000):
        pass


def test_ctrl_c_ends_the_command(run: Path) -> None:
    """At once, with clients that have not said all yet."""
    program = [sys.executable, "-m", "fastmnist", "demo", str(run), "--no-browser"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search("http://127.0.0.1:\\d+/", line)
        assert address is not None
        try:
            with connected(address[0]) as silent, connected(address[0]) as half:
                half.sendall(POST)
                assert ask(address[0], "/")[0] == 200  # so both have been accepted
                process.send_signal(signal.SIGINT)
                _, errors = process.communicate(timeout=30)
                assert silent.recv(1) == b""
        finally:
            process.kill()  # or leaving the block would wait for ever
    assert (process.returncode, errors) == (0, "")


@pytest.mark.browser
@pytest.mark.parametrize("width", [1200, 390])
def test_a_stroke_in_a_browser(address: str, browser, width: int) -> None:
    """A vertical stroke is read, the bars move, clearing takes them back, and the console stays empty."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    def texts() -> list[str]:
        return [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "#bars > span")]

    browser.set_window_size(width, 900)
    browser.get(address)
    assert not browser.find_element(By.ID, "answer").text
    assert texts()[:2] == ["0", "\u2013"]
    canvas = browser.find_element(By.ID, "drawing")
    stroke = ActionChains(browser).move_to_element_with_offset(canvas, 0, -90).click_and_hold()
    for _ in range(6):
        stroke = stroke.move_by_offset(0, 30)
    stroke.release().perform()
    until = time.monotonic() + 20
    while "%" not in texts()[1] and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.5)  # the last stroke's answer
    shares = [float(text.removesuffix(" %")) for text in texts()[1::2]]
    assert sum(shares) == pytest.approx(100, abs=0.6)
    assert browser.find_element(By.ID, "answer").text == str(int(np.argmax(shares)))
    page_width = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert page_width <= 0  # nothing to scroll sideways
    browser.find_element(By.ID, "clear").click()
    assert texts()[1::2] == ["\u2013"] * 10
    assert browser.get_log("browser") == []
