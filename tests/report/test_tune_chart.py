"""The picture of a search: its finding, its ranking, every candidate accounted for."""

import os
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image

from fastmnist.report import tune_chart as search
from fastmnist.report.tune_chart import finding, plot_search, rank
from fastmnist.system.statistics import summarise

STATUSES = ["best", "tie", "slower", "dropped", "failed", "too much memory", "not measured"]


def candidate(name, rate, status="slower", rounds=8, chosen=False, reason="", seed=0):
    """Values around a rate: three in the first round, then one in each."""
    noise = np.random.default_rng(seed).normal(1, 0.02, 3 + rounds)
    values = [float(rate * part) for part in noise]
    found = {"name": name, "rounds": [values[:3], *([value] for value in values[3:])], "status": status}
    return found | {"reason": reason, "chosen": chosen, **summarise(values[3:] or values).to_dict()}


def unmeasured(name, status="not measured", reason=""):
    return {"name": name, "rounds": [], "status": status, "reason": reason, "chosen": False}


def found_by(*candidates, **more):
    found = {"unit": "images/s", "candidates": list(candidates), "budget_seconds": 30, "seconds": 28.4, **more}
    found["what"] = "training steps of resnet18, batch 128"
    return found | {"hardware": {"processor": "AMD EPYC", "cores": 2}, "date": "2026-11-23T10:00:00"}


BEST, SLOWER = candidate("threads 2", 935, "best", chosen=True), candidate("prefetch 8", 880)
DEFAULTS, DROPPED = candidate("defaults", 714, "dropped"), candidate("threads 1", 610, "dropped", rounds=0)
FAILURES = [
    unmeasured("placement resident", "failed", "RuntimeError: CUDA out of memory"),
    unmeasured("placement stream", "too much memory", "2,048 MiB, allowed are 1,024"),
    unmeasured("threads 1, prefetch 8", "dropped", "threads 1 alone is slower"),
    *(unmeasured(f"prefetch {number}", reason="out of budget") for number in range(20)),
]
USUAL = found_by(DROPPED, DEFAULTS, SLOWER, *FAILURES, BEST)


def texts(monkeypatch, found):
    """All text of the picture, none of which overlaps another or leaves it."""
    shown = []

    def keep(figure, path, title=None):
        figure.set_dpi(150)  # as it is saved: letters have whole pixels
        figure.canvas.draw()
        axes = figure.axes[0]
        low, high = axes.get_xlim()
        hidden = {tick.label1 for tick in axes.xaxis.get_major_ticks() if not low <= tick.get_loc() <= high}
        seen = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in hidden]
        shown.extend(text.get_text() for text in seen)
        places = [text.get_window_extent() for text in seen]
        for at, one in enumerate(places):
            assert one.x0 >= 0, seen[at]
            assert one.y0 >= 0, seen[at]
            assert one.x1 <= figure.bbox.x1, seen[at]
            for other in places[:at]:
                across = min(one.x1, other.x1) - max(one.x0, other.x0)
                assert across <= 1 or min(one.y1, other.y1) - max(one.y0, other.y0) <= 1, seen[at]

    with monkeypatch.context() as patch:
        patch.setattr(search, "save", keep)
        plot_search(found, None)
    return shown


def test_usual_picture(tmp_path, monkeypatch):
    plot_search(USUAL, tmp_path / "search.png")
    with Image.open(tmp_path / "search.png") as picture:
        assert picture.size[0] == 1500
    shown = texts(monkeypatch, USUAL)
    names = [text for text in shown if text in ("threads 2", "prefetch 8", "defaults", "threads 1")]
    assert names == ["threads 2", "prefetch 8", "defaults", "threads 1"]
    assert {"best, chosen", "slower", "dropped after round 9", "dropped after round 1"} <= set(shown)
    assert f"{BEST['median']:.0f}/s" in shown
    assert "training steps of resnet18, batch 128 · AMD EPYC, 2 cores · 2026-11-23 · 28 s of a budget of 30 s" in shown
    assert "Failed (RuntimeError: CUDA out of memory): placement resident" in shown
    assert "Too much memory (2,048 MiB, allowed are 1,024): placement stream" in shown
    assert "Left out (threads 1 alone is slower): threads 1, prefetch 8" in shown
    assert any(text.startswith("Not measured (out of budget): prefetch 0; prefetch 1;") for text in shown)
    assert any(text.endswith("and 12 more") for text in shown)


@pytest.mark.parametrize(
    ("candidates", "says"),
    [
        ([BEST, DEFAULTS, DROPPED], "threads 2: the fastest here, 1.31 times the defaults"),
        ([BEST, SLOWER], "threads 2: the fastest here"),
        ([BEST], "threads 2: the only settings that could be measured"),
        ([BEST, *FAILURES], "threads 2: the only settings that could be measured"),
        (
            [BEST | {"chosen": False}, candidate("defaults", 930, "tie", chosen=True)],
            "All settings tie: the defaults are kept",
        ),
        ([BEST, candidate("prefetch 3", 930, "tie")], "All settings tie: the simplest is kept, threads 2"),
        (
            [BEST, candidate("prefetch 3", 930, "tie"), DEFAULTS],
            "threads 2: the simplest of 2 settings that tie, 1.31 times the defaults",
        ),
        (
            [BEST | {"chosen": False}, candidate("defaults", 930, "tie", chosen=True), SLOWER],
            "The defaults are kept: 2 of 3 settings tie",
        ),
        ([candidate("defaults", 950, "best", chosen=True), SLOWER], "The defaults are the fastest here"),
    ],
)
def test_title_says_the_finding(monkeypatch, candidates, says):
    assert finding(found_by(*candidates)) == says
    assert says in texts(monkeypatch, found_by(*candidates))


def test_default_can_be_named():
    assert (
        finding(found_by(BEST, DROPPED, default="threads 1")) == "threads 2: the fastest here, 1.52 times the defaults"
    )


def test_interval_of_the_best_goes_through_the_picture(monkeypatch):
    from matplotlib.patches import Rectangle

    def keep(figure, path, title=None):
        (shade,) = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
        assert shade.get_x() == BEST["low"]
        assert shade.get_width() == pytest.approx(BEST["high"] - BEST["low"])
        assert shade.get_height() == 1
        points = sum(len(dots.get_offsets()) for dots in figure.axes[0].collections)
        assert points == sum(len(values) for line in (BEST, SLOWER, DEFAULTS, DROPPED) for values in line["rounds"])

    monkeypatch.setattr(search, "save", keep)
    plot_search(USUAL, None)


@pytest.mark.parametrize(("slowest", "scale"), [(50.0, "linear"), (40.0, "log")])
def test_a_wide_span_is_logarithmic(monkeypatch, slowest, scale):
    scales = []

    def keep(figure, path, title=None):
        axes = figure.axes[0]
        scales.append(axes.get_xscale())
        assert (axes.get_xlim()[0] == 0) == (scale == "linear")

    monkeypatch.setattr(search, "save", keep)
    best = {"name": "a", "rounds": [[900.0]], "status": "best"}
    plot_search(found_by(best, {"name": "b", "rounds": [[slowest]], "status": "slower"}), None)
    assert scales == [scale]


def test_summary_is_taken_from_the_values_where_it_is_missing():
    (line,) = rank([{"name": "a", "rounds": [[1.0], [3.0, 2.0], []], "status": "best"}])
    assert (line["median"], line["low"], line["high"]) == (2, 1, 3)


def test_many_candidates(monkeypatch):
    lines = [candidate(f"workers {number}", 900 / 1.02**number, "dropped", seed=number) for number in range(50)]
    shown = texts(monkeypatch, found_by(BEST, *lines, candidate("defaults", 100, "dropped")))
    assert sum(text.startswith("workers") for text in shown) == search.MOST_LINES - 2
    assert "defaults" in shown
    assert "22 slower ones are not drawn" in shown


def test_nothing_measured_is_an_error(tmp_path):
    for candidates in ([], FAILURES, [candidate("a", 0.0)]):
        with pytest.raises(ValueError, match="none of the candidates"):
            plot_search(found_by(*candidates), tmp_path / "x.png")
    assert not os.listdir(tmp_path)


def test_same_search_gives_the_same_bytes(tmp_path):
    for path in (tmp_path / "x.png", tmp_path / "x.svg"):
        plot_search(USUAL, path)
        first = path.read_bytes()
        with matplotlib.rc_context({"svg.hashsalt": "other", "font.size": 20, "savefig.dpi": 40}):
            plot_search(USUAL, path)
        assert path.read_bytes() == first
    assert ElementTree.parse(tmp_path / "x.svg").findtext("{http://www.w3.org/2000/svg}title") == finding(USUAL)


@settings(max_examples=4)
@given(data=st.data())
def test_any_search(tmp_path_factory, data):
    value = st.floats(1, 1e9) | st.sampled_from([0.0, 1.0, 1e9, float("nan")])
    name = st.sampled_from(["W" * 90, "threads 2, " * 12, "$x_1$ あ\n<b>&", "\x00", ""]) | st.text(max_size=60)
    lines = [
        {
            "name": data.draw(name),
            "rounds": data.draw(st.lists(st.lists(value, max_size=3), max_size=4)),
            "status": data.draw(st.sampled_from(STATUSES)),
            "reason": data.draw(st.text(max_size=200)),
            "chosen": data.draw(st.booleans()),
        }
        for _ in range(data.draw(st.integers(0, 12)))
    ]
    found = found_by({"name": "last", "rounds": [[data.draw(st.floats(1, 1e9))]], "status": "best"}, *lines)
    folder = tmp_path_factory.mktemp("any")
    plot_search(found, folder / "x.svg")
    ElementTree.parse(folder / "x.svg")
    with pytest.MonkeyPatch.context() as patch:
        texts(patch, found)
