"""Writing 60,000 images and labels from memory in each loader's own format, each file synced.

The limit is writing their bytes into one file, synced too. pytest's --basetemp names the folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from fastmnist.baselines.peers import PEERS, missing
from fastmnist.beton.writer import write_beton

HF = PEERS["hf-datasets"]
TIMEOUT = 60  # seconds for FFCV to write a file: it waits for ever when one of its processes ends

# In a process of its own: FFCV forks, and this process has threads that hold locks.
FFCV = """
import os, signal, sys, time, warnings
import numpy as np
warnings.simplefilter("ignore")
from ffcv.fields import IntField, NDArrayField
from ffcv.writer import DatasetWriter

class Samples:
    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return self.images[row], self.labels[row]

images, labels = np.load(sys.argv[1]), np.load(sys.argv[2])
fields = {"image": NDArrayField(np.dtype("u1"), images.shape[1:]), "label": IntField()}
for path in sys.stdin:
    path = path.rstrip("\\n")
    signal.alarm(int(sys.argv[3]))
    begun = time.perf_counter()
    DatasetWriter(path, fields).from_indexed_dataset(Samples(images, labels))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    print(time.perf_counter() - begun, flush=True)
    signal.alarm(0)
"""


def sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


@pytest.fixture(scope="module")
def arrays(data):
    return data.images.numpy(), data.labels.numpy()


@pytest.fixture
def folder(tmp_path):
    """A new, empty folder at each call, which deletes the one before it."""
    numbers = count()

    def new() -> Path:
        number = next(numbers)
        shutil.rmtree(tmp_path / str(number - 1), ignore_errors=True)
        made: Path = tmp_path / str(number)
        made.mkdir()
        return made

    yield new
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture
def plain_write(arrays, tmp_path):
    """images -> seconds to write their bytes into one file."""
    images, labels = arrays

    def write(number: int) -> float:
        path = tmp_path / "plain"
        begun = time.perf_counter()
        with open(path, "wb") as file:
            file.write(images.data)
            file.write(labels.data)
            file.flush()
            os.fsync(file.fileno())
        taken = time.perf_counter() - begun
        path.unlink()
        return taken

    return write


def beton(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    write_beton(folder / "train.beton", images, labels)


def save(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)


def hf_datasets(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    HF().write(images, labels, folder)


SIDES = {"fastmnist.write_beton": beton, "np.save": save, HF.title: hf_datasets}


@pytest.mark.benchmark(group="compile")
@pytest.mark.parametrize("side", SIDES)
def test_compile(side, data, arrays, folder, plain_write, measure):
    if side == HF.title and (lacking := missing(HF)):
        pytest.skip(lacking)
    folders: list[Path] = []

    def write() -> None:
        SIDES[side](folders[0], *arrays)
        sync(folders[0])

    def new_folder() -> None:
        folders[:] = [folder()]

    measure(write, setup=new_folder, images=data.count, limit=plain_write)


@contextmanager
def ffcv_writer(*arguments: object):
    """path -> seconds: FFCV's writer, in one process that ends with the block."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", FFCV, *map(str, arguments), str(TIMEOUT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )

        def write(path: Path) -> float:
            process.stdin.write(f"{path}\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                errors.seek(0)
                pytest.fail(f"FFCV's writer ended: {errors.read().strip()[-400:]}", pytrace=False)
            return float(line)

        try:
            yield write
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.mark.ffcv
@pytest.mark.benchmark(group="compile")
@pytest.mark.parametrize("side", ["FFCV, DatasetWriter"])
def test_compile_with_ffcv(side, data, arrays, folder, plain_write, measure_turns, tmp_path_factory):
    """With as many processes as there are cores, its default."""
    saved = tmp_path_factory.mktemp("arrays")
    save(saved, *arrays)
    with ffcv_writer(saved / "images.npy", saved / "labels.npy") as write:
        measure_turns(lambda: (write(folder() / "train.beton"), plain_write(data.count)), images=data.count)
