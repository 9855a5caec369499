"""The demo's page and server: what it answers, what it refuses, and a stroke drawn in a real browser."""

from __future__ import annotations

import http.client
import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmnist.cli import main
from fastmnist.config import TrainConfig
from fastmnist.data.beton import Beton
from fastmnist.data.prepare import cache_folder, compiled_path
from fastmnist.demo import MOST_BYTES, latest_run, page, serving
from fastmnist.errors import ConfigError, FastmnistError
from fastmnist.inference import predict
from fastmnist.run import train
from fastmnist.training.checkpoint import ModelCard

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
    with Beton(compiled_path("digits", "test", cache_folder())) as test:
        images = test.images(np.arange(10)).reshape(-1, 28, 28)
    paths = []
    for number, image in enumerate(images):
        paths.append(folder / f"{number}.png")
        Image.fromarray(image).resize((280, 280)).save(paths[-1])
    return paths


def ask(
    address: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    host = address.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(host, timeout=20)
    try:
        connection.request("GET" if body is None else "POST", path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def test_it_answers_as_predict_does(address: str, run: Path, drawings: list[Path]) -> None:
    for expected in predict(run, drawings):
        status, _, content = ask(address, "/predict", expected.path.read_bytes())
        found = json.loads(content)
        assert status == 200
        np.testing.assert_allclose(found["probabilities"], expected.probabilities, atol=1e-5)
        assert np.array(found["image"]).shape == (28, 28)


def test_the_page_asks_nobody_else(address: str) -> None:
    status, headers, content = ask(address, "/")
    text = content.decode()
    assert status == 200
    assert address.startswith("http://127.0.0.1:")
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    assert "//" not in text.replace("// ", "")  # no address of another server
    assert "digits" in text


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "says"),
    [
        ("/other", None, {}, 404, "there is / and /predict"),
        ("/", None, {"Host": "example.org:80"}, 403, "another name"),
        ("/predict", b"no picture", {}, 422, "cannot be read"),
        ("/predict", b"", {}, 413, "a drawing has 1 to"),
        ("/predict", b"x", {"Content-Length": str(MOST_BYTES + 1)}, 413, "a drawing has 1 to"),
    ],
)
def test_what_it_refuses(
    address: str, path: str, body: bytes | None, headers: dict[str, str], status: int, says: str
) -> None:
    found, _, content = ask(address, path, body, headers)
    assert (found, says in json.loads(content)["error"]) == (status, True)


def test_another_dataset_s_classes_are_shown() -> None:
    names = ["T-shirt/top", "</script>", "Bag & belt"]
    card = ModelCard("small-cnn", "imagenet", "fashion", names, (28, 28, 1), (0.3,), (0.4,))
    text = page(card).decode()
    assert "<span>Bag &amp; belt</span>" in text
    assert "trained on fashion" in text
    assert text.count("</script>") == 1, "no name ends the script"
    assert json.loads(re.findall(r"const names = (.*);", text)[0]) == names


def test_an_empty_drawing(address: str) -> None:
    blank = io.BytesIO()
    Image.new("L", (280, 280)).save(blank, "png")
    status, _, content = ask(address, "/predict", blank.getvalue())
    assert (status, "error" in json.loads(content)) == (422, True)


def test_which_run_it_takes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert latest_run(run.parent) == run
    with pytest.raises(ConfigError, match=r"no finished run in .*; make one with fastmnist train"):
        latest_run(tmp_path)
    assert main(["demo", str(tmp_path / "none")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_a_port_that_is_taken(address: str, run: Path) -> None:
    port = int(address.rstrip("/").rpartition(":")[2])
    with pytest.raises(FastmnistError, match=f"--port {port} cannot be had"), serving(run, port):
        pass
    with pytest.raises(ConfigError, match="--port 70000"), serving(run, 70000):
        pass


def test_ctrl_c_ends_the_command(run: Path) -> None:
    program = [sys.executable, "-m", "fastmnist", "demo", str(run), "--no-browser"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "http://127.0.0.1:" in line
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=30)
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
