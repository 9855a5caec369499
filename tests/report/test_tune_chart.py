"""The chart of a tuner's search: its finding, its ranking, every candidate accounted for."""

import os
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastmnist.report import tune_chart
from fastmnist.report.tune_chart import finding, plot_search, rank
from fastmnist.system.statistics import summarise

STATUSES = ["best", "tie", "slower", "dropped", "failed", "too much memory", "not measured"]


def candidate(name, rate, status="slower", rounds=8, chosen=False, reason="", seed=0):
    """Values around a rate: three in the first round, then one in each; the defaults' rate is 714 in all."""
    values = [float(rate * part) for part in np.random.default_rng(seed).normal(1, 0.02, 3 + rounds)]
    line = {"name": name, "rounds": [values[:3], *([value] for value in values[3:])], "status": status}
    ratios = [[value / 714 for value in round_] for round_ in line["rounds"]]
    over = summarise([value / 714 for value in values[3:] or values]).to_dict()
    line |= {"reason": reason, "chosen": chosen, "ratios": ratios, "over_default": over}
    return line | summarise(values[3:] or values).to_dict()


def unmeasured(name, status="not measured", reason=""):
    return {"name": name, "rounds": [], "status": status, "reason": reason, "chosen": False}


def search_of(*candidates, default="defaults"):
    return {
        "what": "training steps of resnet18, batch 128",
        "unit": "images/s",
        "candidates": list(candidates),
        "default": default,
        "budget_seconds": 30,
        "seconds": 28.4,
        "hardware": {"processor": "AMD EPYC", "cores": 2},
        "date": "2026-11-23T10:00:00",
    }


BEST, SLOWER = candidate("threads 2", 935, "best", chosen=True), candidate("prefetch 8", 880)
DEFAULTS, DROPPED = candidate("defaults", 714, "dropped"), candidate("threads 1", 610, "dropped", rounds=0)
TIE = candidate("prefetch 3", 930, "tie")
KEPT = candidate("defaults", 930, "tie", chosen=True)
FAILURES = [
    unmeasured("placement resident", "failed", "RuntimeError: CUDA out of memory"),
    unmeasured("placement stream", "too much memory", "2,048 MiB, allowed are 1,024"),
    *(unmeasured(f"prefetch {number}", reason="out of budget") for number in range(20)),
]
USUAL = search_of(DROPPED, DEFAULTS, SLOWER, *FAILURES, BEST)


def test_usual_picture(tmp_path, texts_of):
    plot_search(USUAL, tmp_path / "search.png")
    with Image.open(tmp_path / "search.png") as picture:
        assert picture.size[0] == 1500
    shown = texts_of(tune_chart, lambda: plot_search(USUAL, None))
    order = ["threads 2", "prefetch 8", "defaults", "threads 1"]
    assert [text for text in shown if text in order] == order
    assert {"best, chosen", "slower", "dropped", f"{BEST['over_default']['median']:.2f}"} <= set(shown)
    (origin,) = [text for text in shown if "AMD EPYC" in text]
    facts = ("training steps of resnet18, batch 128", "2 cores", "2026-11-23", "28 s", "30 s")
    assert [fact for fact in facts if fact not in origin] == []
    for name, reason in (
        ("placement resident", "CUDA out of memory"),
        ("placement stream", "2,048 MiB"),
        ("prefetch 0; prefetch 1;", "out of budget"),
        ("12 more", "out of budget"),
    ):
        assert any(name in text and reason in text for text in shown)


@pytest.mark.parametrize(
    ("candidates", "facts", "absent"),
    [
        ([BEST, DEFAULTS, DROPPED], ["threads 2", "1.3 times"], ["tie"]),
        ([BEST, SLOWER], ["threads 2"], ["times", "tie"]),
        ([BEST, *FAILURES], ["threads 2", "only"], []),
        ([BEST | {"chosen": False}, KEPT], ["defaults are kept", "2 of 2", "tie"], ["threads"]),
        ([BEST | {"chosen": False}, KEPT, SLOWER], ["defaults are kept", "2 of 3", "tie"], ["threads"]),
        ([BEST, TIE], ["threads 2", "simplest of 2"], ["times"]),
        ([BEST, TIE, DEFAULTS], ["threads 2", "simplest of 2", "1.3 times"], []),
        ([candidate("defaults", 950, "best", chosen=True), SLOWER], ["defaults are kept"], ["tie"]),
    ],
)
def test_title_says_the_finding(texts_of, candidates, facts, absent):
    search = search_of(*candidates)
    title = finding(search)
    assert [fact for fact in facts if fact not in title] == []
    assert [fact for fact in absent if fact in title] == []
    assert title in texts_of(tune_chart, lambda: plot_search(search, None))


def test_the_default_has_its_name():
    assert "1.3 times" in finding(search_of(BEST, DROPPED, default="threads 1"))  # as measured in the same rounds


def test_every_value_is_a_dot_and_the_best_interval_is_shaded(monkeypatch):
    from matplotlib.patches import Rectangle

    def keep(figure, path, title=None):
        (shade,) = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
        best = BEST["over_default"]
        assert shade.get_x() == best["low"]
        assert shade.get_width() == pytest.approx(best["high"] - best["low"])
        assert shade.get_height() == 1
        points = sum(len(dots.get_offsets()) for dots in figure.axes[0].collections)
        assert points == sum(len(values) for line in (BEST, SLOWER, DEFAULTS, DROPPED) for values in line["rounds"])
        assert figure.axes[0].get_xlim()[0] == 0

    monkeypatch.setattr(tune_chart, "save", keep)
    plot_search(USUAL, None)


def test_ranked_by_outcome_then_median():
    assert rank([DROPPED, KEPT, unmeasured("x"), SLOWER, BEST, candidate("a", 0.0)]) == [BEST, KEPT, SLOWER, DROPPED]


def test_many_candidates(texts_of):
    lines = [candidate(f"workers {number}", 900 / 1.02**number, "dropped", seed=number) for number in range(50)]
    search = search_of(BEST, *lines, candidate("defaults", 100, "dropped"))
    shown = texts_of(tune_chart, lambda: plot_search(search, None))
    assert sum(text.startswith("workers") for text in shown) == tune_chart.MOST_LINES - 2
    assert "defaults" in shown
    assert any(text.startswith("22 ") for text in shown)


def test_nothing_measured_is_an_error(tmp_path):
    for candidates in ([], FAILURES, [candidate("a", 0.0)]):
        with pytest.raises(ValueError, match="candidates"):
            plot_search(search_of(*candidates), tmp_path / "x.png")
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
def test_any_search(tmp_path_factory, texts_of, data):
    value = st.floats(1, 1e9) | st.sampled_from([0.0, 1.0, 1e9])
    name = st.sampled_from(["W" * 90, "threads 2, " * 12, "$x_1$ あ\n<b>&", "\x00", ""]) | st.text(max_size=60)
    lines = []
    for _ in range(data.draw(st.integers(0, 12))):
        line = unmeasured(data.draw(name), data.draw(st.sampled_from(STATUSES)), data.draw(st.text(max_size=200)))
        line |= {
            "rounds": data.draw(st.lists(st.lists(value, max_size=3), max_size=4)),
            "chosen": data.draw(st.booleans()),
        }
        values = [value for values in line["rounds"] for value in values]
        if values:
            line |= summarise(values).to_dict() | {
                "ratios": line["rounds"],
                "over_default": summarise(values).to_dict(),
            }
        lines.append(line)
    last = data.draw(st.floats(1, 1e9))
    measured = summarise([last]).to_dict() | {"ratios": [[last]], "over_default": summarise([last]).to_dict()}
    search = search_of({**unmeasured("last", "best"), "rounds": [[last]], **measured}, *lines)
    folder = tmp_path_factory.mktemp("any")
    plot_search(search, folder / "x.svg")
    ElementTree.parse(folder / "x.svg")
    texts_of(tune_chart, lambda: plot_search(search, None))
