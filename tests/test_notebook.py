"""The Colab notebook: it installs only what is missing, runs from top to bottom, is kept without outputs, explains
each cell and term, and names the right repository."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from importlib.metadata import requires
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "fastmnist_colab.ipynb"
CONSTRAINTS = ROOT / "notebooks" / "colab-constraints.txt"
COLAB = dict(line.split("==") for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#"))


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]
    return found


def test_badge_notebook_and_setup_name_one_repository() -> None:
    named = re.search(r'^SLUG = "(.+?)"', (ROOT / "setup.py").read_text(), re.M)
    assert named is not None
    badge = f"https://colab.research.google.com/github/{named[1]}/blob/main/notebooks/{NOTEBOOK.name}"
    text = "".join("".join(cell["source"]) for cell in cells())
    assert badge in text
    assert badge in (ROOT / "README.md").read_text()
    assert f'REPOSITORY = "https://github.com/{named[1]}"' in text


def test_it_is_kept_without_outputs() -> None:
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert code
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


def test_colab_has_what_is_required() -> None:
    required = {found.name: found.specifier for found in map(Requirement, requires("fastmnist") or [])}
    assert {"torch", "torchvision", "numpy", "numba"} <= COLAB.keys() <= required.keys()
    for name, version in COLAB.items():
        assert required[name].contains(version), name


def first_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: dict[str, str]) -> set[str]:
    """Names of what pip would install for the first cell in an environment with these packages and no fastmnist.

    The cell runs as it is; its calls of pip are about an environment that has the packages' metadata alone, and
    install nothing.
    """
    environment, checkout, report = tmp_path / "environment", tmp_path / "checkout", tmp_path / "report.json"
    venv.create(environment)
    (site,) = environment.glob("lib/python*/site-packages")
    for name, version in there.items():
        (site / f"{name}-{version}.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (site / f"{name}-{version}.dist-info" / "METADATA").write_text(metadata)
    shutil.copytree(ROOT / "fastmnist", checkout / "fastmnist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, checkout)

    run, find_spec = subprocess.run, importlib.util.find_spec

    def elsewhere(command: list[str], **options: Any) -> Any:
        if command[1:3] == ["-m", "pip"]:
            command = [*command[:3], "--python", str(environment / "bin" / "python"), *command[3:]]
            if "install" in command:
                command += ["--dry-run", "--report", str(report)]
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", elsewhere)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: None if name == "fastmnist" else find_spec(name, *of)
    )
    monkeypatch.chdir(checkout)
    exec("".join(cells()[1]["source"]), {})
    return {package["metadata"]["name"].lower() for package in json.loads(report.read_text())["install"]}


@pytest.mark.slow  # it asks the package index, as the next one does
def test_the_first_cell_installs_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = first_cell(tmp_path, monkeypatch, COLAB | {"pillow": "11.3.0"})
    assert {"fastmnist", "jsonargparse", "scikit-learn"} <= installed
    assert installed.isdisjoint({*COLAB, "pillow"})


@pytest.mark.slow
def test_the_first_cell_replaces_nothing_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"torch.*==2\.5\.1"):
        first_cell(tmp_path, monkeypatch, COLAB | {"torch": "2.5.1"})
    assert not (tmp_path / "report.json").exists()


def test_each_code_cell_is_explained_before() -> None:
    kinds = [cell["cell_type"] for cell in cells()]
    assert all(before == "markdown" for before, kind in pairwise(kinds) if kind == "code")


def test_the_glossary_closes_it_and_has_every_term_once() -> None:
    *text, glossary = ("".join(cell["source"]) for cell in cells() if cell["cell_type"] == "markdown")
    terms, listed = (
        [term.replace("\n", " ").lower() for term in re.findall(r"\*\*(.+?)\*\*", part, re.S)]
        for part in ("\n".join(text), glossary)
    )
    assert cells()[-1]["cell_type"] == "markdown"
    assert listed == sorted(listed)
    assert sorted(terms) == listed


def test_an_upload_on_colab_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cell with a stand-in for Colab's button; what it read is asked of the names of its pictures."""
    (cell,) = ("".join(cell["source"]) for cell in cells() if "files.upload()" in "".join(cell["source"]))
    picture = io.BytesIO()
    Image.fromarray(np.eye(60, dtype=np.uint8) * 255).save(picture, "PNG")
    button = ModuleType("google.colab")
    button.files = SimpleNamespace(upload=lambda: {"mine.png": picture.getvalue()})
    monkeypatch.setitem(sys.modules, "google.colab", button)
    monkeypatch.chdir(tmp_path)
    read: list[str] = []

    def predict(run: Path, pictures: list[Path]) -> list[Any]:
        read.extend(path.name for path in pictures)
        return [SimpleNamespace(ranked=lambda: [("7", 1.0)])]

    given = {
        "Path": Path,
        "np": np,
        "plt": MagicMock(**{"subplots.return_value": (MagicMock(), (MagicMock(), MagicMock()))}),
        "fastmnist": SimpleNamespace(predict=predict),
        "result": SimpleNamespace(folder=tmp_path),
        "train_file": SimpleNamespace(image_shape=(28, 28, 1)),
        "test_file": SimpleNamespace(images=lambda rows: np.eye(28, dtype=np.uint8)[None, :, :, None] * 255),
    }
    exec(cell.replace("UPLOAD = False", "UPLOAD = True"), given)
    assert read == ["example.png", "mine.png"]


# What takes minutes otherwise; the final runs see a part of what the preset trains with.
SHORT = {
    "LADDER_IMAGES": "256",
    "BUDGET": "2",
    "SECONDS": "2",
    "IMAGES": "600",
    "EPOCHS": "2  #",
    "FEW": "300",
    "MANY_EPOCHS": "2",
}


def first_setting(images_seen: int) -> str:
    return f'{{"images_seen": {images_seen}, "dataset":'


def run(tmp_path: Path, **settings: str) -> tuple[str, Path]:
    """What it printed, and the rendered page, after settings at the beginning of a line were given other values."""
    import nbformat

    spec = importlib.util.spec_from_file_location("render", ROOT / "notebooks" / "render.py")
    assert spec is not None
    assert spec.loader is not None
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    content = nbformat.read(NOTEBOOK, as_version=4)
    for name, value in settings.items():
        changed = 0
        for cell in content.cells:
            cell.source, count = re.subn(rf"^{name} = \S+", f"{name} = {value}", cell.source, flags=re.M)
            changed += count
        assert changed == 1, name
    path = tmp_path / NOTEBOOK.name
    nbformat.write(content, path)
    done = render.execute(path)
    printed = [output.get("text", "") for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    page = tmp_path / "page.html"
    page.write_text(render.render(done))
    return "\n".join(printed), page


@pytest.mark.slow
@pytest.mark.browser
def test_it_runs_on_the_embedded_digits(tmp_path: Path, browser) -> None:
    missing = importlib.util.find_spec("fastmnist") is None
    repository = f'"file://{ROOT}"'  # where fastmnist is missing, the first cell installs it from here
    settings = {"DATASET": '"digits"', "RUN_EPOCHS": "3", "SETTINGS": first_setting(12_000)}
    printed, page = run(tmp_path, **SHORT, **settings, REPOSITORY=repository)
    installed = re.findall(r"^installed: (.+)", printed, re.M)
    assert len(installed) == missing
    assert not {package.split("==")[0] for line in installed for package in line.split(", ")} & COLAB.keys()
    assert "digits: 1,437 training and 360 test images" in printed
    assert re.findall(r"^epoch (\d)/3: .*validation accuracy", printed, re.M) == ["1", "2", "3"]
    assert float(re.findall(r"^test accuracy ([\d.]+)%", printed, re.M)[0]) > 90
    assert "95 % interval" in printed
    assert "http://127.0.0.1:" in printed
    browser.get_log("browser")
    browser.get(page.as_uri())
    widths = browser.execute_script("return [...document.images].map(image => image.naturalWidth)")
    assert len(widths) >= 8
    assert min(widths) > 400
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [address for address in asked if not address.startswith("data:")] == []
    assert "alive while the notebook runs" in browser.find_element("tag name", "body").text
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_it_runs_on_mnist(
    mnist_folder: Path, write_idx: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All training images are there, and few of the test images: they are evaluated a dozen times."""
    from fastmnist.sources.idx import IdxFile  # not above: the notebook is tried where fastmnist is missing too

    data = tmp_path / "data"
    data.mkdir()
    for file in mnist_folder.glob("*-ubyte*"):
        if file.name.startswith("train"):
            (data / file.name).symlink_to(file)
        else:
            dimensions = int(file.name[file.name.index("idx") + 3])
            write_idx(data / file.name, IdxFile(file, ndim=dimensions).read()[:500])
    monkeypatch.setenv("FASTMNIST_DATA", str(data))
    printed, _ = run(tmp_path, **SHORT, RUN_EPOCHS="0.05", SETTINGS=first_setting(8_000))
    assert "mnist: 60,000 training and 500 test images" in printed
    assert float(re.findall(r"^test accuracy ([\d.]+)%", printed, re.M)[0]) > 90
