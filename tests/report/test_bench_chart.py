"""The picture of a comparison: its finding, its order, nothing left out, and any rows that can occur."""

import os
import re
from xml.etree import ElementTree

import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastmnist.report import bench_chart as bars
from fastmnist.report.bench_chart import finding, measured, plot_bars
from fastmnist.report.style import new_figure, save, styled, text_width, wrapped
from fastmnist.system import statistics as clock

ORIGIN = {"hardware": {"processor": "AMD EPYC 7763", "cores": 2}, "versions": {}, "date": "2026-11-23T10:00:00+01:00"}


def row(name, median, kind="peer", spread=0.05, **more):
    found = {"name": name, "unit": "images/s", "kind": kind, "median": median, "n": 12, **ORIGIN}
    return found | {"low": median * (1 - spread), "high": median * (1 + spread), "settings": {"batch_size": 512}} | more


USUAL = [
    row("DataLoader, plain", 24_300, "baseline"),
    row("memory copy, bytes", 27_300_000, "limit"),
    row("memory copy, float32", 6_600_000, "limit"),
    row("fastmnist.Loader, float32", 12_600_000, "ours"),
    row("fastmnist.Loader", 23_600_000, "ours"),
    row("DataLoader, tuned", 12_600_000, "baseline"),
    row("FFCV", 2_300_000, "baseline"),
    row("tensors, index_select", 8_000_000, "baseline"),
    row("HF datasets", 300_000),
    row("WebDataset", 40_000),
    row("DataLoader, plain, 2 workers", 14_000, "baseline", spread=0.2),
    {"name": "litData", "kind": "peer", "error": "not installed: pip install litdata", **ORIGIN},
]
OURS, PLAIN, LIMIT = USUAL[4], USUAL[0], USUAL[1]
NAMES = [
    "fastmnist.Loader",
    "a loader whose name goes on and on until no line of any picture can hold all of what it says " * 2,
    "W" * 90,
    "$x_1$ あ 🙂\n<b>&",
    r"\frac{",
    "\x00",
    "",
]


def test_usual_picture(tmp_path, texts_of):
    paths = [tmp_path / "bench.png", tmp_path / "bench.svg"]
    plot_bars(USUAL, paths)
    assert sorted(os.listdir(tmp_path)) == ["bench.png", "bench.svg"]
    with Image.open(paths[0]) as picture:
        assert picture.size[0] == 1500
        assert "Software" not in picture.info
    shown = texts_of(bars, lambda: plot_bars(USUAL, [None]))
    assert {"23.6 M/s", "8 M/s", "24,300/s", "300,000/s", "10,000", "10 M"} <= set(shown)
    assert {"fastmnist", "limit: plain memory copy", "other loaders"} <= set(shown)
    assert any("litData" in text and "pip install litdata" in text for text in shown)
    (origin,) = [text for text in shown if "AMD EPYC 7763" in text]
    assert [fact for fact in ("2 cores", "2026-11-23", "512", "12", "95 %") if fact not in origin] == []


def test_svg_is_text_for_programs_and_outlines_for_eyes(tmp_path):
    plot_bars(USUAL, [tmp_path / "x.svg"])
    content = (tmp_path / "x.svg").read_text()
    root = ElementTree.fromstring(content)
    assert root.findtext("{http://www.w3.org/2000/svg}title") == finding(USUAL)
    assert not root.findall(".//{http://www.w3.org/2000/svg}text")
    comments = re.findall("<!-- (.*?) -->", content)
    assert {"fastmnist.Loader", "23.6 M/s", "memory copy, bytes"} <= set(comments)
    assert "Matplotlib v" not in content
    assert "date>" not in content


def test_the_fastest_comes_first(texts_of):
    names = [found["name"] for found in measured(USUAL)]
    assert names[:3] == ["memory copy, bytes", "fastmnist.Loader", "DataLoader, tuned"]
    assert names[-1] == "DataLoader, plain, 2 workers"
    shown = texts_of(bars, lambda: plot_bars(USUAL[::-1], [None]))
    assert [name for name in shown if name in names] == names


@pytest.mark.parametrize(
    ("rows", "facts", "absent"),
    [
        (
            [OURS | {"over_plain": {"median": 946.2, "low": 932, "high": 1038}}, PLAIN, LIMIT],
            ["fastmnist.Loader", "946 times", "plain DataLoader", "86 %"],
            ["million"],
        ),
        ([OURS, PLAIN], ["971 times"], ["%"]),
        ([OURS, USUAL[5]], ["1.87 times", "DataLoader, tuned"], []),
        ([OURS, LIMIT], ["23.6 million", "86 %"], ["times"]),
        ([OURS], ["fastmnist.Loader", "23.6 million images"], ["times", "%"]),
        ([PLAIN, LIMIT], ["DataLoader, plain", "24,300"], ["%"]),
        ([PLAIN, USUAL[6], LIMIT], ["FFCV", "of 2", "2.3 million"], ["plain"]),
        ([LIMIT], ["27.3 million"], []),
        ([OURS, PLAIN, row("faster", 30e6)], ["971 times", "faster", "1.27 times"], []),
        ([OURS, row("equal", 23e6)], ["as many", "equal"], ["times", "%"]),
        ([OURS, row("faster", 47.2e6)], ["50 %", "faster"], ["times"]),
        ([OURS, row("memory copy, float32", 6.6e6, "limit")], ["23.6 million", "3.58 times"], ["%"]),
        ([OURS, row("memory copy", 23.6e6, "limit")], ["23.6 million", "memory"], ["times", "%"]),
    ],
)
def test_title_says_the_finding(texts_of, rows, facts, absent):
    title = finding(rows)
    assert [fact for fact in facts if fact not in title] == []
    assert [fact for fact in absent if fact in title] == []
    assert finding(rows[::-1]) == title
    assert " ".join(texts_of(bars, lambda: plot_bars(rows, [None]))).count(title) == 1


def test_ratios_are_taken_turn_by_turn():
    ours = clock.row("loader", "a", [2e6, 4e6, 6e6], "images/s", ORIGIN, kind="ours")
    plain = clock.row("loader", bars.PLAIN, [1e6, 1e6, 3e6], "images/s", ORIGIN, kind="baseline")
    assert bars.ratio(ours, plain) == (2, 2, 4)
    assert "2 times" in finding([ours, plain])


@pytest.mark.parametrize(
    ("counts", "facts", "absent"),
    [([1, 1], ["one turn"], ["%"]), ([5, 5], ["5 turns"], ["%"]), ([5, 9], ["5 to 9 turns", "95 %", "6"], [])],
)
def test_subtitle_says_what_the_whiskers_are(texts_of, counts, facts, absent):
    rows = [row("a", 1e3, n=counts[0]), row("b", 1e4, n=counts[1])]
    (origin,) = [text for text in texts_of(bars, lambda: plot_bars(rows, [None])) if "AMD EPYC" in text]
    assert [fact for fact in facts if fact not in origin] == []
    assert [fact for fact in absent if fact in origin] == []


def test_rows_without_a_value_are_named_with_the_reason(texts_of):
    rows = [OURS, *USUAL[-1:], row("stands still", 0.0), row("undefined", float("nan")), {"name": "empty"}]
    shown = texts_of(bars, lambda: plot_bars(rows, [None]))
    for name, reason in (
        ("litData", "pip install litdata"),
        ("stands still", "0 images/s"),
        ("undefined", ""),
        ("empty", ""),
    ):
        assert sum(name in text and reason in text for text in shown) == 1


def test_rows_that_cannot_be_compared_are_refused(tmp_path):
    for rows, says in (
        ([], "none of the rows"),
        (USUAL[-1:], "none of the rows"),
        ([OURS, row("b", 3, unit="batches/s")], "one unit per second"),
        ([row("b", 3, unit="seconds")], "one unit per second"),
    ):
        with pytest.raises(ValueError, match=says):
            plot_bars(rows, [tmp_path / "x.png"])
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("count", [2, 12, 40])
def test_nothing_overlaps(texts_of, count):
    kinds = ["ours", "limit", "baseline", "peer"]
    rows = [row(NAMES[at % 7] + f" {at}", 10 ** (9 * at / (count - 1)), kinds[at % 4]) for at in range(count)]
    shown = texts_of(bars, lambda: plot_bars(rows, [None]))
    assert {"1/s", "1,000 M/s"} <= set(shown)


@settings(max_examples=4)
@given(data=st.data())
def test_rows_of_any_kind(tmp_path_factory, texts_of, data):
    value = st.floats(1, 1e9) | st.sampled_from([1.0, 10.0, 1e6, 1e9, 999_499.9])
    rows = []
    for _ in range(data.draw(st.integers(1, 12))):
        median = data.draw(value)
        found = row(data.draw(st.sampled_from(NAMES) | st.text(max_size=60)), median)
        found["kind"] = data.draw(st.sampled_from(["ours", "limit", "baseline", "peer", None]))
        found["low"] = data.draw(st.just(0.0) | st.just(median) | st.floats(0, median))
        found["high"] = data.draw(st.just(median) | st.floats(median, min(1e3 * median, 1e10)))
        if data.draw(st.booleans()):
            found |= {"error": data.draw(st.text(max_size=200)), "median": None}
        rows.append(found)
    rows.append(row("last", data.draw(value), "ours"))
    folder = tmp_path_factory.mktemp("any")
    plot_bars(rows, [folder / "x.png", folder / "x.svg"])
    ElementTree.parse(folder / "x.svg")
    texts_of(bars, lambda: plot_bars(rows, [None]))


def test_same_rows_give_the_same_bytes(tmp_path):
    paths = [tmp_path / "x.png", tmp_path / "x.svg"]
    plot_bars(USUAL, paths)
    first = [path.read_bytes() for path in paths]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "other", "font.size": 20, "savefig.dpi": 40}):
        plot_bars(USUAL, paths)
    assert [path.read_bytes() for path in paths] == first


def test_pictures_are_png_or_svg(tmp_path):
    with styled():
        figure = new_figure(1, 1)
        save(figure, tmp_path / "x.SVG", title="<a & b>")
        for name in ("x.pdf", "x", "png"):
            with pytest.raises(ValueError, match=r"\.png or \.svg"):
                save(figure, tmp_path / name)
    assert os.listdir(tmp_path) == ["x.SVG"]
    assert ElementTree.parse(tmp_path / "x.SVG").findtext("{http://www.w3.org/2000/svg}title") == "<a & b>"


@settings(max_examples=50)
@given(words=st.lists(st.text("abW…i", min_size=1, max_size=40), max_size=12), width=st.floats(0.5, 4))
def test_wrapped_lines_fit_and_keep_all(words, width):
    text = " ".join(words)
    lines = wrapped(text, width, 10)
    assert all(text_width(line, 10) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    short = wrapped(text, width, 10, most=2)
    assert all(text_width(line, 10) <= width for line in short)
    assert short == lines if len(lines) <= 2 else len(short) == 2 and short[1].endswith("…")
