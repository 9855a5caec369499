"""What the notebook shows beyond a run's own pictures: the file's layout, calibration, live curves, an interval."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from fastmnist.beton.reader import Beton
from fastmnist.report.calibration import EDGES, calibration, plot_calibration
from fastmnist.report.file_chart import parts, plot_layout
from fastmnist.report.live import LiveCurves
from fastmnist.training.evaluate import accuracy_interval


def test_the_parts_are_the_whole_file(tmp_path: Path, write_small_beton) -> None:
    path = tmp_path / "a.beton"
    write_small_beton(path, 100)
    with Beton(path) as file:
        some = parts(file)
        assert [part.name for part in some] == ["header", "fields", "metadata", "integrity", "zeros", "pages", "table"]
        assert some[0].start == 0
        for before, part in zip(some, [*some[1:], None], strict=True):
            assert before.start + before.size == (part.start if part else path.stat().st_size)
        assert not file.data[some[4].start : some[4].start + some[4].size].any()
        assert file.offsets.min() == some[5].start
        plot_layout(file, tmp_path / "layout.png")
    assert matplotlib.image.imread(tmp_path / "layout.png").shape[1] == 1500


def test_calibration_counts_as_by_hand(tmp_path: Path) -> None:
    probabilities = np.array([[0.6, 0.4], [0.35, 0.65], [0.96, 0.04], [0.97, 0.03], [1.0, 0.0]])
    labels = np.array([0, 0, 0, 0, 1])
    found = plot_calibration(probabilities, labels, tmp_path / "c.png")
    np.testing.assert_allclose(found.sure, [0.625, 0.965, 1.0])
    np.testing.assert_allclose(found.right, [0.5, 1.0, 0.0])
    assert found.answers.tolist() == [2, 2, 1]
    assert EDGES[found.bins].tolist() == [0.5, 0.95, 0.999]
    assert found.error == pytest.approx((2 * 0.125 + 2 * 0.035 + 1) / 5)
    assert (tmp_path / "c.png").exists()


def test_who_says_the_truth_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.5, 1, 200_000)
    labels = (rng.random(len(sure)) > sure).astype(np.int64)
    probabilities = np.stack([sure, 1 - sure], 1)
    assert calibration(probabilities, labels).error < 0.01
    assert calibration(probabilities, 1 - labels).error > 0.4


def test_the_interval_of_an_accuracy() -> None:
    """Wilson's formula, written out."""
    right, count, z = 991, 1000, 1.959963984540054
    share = right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    assert accuracy_interval(right, count) == pytest.approx((middle - half, middle + half))
    assert accuracy_interval(10, 10)[1] == pytest.approx(1)


def test_curves_are_drawn_while_it_trains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[bytes] = []

    class Handle:
        def update(self, image) -> None:
            shown.append(image.data)

    def display(image, display_id: bool) -> Handle:
        shown.append(image.data)
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    step = {"kind": "step", "epoch": 0, "learning_rate": 0.1, "images_per_second": 9.0, "seconds": 1.0}
    live = LiveCurves()
    with live.training(3, 0, 16):
        for number in range(1, 4):
            live.show(step | {"step": number, "loss": 1 / number, "accuracy": 0.5}, 1)
    assert len(shown) == 2  # the first record at once, all of them at the end
    assert all(picture.startswith(b"\x89PNG") for picture in shown)
    assert shown[0] != shown[1]
