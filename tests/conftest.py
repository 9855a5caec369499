"""Shared fixtures: isolation from the user's files, optional parts that are skipped or required, small data.

FASTMNIST_DATA names the folder with the real MNIST IDX files. FASTMNIST_REQUIRE is a comma-separated list of optional
parts ("mnist", "ffcv", "gpu", "peers", "browser"): a test that needs one of them then fails instead of being skipped.
"""

from __future__ import annotations

import gc
import gzip
import importlib
import itertools
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

REAL_DATA = os.environ.get("FASTMNIST_DATA", "")
REQUIRED = {part.strip() for part in os.environ.get("FASTMNIST_REQUIRE", "").split(",") if part.strip()}
FFCV_MISSING = (
    "ffcv cannot be imported: apt-get install libopencv-dev libturbojpeg0-dev pkg-config, then pip install '.[ffcv]'"
)

# No deadline: the first call of a numba function compiles it. The same examples in every run: no test fails by chance.
hypothesis.settings.register_profile("fastmnist", deadline=None, max_examples=40, derandomize=True, database=None)
hypothesis.settings.load_profile("fastmnist")

# Under pytest-xdist (-n 2) each worker and its processes have their share of the cores and a numba cache of their own.
if "PYTEST_XDIST_WORKER" in os.environ:
    share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
    kept = Path(os.environ.get("NUMBA_CACHE_DIR", Path(__file__).parents[1] / ".pytest_cache" / "numba"))
    os.environ["NUMBA_CACHE_DIR"] = str(kept / os.environ["PYTEST_XDIST_WORKER"])

Samples = tuple[np.ndarray, np.ndarray]


def skip_or_fail(part: str, reason: str) -> None:
    """Skips the test, or fails it when FASTMNIST_REQUIRE names the part that is missing."""
    (pytest.fail if part in REQUIRED else pytest.skip)(reason)


def ffcv_error() -> Exception | None:
    """The error of importing ffcv; None if it can be imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("ffcv")
        except (ImportError, OSError) as error:  # OSError: a shared library is missing
            return error
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts the slow tests first, so that the fast ones fill the gaps on several cores."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("ffcv") and (error := ffcv_error()):
        skip_or_fail("ffcv", f"{FFCV_MISSING} ({error})")
    if item.get_closest_marker("gpu"):
        torch = importlib.import_module("torch")
        if not torch.cuda.is_available():
            skip_or_fail("gpu", "PyTorch finds no CUDA device here")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Chromium without a window."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        skip_or_fail("browser", "chromium and chromedriver are not here: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=str(shutil.which("chromedriver")))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium: Any) -> Iterator[Any]:
    """Chromium with an empty page and log; a page is left before the server that it came from ends."""
    chromium.get_log("browser")
    yield chromium
    chromium.get("about:blank")


@pytest.fixture(scope="session")
def npm() -> str:
    """npm, which fetches the runtime for models in a browser."""
    found = shutil.which("npm")
    if found is None:
        skip_or_fail("browser", "npm is not here: apt-get install npm")
    return found


@pytest.fixture(scope="session", autouse=True)
def isolated_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps tests away from the user's cache and data folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("FASTMNIST_DATA", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_arrives() -> Iterator[None]:
    """Undoes a shell's ignoring of SIGINT for background jobs, which programs under test would inherit."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def ffcv_code_is_collected(request: pytest.FixtureRequest) -> Iterator[None]:
    """FFCV's compiled code is in reference cycles, and numba's finalizer may warn: in this test, not in a later one."""
    yield
    if request.node.get_closest_marker("ffcv"):
        for _ in range(3):  # a finalizer frees further cycles
            gc.collect()


@pytest.fixture(scope="session")
def mnist_folder() -> Path:
    """The folder with MNIST's own four IDX files."""
    if not REAL_DATA:
        skip_or_fail("mnist", "the real MNIST files are not here: set FASTMNIST_DATA to their folder")
    return Path(REAL_DATA).resolve()


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes a new, empty folder at each call, also for each example of a hypothesis test."""
    base = tmp_path_factory.mktemp("scratch")
    return lambda: Path(tempfile.mkdtemp(dir=base))


@pytest.fixture(scope="session")
def random_samples() -> Callable[..., Samples]:
    """(count, shape, classes, seed) -> images (count, *shape) uint8, and labels (count,) int64."""

    def make(count: int, shape: tuple[int, ...] = (28, 28), classes: int = 10, seed: int = 0) -> Samples:
        random = np.random.default_rng(seed)
        return random.integers(0, 256, (count, *shape), np.uint8), random.integers(0, classes, count)

    return make


@pytest.fixture(scope="session")
def write_idx() -> Callable[[Path, np.ndarray], Path]:
    """(path, array) -> path: the array as an IDX file, gzipped when the name ends in .gz."""
    codes = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}

    def write(path: Path, array: np.ndarray) -> Path:
        kind = f"{array.dtype.kind}{array.dtype.itemsize}"
        header = struct.pack(f">HBB{array.ndim}I", 0, codes[kind], array.ndim, *array.shape)
        content = header + array.astype(f">{kind}").tobytes()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
        return path

    return write


@pytest.fixture(scope="session")
def write_dataset(
    write_idx: Callable[[Path, np.ndarray], Path], random_samples: Callable[..., Samples]
) -> Callable[..., dict[str, Samples]]:
    """(folder, name, train, test, suffix, seed) -> {split: (images, labels)}: the IDX files of a small dataset.

    Images and labels are returned as in the files.
    """

    def write(
        folder: Path, name: str = "mnist", train: int = 30, test: int = 20, suffix: str = "", seed: int = 0
    ) -> dict[str, Samples]:
        from fastmnist.sources.datasets import DATASETS

        dataset, written = DATASETS[name], {}
        for split, count in (("train", train), ("test", test)):
            images, labels = random_samples(count, classes=len(dataset.class_names), seed=seed + count)
            labels = labels + dataset.first_label
            columns = np.column_stack([labels] + [labels + k for k in range(1, 8)]).astype(np.int32)
            for stem, array in zip(
                dataset.files[split], (images, columns if name == "qmnist" else labels.astype(np.uint8)), strict=True
            ):
                write_idx(folder / f"{stem}{suffix}", array)
            written[split] = images, labels
        return written

    return write


@pytest.fixture(scope="session")
def write_colour(random_samples: Callable[..., Samples]) -> Callable[..., dict[str, Samples]]:
    """(folder, name, train, test) -> {split: (images, labels)}: a small copy of CIFAR or SVHN in its own format.

    Its checksums are its own: torchvision reads it once `any_checksum` is in place.
    """

    def write(folder: Path, name: str = "cifar10", train: int = 20, test: int = 10) -> dict[str, Samples]:
        import scipy.io

        from fastmnist.sources.colour import COLOUR

        names = {"cifar10": "label_names", "cifar100": "fine_label_names"}
        written, classes = {}, 100 if name == "cifar100" else 10
        for split, count in (("train", train), ("test", test)):
            images, labels = random_samples(count, (32, 32, 3), classes, seed=count)
            files = [folder / file for file in COLOUR[name].files(split)]
            files[0].parent.mkdir(parents=True, exist_ok=True)
            if name == "svhn":
                content = {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)[:, None]}
                scipy.io.savemat(files[0], content)
            else:
                *batches, meta = files
                rows = images.transpose(0, 3, 1, 2).reshape(count, -1)
                parts = np.array_split(np.arange(count), len(batches))
                for path, part in zip(batches, parts, strict=True):
                    kind = "labels" if name == "cifar10" else "fine_labels"
                    path.write_bytes(pickle.dumps({"data": rows[part], kind: labels[part].tolist()}))
                meta.write_bytes(pickle.dumps({names[name]: [f"class {label}" for label in range(classes)]}))
            written[split] = images, labels
        return written

    return write


@pytest.fixture
def any_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision takes files of any content for CIFAR's and SVHN's."""
    for module in ("cifar", "svhn"):
        check = f"torchvision.datasets.{module}.check_integrity"
        monkeypatch.setattr(check, lambda path, md5=None: Path(path).is_file())


@pytest.fixture(scope="session")
def write_pictures() -> Callable[..., dict[str, np.ndarray]]:
    """(folder, {class: count}, size, mode) -> {relative path: pixels}: pictures <class>/<number>.png of a folder."""

    def write(
        folder: Path, counts: dict[str, int], size: tuple[int, int] = (16, 18), mode: str = "RGB", seed: int = 0
    ) -> dict[str, np.ndarray]:
        from PIL import Image

        random, written = np.random.default_rng(seed), {}
        for name, count in counts.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                picture = Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).convert(mode)
                picture.save(folder / name / f"{number}.png")
                written[f"{name}/{number}.png"] = np.asarray(picture)
        return written

    return write


@pytest.fixture(scope="session")
def write_small_beton(random_samples: Callable[..., Samples]) -> Callable[..., Samples]:
    """(path, count, shape, classes, seed, options of write_beton) -> (images, labels), as written."""

    def write(
        path: Path,
        count: int = 50,
        shape: tuple[int, ...] = (28, 28),
        classes: int = 10,
        seed: int = 0,
        **options: Any,
    ) -> Samples:
        from fastmnist.beton.writer import write_beton

        images, labels = random_samples(count, shape, classes, seed)
        write_beton(path, images, labels, **{"split": "train"} | options)
        return images, labels

    return write


@pytest.fixture
def press_ctrl_c_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """(n) -> None: Ctrl-C during the n-th training step from now on, once."""
    return partial(arm_ctrl_c, monkeypatch)


def arm_ctrl_c(patch: pytest.MonkeyPatch, number: int) -> None:
    from fastmnist.training.loop import Trainer

    inner, count = Trainer.train_step, itertools.count(1)

    def train_step(self: Any, *arguments: Any) -> None:
        inner(self, *arguments)
        if next(count) == number:
            signal.raise_signal(signal.SIGINT)

    patch.setattr(Trainer, "train_step", train_step)


@pytest.fixture(scope="session")
def in_a_new_process() -> Callable[..., str]:
    """(script, arguments) -> the output of the script, which gets the arguments in sys.argv and must exit with 0."""

    def run(script: str, *arguments: object) -> str:
        command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)  # ends a hang
        assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr}"
        return done.stdout

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Counts the slow tests that were deselected, which -ra does not report."""
    left_out = terminalreporter.stats.get("deselected", [])
    slow = sum(item.get_closest_marker("slow") is not None for item in left_out)
    if slow:
        terminalreporter.write_line(f"LEFT OUT [{slow}] slow tests, which take minutes: run them with pytest -m slow")
