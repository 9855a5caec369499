"""The expanded training set: its images against scipy, its file whole or absent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import tracemalloc
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import BSpline
from scipy.ndimage import map_coordinates

from fastmnist.beton import writer
from fastmnist.beton.layout import PAGE_SIZE
from fastmnist.beton.reader import Beton
from fastmnist.cli.main import main
from fastmnist.errors import FastmnistError
from fastmnist.prepare import deform
from fastmnist.prepare.deform import Deformer
from fastmnist.prepare.expand import write_expanded

NAMES = tuple("0123456789")
COUNT, FACTOR = 30, 300  # make four pages, the last one not full
PER_PAGE = PAGE_SIZE // 784


@pytest.fixture(scope="module")
def source(scratch, write_small_beton):
    """A compiled file of 30 images, open."""
    path = scratch() / "numbers-train.beton"
    write_small_beton(path, COUNT, class_names=NAMES, dataset="numbers", split="train", source="memory")
    with Beton(path) as file:
        yield file


@pytest.fixture(scope="module")
def whole(source, scratch) -> bytes:
    """The expanded file's bytes."""
    path = scratch() / "whole.beton"
    write_expanded(path, source, FACTOR)
    return path.read_bytes()


# Images


def reference(image: np.ndarray, seed: int, index: int) -> np.ndarray:
    """Image (H, W, C) deformed as sample `index`, float64: plain numpy and scipy, from the random bits on."""
    height, width, channels = image.shape
    stream = np.random.Philox(np.random.SeedSequence([seed, 0, deform.EXPAND_STREAM]))
    words = stream.random_raw((index + 1) * deform.WORDS)[-deform.WORDS :]
    draws = np.array([int(word) >> shift & 0xFFFF for word in words for shift in (0, 16, 32, 48)])
    signed = draws / 32767.5 - 1
    side = max(height, width)
    points = signed[: 2 * 49].reshape(2, 7, 7) * (deform.ELASTIC * side)
    turn, along, across, shear, shift_x, shift_y = signed[2 * 49 : 2 * 49 + 6]

    knots = np.arange(-3, 8).astype(float)  # of four cells
    down, right = (
        BSpline.design_matrix(np.linspace(0, 4, n) if n > 1 else np.zeros(1), knots, 3).toarray()
        for n in (height, width)
    )
    dx, dy = down @ points[0] @ right.T, down @ points[1] @ right.T

    angle = 2 * np.arctan(turn * float(deform.HALF_ANGLE))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    stretch = np.array([[1 + along * deform.SCALE, shear * deform.SHEAR], [0, 1 + across * deform.SCALE]])
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    shift = np.array([shift_x, shift_y]) * deform.SHIFT * side
    y, x = np.mgrid[:height, :width]
    places = np.einsum("ij,jhw->ihw", rotation @ stretch, np.stack([x, y]) - centre[:, None, None])
    places += (centre + shift)[:, None, None]
    where = [places[1] + dy, places[0] + dx]
    planes = [
        map_coordinates(image[..., c].astype(float), where, order=1, mode="grid-constant") for c in range(channels)
    ]
    return np.stack(planes, axis=-1)


SHAPES = [(28, 28, 1), (28, 28, 3), (9, 7, 1), (5, 40, 2), (33, 4, 1), (2, 1, 1), (1, 1, 1)]


@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 2**63 - 1), index=st.integers(0, 5000))
def test_images_equal_scipys(shape, seed, index):
    random = np.random.default_rng(seed)
    count, size = 7, int(np.prod(shape))
    data = random.integers(0, 256, count * size, np.uint8)
    out = np.zeros((1, size), np.uint8)
    Deformer(data, np.arange(count) * size, shape, seed)(index, out)
    expected = reference(data.reshape(count, *shape)[index % count], seed, index)
    assert np.abs(out.reshape(shape) - expected).max() <= 1


@given(start=st.integers(0, 10**8), cuts=st.lists(st.integers(0, 700), max_size=4), seed=st.integers(0, 100))
def test_images_do_not_depend_on_the_batch(source, start, cuts, seed):
    deformer = Deformer(source.data, source.offsets, source.image_shape, seed)
    at_once, in_parts = np.zeros((700, 784), np.uint8), np.zeros((700, 784), np.uint8)
    deformer(start, at_once)
    for low, high in pairwise([0, *sorted(cuts), 700]):
        deformer(start + low, in_parts[low:high])
    np.testing.assert_array_equal(in_parts, at_once)


def test_every_seed_and_index_has_a_deformation_of_its_own(source):
    one_image = source.offsets[:1]
    out = np.zeros((2, 200, 784), np.uint8)
    for seed in (0, 1):
        Deformer(source.data, one_image, source.image_shape, seed)(0, out[seed])
    assert len(np.unique(out.reshape(400, 784), axis=0)) == 400


def test_images_change_with_the_version_alone():
    """When this fails, raise VERSION: files that were written before are then replaced."""
    images = (np.arange(50 * 784) * 2654435761 >> 13).astype(np.uint8)
    out = np.zeros((500, 784), np.uint8)
    Deformer(images, np.arange(50) * 784, (28, 28, 1), 0)(0, out)
    assert (deform.VERSION, f"{zlib.crc32(out.tobytes()):08x}") == (1, "df66e2c5")


@pytest.mark.parametrize("channels", [1, 3])
def test_sums_are_exact(channels):
    values = np.random.default_rng(0).integers(0, 256, channels * 100_001, np.uint8)
    values[: 1 << 16] = 255
    total, squares = np.zeros(channels, np.int64), np.zeros(channels, np.int64)
    deform.add_up(values, channels, total, squares)
    wide = values.reshape(-1, channels).astype(np.int64)
    np.testing.assert_array_equal(total, wide.sum(0))
    np.testing.assert_array_equal(squares, (wide**2).sum(0))


# The file


def test_the_file_holds_images_labels_moments_and_texts(source, whole, tmp_path):
    path = tmp_path / "whole.beton"
    path.write_bytes(whole)
    with Beton(path, verify="full") as file:
        np.testing.assert_array_equal(file.labels, np.tile(source.labels, FACTOR))
        images = file.images(np.arange(len(file)))
        expected = np.zeros((COUNT * FACTOR, 784), np.uint8)
        Deformer(source.data, source.offsets, source.image_shape, 0)(0, expected)
        np.testing.assert_array_equal(images.reshape(-1, 784), expected)
        mean, std = file.moments
        np.testing.assert_allclose([*mean, *std], [(images / 255).mean(), (images / 255).std()], rtol=1e-12)
        assert file.class_names == NAMES
        assert (file.integrity.dataset, file.integrity.split) == ("numbers", f"train-x{FACTOR}")
        assert file.integrity.source == "memory; 300 times, seed 0, deformation 1"


@pytest.mark.parametrize(("threads", "streamed"), [(1, writer.STREAMED), (2, 0), (5, writer.STREAMED)])
def test_neither_threads_nor_streaming_change_the_file(source, whole, tmp_path, monkeypatch, threads, streamed):
    monkeypatch.setattr(writer, "STREAMED", streamed)
    write_expanded(tmp_path / "a.beton", source, FACTOR, threads=threads)
    assert (tmp_path / "a.beton").read_bytes() == whole


def test_images_of_three_channels(write_small_beton, tmp_path):
    write_small_beton(tmp_path / "source.beton", 11, (6, 5, 3))
    write_expanded(tmp_path / "a.beton", Beton(tmp_path / "source.beton"), 4)
    with Beton(tmp_path / "a.beton", verify="full") as file:
        images = file.images(np.arange(44))
        assert images.shape == (44, 6, 5, 3)
        np.testing.assert_allclose(file.moments[0], images.mean((0, 1, 2)) / 255, rtol=1e-12)


def test_progress_counts_to_the_end(source, tmp_path):
    seen = []
    write_expanded(tmp_path / "a.beton", source, FACTOR, progress=lambda *step: seen.append(step))
    total = COUNT * FACTOR
    assert seen == [(done, total) for done in (PER_PAGE, 2 * PER_PAGE, 3 * PER_PAGE, total)]


def test_memory_does_not_grow_with_the_file(write_small_beton, tmp_path):
    """The tables of these two million samples have 80 MB, in the file."""
    write_small_beton(tmp_path / "source.beton", 1000, (1, 1))
    with Beton(tmp_path / "source.beton") as source:
        write_expanded(tmp_path / "warm.beton", source, 1, threads=2)  # numba's own memory
        tracemalloc.start()
        write_expanded(tmp_path / "a.beton", source, 2000, threads=2)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (tmp_path / "a.beton").stat().st_size > 80e6
    assert peak < 25e6


# Interrupted


def test_a_killed_writer_leaves_no_trace_in_the_next_ones_file(source, whole, tmp_path):
    path = tmp_path / "a.beton"
    script = """
        import os, signal, sys
        from pathlib import Path
        from fastmnist.beton.reader import Beton
        from fastmnist.prepare.expand import write_expanded
        kill = lambda done, count: os.kill(os.getpid(), signal.SIGKILL)
        write_expanded(Path(sys.argv[1]), Beton(sys.argv[2]), int(sys.argv[3]), progress=kill)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), path, source.path, str(FACTOR)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    [orphan] = tmp_path.iterdir()
    assert orphan.stat().st_size > 0
    write_expanded(path, source, FACTOR)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == whole


def test_a_disk_that_is_too_small_is_named_before_a_page_is_made(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1_000_000))
    with pytest.raises(FastmnistError, match=r"a\.beton: .*1 MB .*11 MB"):
        write_expanded(tmp_path / "a.beton", source, FACTOR, progress=lambda *step: pytest.fail("a page was written"))
    assert not list(tmp_path.iterdir())


# From the command line


@pytest.fixture
def data(tmp_path, write_dataset) -> Path:
    """A folder with the four files of a tiny mnist."""
    write_dataset(tmp_path / "data", train=COUNT, test=20)
    return tmp_path / "data"


@pytest.mark.parametrize(
    "flags",
    [
        ["--expand", "0"],
        ["--expand", "-1"],
        ["--expand", "1.5"],
        ["--expand", "many"],
        ["--expand"],
        ["--expand", "2", "--seed", "-1"],
        ["--expand", "2", "--seed", str(2**63)],
    ],
)
def test_wrong_usage(data, tmp_path, capsys, flags):
    assert main(["compile", "--data-dir", str(data), "--output", str(tmp_path / "out"), *flags]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("fastmnist: ")
    assert ("--seed" if "--seed" in flags else "--expand") in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("factor", [10**9, 10**40])
def test_a_factor_beyond_every_disk(data, tmp_path, capsys, factor):
    out = tmp_path / "out"
    assert main(["compile", "--data-dir", str(data), "--output", str(out), "--expand", str(factor)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert f"mnist-train-x{factor}.beton" in line
    assert "MB" in line
    assert {path.name for path in out.iterdir()} == {"mnist-train.beton", "mnist-test.beton"}


def test_ctrl_c_ends_the_command_and_the_next_one_removes_what_earlier_versions_left(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    command = ["compile", "--data-dir", str(data), "--output", str(out), "--expand", str(FACTOR)]

    def press(self, path, done, total):
        if path.name == "mnist-train-x300.beton" and done > PER_PAGE:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastmnist.system.progress.Reporter.writing", press)
        assert main(command) == 130
    usual = {"mnist-train.beton", "mnist-test.beton"}
    assert {path.name for path in out.iterdir()} == usual
    for suffix in ("partial", "journal"):
        (out / f"mnist-train-x300.beton.{suffix}").write_bytes(b"half")
    assert main(command) == 0
    assert {path.name for path in out.iterdir()} == usual | {"mnist-train-x300.beton"}


def compiled(data: Path, out: Path, *flags: object) -> tuple[str, int]:
    """(status, inode) of the expanded file after `fastmnist compile`, by its JSON."""
    report = out.parent / "report.json"
    command = ["compile", "--data-dir", data, "--output", out, "--json", report, *flags]
    assert main([str(word) for word in command]) == 0
    [*usual, file] = json.loads(report.read_text())["files"]
    assert [entry["split"] for entry in usual] == ["train", "test"]
    path = Path(file["path"])
    assert path == out / f"mnist-{file['split']}.beton"
    with Beton(path, verify="full") as opened:
        assert len(opened) == file["samples"]
    return file["status"], path.stat().st_ino


def test_a_current_file_is_left_alone_and_another_replaced(data, tmp_path, write_dataset):
    out = tmp_path / "out"
    status, first = compiled(data, out, "--expand", 2)
    assert status == "written"
    assert compiled(data, out, "--expand", 2) == ("current", first)
    assert compiled(data, out, "--expand", 3)[0] == "written"
    assert compiled(data, out, "--expand", 2) == ("current", first)
    status, second = compiled(data, out, "--expand", 2, "--seed", 1)
    assert status == "replaced: its source changed"
    assert second != first
    write_dataset(data, train=COUNT, test=20, seed=7)
    assert compiled(data, out, "--expand", 2, "--seed", 1)[0] == "replaced: its source changed"
    os.truncate(out / "mnist-train-x2.beton", 3000)
    assert compiled(data, out, "--expand", 2, "--seed", 1)[0] == "replaced: it was damaged"
