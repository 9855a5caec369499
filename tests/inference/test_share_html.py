"""The demo as one file: its content, and a browser that reads it without a server."""

from __future__ import annotations

import base64
import gzip
import io
import itertools
import re
import stat
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from fastmnist.cli.main import main
from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError, FastmnistError
from fastmnist.inference import onnxruntime_web
from fastmnist.inference import share_html as sharing
from fastmnist.inference.demo import DrawingReader
from fastmnist.inference.picture import mnist_like
from fastmnist.inference.share_html import share_html
from fastmnist.runs.train import train

CANVAS = 280


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-18 whose dead taps are not zero: they were trained with the others."""
    out = tmp_path_factory.mktemp("sharing") / "run"
    settings = {"dataset": "digits", "epochs": 2, "batch_size": 64, "learning_rate": 0.03, "live_taps": False}
    return train(TrainConfig(**settings, quiet=True, out=str(out))).folder


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    """A folder with the runtime's files, which are nothing but their names."""
    folder = tmp_path / "dist"
    folder.mkdir()
    (folder / onnxruntime_web.SCRIPT).write_text("var ort = {};\n//# sourceMappingURL=ort.map")
    for name in (onnxruntime_web.GLUE, onnxruntime_web.WASM):
        (folder / name).write_text(name)
    return folder


def unpacked(page: str, name: str) -> bytes:
    found = re.search(rf'id="{name}">([^<]*)</script>', page)
    assert found is not None
    return gzip.decompress(base64.b64decode(found[1]))


def test_the_model_in_the_page_is_the_run_s(run: Path, runtime: Path, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "demo.html"
    shared = share_html(run, path, runtime=runtime)
    page = path.read_text()
    assert (shared.bytes, shared.images) == (path.stat().st_size, 360)
    assert unpacked(page, "wasm") == onnxruntime_web.WASM.encode()
    assert "sourceMappingURL" not in page
    assert len(page) < 12e6  # of 45 MB of weights
    reader = DrawingReader(run)
    session = onnxruntime.InferenceSession(unpacked(page, "model"), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for _ in range(5):
        picture = Image.fromarray(drawing(rng))
        content = io.BytesIO()
        picture.save(content, "png")
        seen = reader.read(content.getvalue())
        logits = session.run(["logits"], {"images": mnist_like(picture)[None, None].astype(np.float32)})[0][0]
        powers = np.exp(logits - logits.max())
        np.testing.assert_allclose(powers / powers.sum(), seen.probabilities, atol=sharing.TOLERANCE)


def drawing(rng: np.random.Generator, radius: float = 10.5) -> np.ndarray:
    """(280, 280) uint8: a stroke of the page's pen, or of a thinner one, through four random points, white on black."""
    rows, columns = np.mgrid[:CANVAS, :CANVAS] + 0.5
    points = rng.uniform(30, 250, (4, 2))
    ink = np.zeros((CANVAS, CANVAS))
    for start, end in itertools.pairwise(points):
        for part in np.linspace(0, 1, 100):
            y, x = start + part * (end - start)
            ink = np.maximum(ink, np.clip(radius - np.hypot(rows - y, columns - x), 0, 1))
    return np.rint(255 * ink).astype(np.uint8)


def test_a_page_that_would_see_other_things_is_not_written(
    run: Path, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "TOLERANCE", 0.0)
    path = tmp_path / "demo.html"
    with pytest.raises(FastmnistError, match=r"demo\.html"):
        share_html(run, path, runtime=runtime)
    assert not path.exists()


def test_a_folder_is_no_file(run: Path, runtime: Path, tmp_path: Path) -> None:
    with pytest.raises(FastmnistError, match="--share-html"):
        share_html(run, tmp_path, runtime=runtime)
    assert not list(tmp_path.glob("*.tmp"))


def test_files_of_the_runtime_that_are_missing(run: Path, runtime: Path, tmp_path: Path) -> None:
    (runtime / onnxruntime_web.WASM).unlink()
    with pytest.raises(ConfigError, match=r"threaded\.wasm.*--onnxruntime-web"):
        share_html(run, tmp_path / "demo.html", runtime=runtime)


def test_a_script_that_cannot_stand_in_a_page(runtime: Path) -> None:
    (runtime / onnxruntime_web.SCRIPT).write_text("'</script>'")
    with pytest.raises(FastmnistError, match=onnxruntime_web.SCRIPT):
        onnxruntime_web.load_runtime(runtime)


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a folder that is all of PATH."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    return programs


def fake_npm(folder: Path, code: str) -> None:
    file = folder / "npm"
    file.write_text(f"#!{sys.executable}\nimport json, sys\n{code}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def test_no_npm(run: Path, no_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(run), "--share-html", str(tmp_path / "demo.html")]) == 2
    said = capsys.readouterr().err
    assert "npm" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("sys.exit('npm error network is down')", "npm error network is down"),
        ("print('what')", "onnxruntime-web"),
        ("print(json.dumps([{'filename': 'a.tgz'}]))", "onnxruntime-web"),
        ("open('a', 'w').write('b'); print(json.dumps([{'filename': 'a'}]))", "sha512"),
    ],
)
def test_npm_that_fails(no_cache: Path, code: str, says: str) -> None:
    fake_npm(no_cache, code)
    with pytest.raises(FastmnistError, match=says):
        onnxruntime_web.load_runtime()


def test_what_npm_gave_is_kept(no_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name in (onnxruntime_web.SCRIPT, onnxruntime_web.GLUE, onnxruntime_web.WASM):
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    (tmp_path / "a.tgz").write_bytes(content.getvalue())
    copy = f"import shutil; shutil.copy({str(tmp_path / 'a.tgz')!r}, '.'); print(json.dumps([{{'filename': 'a.tgz'}}]))"
    fake_npm(no_cache, copy)
    digest = base64.b64encode(onnxruntime_web.hashlib.sha512(content.getvalue()).digest()).decode()
    monkeypatch.setattr(onnxruntime_web, "SHA512", digest)
    assert onnxruntime_web.load_runtime().wasm == onnxruntime_web.WASM.encode()
    (no_cache / "npm").unlink()
    assert onnxruntime_web.load_runtime().glue == onnxruntime_web.GLUE.encode()


@pytest.fixture(scope="module")
def shared(run: Path, npm: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a page with the real runtime."""
    path = tmp_path_factory.mktemp("page") / "demo.html"
    share_html(run, path)
    return path.as_uri()


@pytest.mark.browser
def test_a_file_in_a_browser_reads_as_the_run_does(shared: str, run: Path, browser) -> None:
    """Drawings, put on the canvas as they are: the same view, to a grey level, and the same probabilities."""
    browser.set_window_size(1200, 900)
    browser.get(shared)
    reader = DrawingReader(run)
    rng = np.random.default_rng(1)
    for radius in (10.5, 10.5, 10.5, 6, 3, 1.5):
        image = drawing(rng, radius)
        image[2:4, 270:272] = 255  # a speck, which does not count
        content = io.BytesIO()
        Image.fromarray(image).save(content, "png")
        expected = reader.read(content.getvalue())
        found = browser.execute_async_script(
            """
            const [encoded, done] = arguments;
            const bytes = Uint8Array.from(atob(encoded), letter => letter.charCodeAt(0));
            const grey = new ImageData(280, 280);
            bytes.forEach((value, at) => grey.data.set([value, value, value, 255], 4 * at));
            pen.putImageData(grey, 0, 0);
            read(drawing).then(done, problem => done(String(problem)));
            """,
            base64.b64encode(image.tobytes()).decode(),
        )
        assert not isinstance(found, str), found
        assert np.abs(np.array(found["image"]) - expected.image.astype(int)).max() <= 1
        np.testing.assert_allclose(found["probabilities"], expected.probabilities, atol=0.02)
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_a_stroke_in_the_file(shared: str, browser) -> None:
    """Nothing but the file itself is asked for, and a stroke moves the bars."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    browser.set_window_size(390, 900)
    browser.get(shared)
    canvas = browser.find_element(By.ID, "drawing")
    ActionChains(browser).move_to_element_with_offset(canvas, 0, -80).click_and_hold().move_by_offset(
        0, 160
    ).release().perform()
    until = time.monotonic() + 60
    while not browser.find_element(By.ID, "answer").text and time.monotonic() < until:
        time.sleep(0.1)
    shares = browser.execute_script(
        "return cells.filter((_, at) => at % 3 == 2).map(cell => parseFloat(cell.textContent))"
    )
    assert sum(shares) == pytest.approx(100, abs=0.6)
    assert "Nothing leaves this\npage" in browser.page_source
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [address for address in asked if not address.startswith(("data:", "blob:"))] == []
    assert browser.get_log("browser") == []
