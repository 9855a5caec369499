"""The pictures of a run: written whole, the same each time, and for every history that can occur."""

import os
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastmnist.errors import FastmnistError
from fastmnist.report import curves, plots
from fastmnist.report.curves import plot_curves
from fastmnist.report.plots import plot_confusion, plot_predictions

DIGITS = [str(number) for number in range(10)]


def step(number, **values):
    record = {"kind": "step", "step": number, "epoch": number // 10, "loss": 2 / number, "accuracy": 0.9}
    return record | {"learning_rate": 0.01, "images_per_second": 900.0, "seconds": number * 0.3} | values


def epoch(number, **values):
    record = {"kind": "epoch", "epoch": number, "step": 10 * (number + 1), "train_loss": 0.1, "seconds": 30.4}
    record |= {"train_accuracy": 0.97, "val_loss": 0.08, "val_accuracy": 0.981, "images_per_second": 950.0}
    return record | values


HISTORIES = {
    "usual": [step(1), step(5), step(10), epoch(0), step(15), step(20), epoch(1)],
    "interrupted": [step(1), step(2)],
    "one step": [step(1)],
    "one epoch": [epoch(0)],
    "no validation": [step(5), epoch(0, val_loss=None, val_accuracy=None)],
    "absent keys": [{"kind": "step", "step": 3}, {"kind": "epoch", "epoch": 0, "step": 4}],
    "all right": [step(1, loss=0.0, accuracy=1.0), epoch(0, train_accuracy=1.0, val_accuracy=1.0)],
    "diverged": [step(1), step(2, loss=float("nan")), step(3, loss=float("inf"))],
    "many epochs": [epoch(number) for number in range(40)],
    "idle": [step(1, learning_rate=0.0, images_per_second=0.0)],
}


def texts(monkeypatch, draw):
    """All text of the figure that `draw` would have saved."""
    figures = []
    for module in (curves, plots):
        monkeypatch.setattr(module, "save", lambda figure, path: figures.append(figure))
    draw()
    from matplotlib.text import Text

    return [text.get_text() for text in figures[0].findobj(Text) if text.get_text()]


@pytest.mark.parametrize("name", HISTORIES)
def test_curves_of_every_history(tmp_path, name):
    path = tmp_path / "curves.png"
    plot_curves(HISTORIES[name], path)
    with Image.open(path) as picture:
        assert picture.size == (1650, 1200)
        assert "Software" not in picture.info
    assert os.listdir(tmp_path) == ["curves.png"]


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("usual", "Validation accuracy 98.1 % after 2 epochs (30 s)"),
        ("one epoch", "Validation accuracy 98.1 % after 1 epoch (30 s)"),
        ("no validation", "Training accuracy 97.0 % after 1 epoch (30 s)"),
        ("interrupted", "Training accuracy 90.0 % after 2 steps (0.6 s)"),
        ("absent keys", "Training after 1 epoch"),
        ("all right", "Validation accuracy 100 % after 1 epoch (30 s)"),
    ],
)
def test_curves_title_says_the_finding(tmp_path, monkeypatch, name, title):
    assert title in texts(monkeypatch, lambda: plot_curves(HISTORIES[name], tmp_path / "x.png"))


def test_curves_name_their_lines(tmp_path, monkeypatch):
    shown = texts(monkeypatch, lambda: plot_curves(HISTORIES["usual"], tmp_path / "x.png"))
    assert {"training 0.1", "validation 0.08", "training 3 %", "validation 1.9 %"} <= set(shown)
    shown = texts(monkeypatch, lambda: plot_curves(HISTORIES["no validation"], tmp_path / "x.png"))
    assert not any(text.startswith("validation") for text in shown)


def test_no_records_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no records"):
        plot_curves([], tmp_path / "curves.png")
    assert not os.listdir(tmp_path)


@settings(max_examples=3)
@given(data=st.data())
def test_curves_of_odd_values(tmp_path_factory, data):
    value = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True, width=32))
    share = st.one_of(st.none(), st.floats(0, 1))
    records = [
        step(
            number + 1,
            loss=data.draw(value),
            accuracy=data.draw(share),
            learning_rate=data.draw(st.floats(0, 1)),
            images_per_second=data.draw(st.floats(0, 1e9)),
        )
        for number in range(data.draw(st.integers(1, 4)))
    ]
    path = tmp_path_factory.mktemp("odd") / "curves.png"
    plot_curves(records, path)
    assert path.stat().st_size > 1000


def matrix(count, seed=0):
    random = np.random.default_rng(seed)
    return np.diag(random.integers(50, 2000, count)) + random.poisson(0.2, (count, count))


@pytest.mark.parametrize("count", [1, 2, 10, 62])
def test_confusion_sizes(tmp_path, count):
    path = tmp_path / "confusion.png"
    plot_confusion(matrix(count), [f"c{number}" for number in range(count)], path, subject="mnist")
    with Image.open(path) as picture:
        assert min(picture.size) > 300
    assert os.listdir(tmp_path) == ["confusion.png"]


def test_confusion_title_says_the_finding(tmp_path, monkeypatch):
    counts = np.diag(np.full(10, 1000))
    counts[4, 9], counts[7, 1] = 12, 3
    shown = texts(
        monkeypatch,
        lambda: plot_confusion(counts, DIGITS, tmp_path / "x.png", subject="mnist, 10,015 images"),
    )
    assert "10,000 of 10,015 right (99.85 %)" in shown
    assert "Most frequent mistake: 4 read as 9, 12 times" in shown
    assert any("mnist, 10,015 images" in text for text in shown)
    assert {"1000", "12", "3"} <= set(shown)
    assert "98.8 %" in shown  # of class 4


@pytest.mark.parametrize(
    ("counts", "title"),
    [
        (np.diag([5, 5]), "10 of 10 right (100 %)"),
        (np.zeros((2, 2), dtype=np.int64), "Nothing was evaluated"),
        (np.array([[10**6, 1], [0, 10**6]]), "2,000,000 of 2,000,001 right (99.99 %)"),
    ],
)
def test_confusion_extremes(tmp_path, monkeypatch, counts, title):
    draw = lambda: plot_confusion(counts, ["a", "b"], tmp_path / "x.png", subject="s")  # noqa: E731
    assert title in texts(monkeypatch, draw)


def test_confusion_mistakes_are_coloured_and_the_diagonal_is_not(tmp_path):
    counts = np.diag(np.full(3, 900))
    counts[0, 2] = 2
    plot_confusion(counts, ["a", "b", "c"], tmp_path / "x.png", subject="s")
    with Image.open(tmp_path / "x.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    coloured = pixels.max(axis=2) - pixels.min(axis=2) > 60
    cell = (0.62 * 150) ** 2
    assert 0.6 * cell < coloured.sum() < 1.1 * cell


def test_confusion_shape_is_checked(tmp_path):
    with pytest.raises(ValueError, match="does not fit"):
        plot_confusion(np.zeros((3, 3), dtype=np.int64), ["a", "b"], tmp_path / "x.png", subject="s")


def case(count, classes, right, seed=0, shape=(28, 28)):
    """Images, labels, probabilities: the first `right` answers are right."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, count)
    answers = np.where(np.arange(count) < right, labels, (labels + 1) % classes)
    probabilities = random.random((count, classes), dtype=np.float32) * 0.1
    probabilities[np.arange(count), answers] += random.uniform(0.5, 1, count).astype(np.float32)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return random.integers(0, 256, (count, *shape), dtype=np.uint8), labels, probabilities


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (32, 32, 3), (12, 30), (8, 8, 4)])
def test_predictions_shapes(tmp_path, shape):
    path = tmp_path / "predictions.png"
    plot_predictions(*case(60, 10, 50, shape=shape), DIGITS, path)
    assert os.listdir(tmp_path) == ["predictions.png"]


@pytest.mark.parametrize(
    ("count", "right", "wrong_tiles", "right_tiles"),
    [(100, 100, 0, 16), (100, 0, 24, 0), (3, 2, 1, 2), (1, 1, 0, 1), (1, 0, 1, 0), (100, 70, 24, 16)],
)
def test_predictions_tiles(tmp_path, monkeypatch, count, right, wrong_tiles, right_tiles):
    images, labels, probabilities = case(count, 10, right)
    shown = texts(monkeypatch, lambda: plot_predictions(images, labels, probabilities, DIGITS, tmp_path / "x.png"))
    assert sum(text.startswith("true: ") for text in shown) == wrong_tiles + right_tiles
    pairs = list(
        zip(
            [text[6:] for text in shown if text.startswith("true: ")],
            [text[6:] for text in shown if text.startswith("read: ")],
            strict=True,
        )
    )
    assert [true != read for true, read in pairs] == [True] * wrong_tiles + [False] * right_tiles
    assert f"{count - right:,} of {count:,} images answered wrongly" in shown
    if right_tiles == 16:
        assert len({true for true, _ in pairs[wrong_tiles:]}) == 10


def test_predictions_put_the_worst_mistake_first(tmp_path, monkeypatch):
    probabilities = np.array([[0.6, 0.4], [0.97, 0.03], [0.75, 0.25], [0.9, 0.1]], dtype=np.float32)
    labels = np.array([1, 1, 1, 0])
    images = np.zeros((4, 8, 8), dtype=np.uint8)
    shown = texts(monkeypatch, lambda: plot_predictions(images, labels, probabilities, ["a", "b"], tmp_path / "x.png"))
    assert [text for text in shown if text.endswith("sure")] == [
        "97.0 % sure", "75.0 % sure", "60.0 % sure", "90.0 % sure",
    ]  # fmt: skip


def test_predictions_spread_over_many_classes():
    labels = np.repeat(np.arange(47), 5)
    chosen = plots._spread(np.arange(len(labels)), labels, 16)
    assert len(set(labels[chosen])) == 16
    assert labels[chosen][0] == 0
    assert labels[chosen][-1] == 46


@settings(max_examples=100)
@given(labels=st.lists(st.integers(0, 20), max_size=60), most=st.integers(1, 20))
def test_spread_is_as_even_as_it_can_be(labels, most):
    array = np.array(labels, dtype=np.int64)
    chosen = plots._spread(np.arange(len(array)), array, most)
    assert len(chosen) == len(set(chosen.tolist())) == min(most, len(labels))
    assert len(set(array[chosen].tolist())) == min(most, len(set(labels)))


def test_predictions_that_do_not_fit_are_refused(tmp_path):
    images, labels, probabilities = case(5, 10, 5)
    for bad in ((images[:4], labels, probabilities), (images, labels[:4], probabilities), (images[:0],) * 3):
        with pytest.raises(ValueError, match="do not fit"):
            plot_predictions(*bad, DIGITS, tmp_path / "x.png")


@pytest.mark.parametrize("name", ["$", r"$\frac$", "<script>", "あ", "a\nb", "", "x" * 200, "\x00", "🙂", "_^{"])
def test_any_class_name_can_be_drawn(tmp_path, name):
    names = [name, "other"]
    plot_confusion(np.array([[5, 1], [2, 9]]), names, tmp_path / "confusion.png", subject=name)
    plot_predictions(*case(4, 2, 2), names, tmp_path / "predictions.png")
    assert len(os.listdir(tmp_path)) == 2


def draw_all(folder):
    plot_curves(HISTORIES["usual"], folder / "a.png")
    plot_confusion(matrix(10), DIGITS, folder / "b.png", subject="mnist")
    plot_predictions(*case(60, 10, 50), DIGITS, folder / "c.png")
    return [(folder / name).read_bytes() for name in ("a.png", "b.png", "c.png")]


def test_same_input_gives_the_same_bytes_and_settings_stay(tmp_path):
    first = draw_all(tmp_path)
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 20, "savefig.dpi": 40}):
        before = dict(matplotlib.rcParams)
        assert draw_all(tmp_path) == first
        assert dict(matplotlib.rcParams) == before


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(FastmnistError, match="No space left"):
            plot_curves(HISTORIES["usual"], path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["curves.png"]


def test_matplotlib_is_loaded_by_drawing_alone_and_pyplot_never(tmp_path):
    code = (
        "import sys, pathlib; import fastmnist.report.html; from fastmnist.report.curves import plot_curves\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plot_curves([{'kind': 'step', 'step': 1, 'loss': 1.0}], pathlib.Path(sys.argv[1]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.png")], check=True, timeout=60)
