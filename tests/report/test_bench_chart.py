"""The picture of a comparison: its finding, its order, nothing left out, and any rows that can occur."""

import os
import re
from xml.etree import ElementTree

import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
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


def boxes(figure):
    """Every text that is seen, with the pixels that it takes."""
    figure.set_dpi(150)  # as it is saved: letters have whole pixels
    figure.canvas.draw()
    hidden = set()
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, sorted(axes.get_ylim()))):
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low <= tick.get_loc() <= high:
                    hidden |= {tick.label1, tick.label2}
    seen = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in hidden]
    return [(text.get_text(), text.get_window_extent()) for text in seen]


def clashes(figure):
    """Texts that leave the picture or touch another."""
    found = boxes(figure)
    wide, high = figure.bbox.size
    outside = [text for text, box in found if box.x0 < 0 or box.y0 < 0 or box.x1 > wide or box.y1 > high]
    pairs = [(a, b) for at, a in enumerate(found) for b in found[:at]]
    touching = [
        (a, b)
        for (a, one), (b, other) in pairs
        if min(one.x1, other.x1) - max(one.x0, other.x0) > 1 and min(one.y1, other.y1) - max(one.y0, other.y0) > 1
    ]
    return [*outside, *touching]


def look(monkeypatch, module, draw):
    """All text of the figure that `draw` saves, in which nothing overlaps."""
    found = []

    def keep(figure, path, title=None):
        assert not clashes(figure)
        found.extend(text for text, _ in boxes(figure))

    with monkeypatch.context() as patch:
        patch.setattr(module, "save", keep)
        draw()
    return found


def test_usual_picture(tmp_path, monkeypatch):
    paths = [tmp_path / "bench.png", tmp_path / "bench.svg"]
    plot_bars(USUAL, paths)
    assert sorted(os.listdir(tmp_path)) == ["bench.png", "bench.svg"]
    with Image.open(paths[0]) as picture:
        assert picture.size[0] == 1500
        assert "Software" not in picture.info
    shown = look(monkeypatch, bars, lambda: plot_bars(USUAL, paths))
    assert {"23.6 M/s", "8 M/s", "24,300/s", "300,000/s", "10,000", "10 M"} <= set(shown)
    assert {"fastmnist", "limit: plain memory copy", "other loaders"} <= set(shown)
    assert "Not measured: litData: not installed: pip install litdata" in shown
    assert (
        "AMD EPYC 7763, 2 cores · 2026-11-23 · batch size 512 · medians of 12 turns, whiskers: 95 % intervals" in shown
    )


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


def test_the_fastest_comes_first(monkeypatch):
    names = [found["name"] for found in measured(USUAL)]
    assert names[:3] == ["memory copy, bytes", "fastmnist.Loader", "DataLoader, tuned"]
    assert names[-1] == "DataLoader, plain, 2 workers"
    shown = look(monkeypatch, bars, lambda: plot_bars(USUAL[::-1], [None]))
    assert [name for name in shown if name in names] == names


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [OURS | {"over_plain": {"median": 946.2, "low": 932, "high": 1038}}, PLAIN, LIMIT],
            "fastmnist.Loader hands out 946 times as many images per second as the plain DataLoader, "
            "86 % of what memory allows",
        ),
        ([OURS, PLAIN], "fastmnist.Loader hands out 971 times as many images per second as the plain DataLoader"),
        ([OURS, USUAL[5]], "fastmnist.Loader hands out 1.87 times as many images per second as DataLoader, tuned"),
        ([OURS, LIMIT], "fastmnist.Loader hands out 23.6 million images per second, 86 % of what memory allows"),
        ([OURS], "fastmnist.Loader hands out 23.6 million images per second"),
        ([PLAIN, LIMIT], "DataLoader, plain hands out 24,300 images per second"),
        ([PLAIN, USUAL[6], LIMIT], "FFCV, the fastest of 2, hands out 2.3 million images per second"),
        ([LIMIT], "memory copy, bytes hands out 27.3 million images per second"),
        (
            [OURS, PLAIN, row("faster", 30e6)],
            "fastmnist.Loader hands out 971 times as many images per second as the plain DataLoader; "
            "faster hands out 1.27 times as many as that",
        ),
        ([OURS, row("equal", 23e6)], "fastmnist.Loader hands out as many images per second as equal"),
        ([OURS, row("faster", 47.2e6)], "fastmnist.Loader hands out 50 % as many images per second as faster"),
        (
            [OURS, row("memory copy, float32", 6.6e6, "limit")],
            "fastmnist.Loader hands out 23.6 million images per second, 3.58 times as fast as a plain copy of memory",
        ),
        (
            [OURS, row("memory copy", 23.6e6, "limit")],
            "fastmnist.Loader hands out 23.6 million images per second, as fast as memory allows",
        ),
    ],
)
def test_title_says_the_finding(monkeypatch, rows, says):
    assert finding(rows) == says
    assert finding(rows[::-1]) == says
    shown = look(monkeypatch, bars, lambda: plot_bars(rows, [None]))
    assert " ".join(shown).count(says) == 1


def test_ratios_are_taken_turn_by_turn():
    ours = clock.row("loader", "a", [2e6, 4e6, 6e6], "images/s", ORIGIN, kind="ours")
    plain = clock.row("loader", bars.PLAIN, [1e6, 1e6, 3e6], "images/s", ORIGIN, kind="baseline")
    assert bars.ratio(ours, plain) == (2, 2, 4)
    assert finding([ours, plain]) == "a hands out 2 times as many images per second as the plain DataLoader"


def test_a_title_of_ones_own(monkeypatch):
    assert "Loaders, compared" in look(monkeypatch, bars, lambda: plot_bars(USUAL, [None], title="Loaders, compared"))


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ([1, 1], "one turn each"),
        ([5, 5], "medians of 5 turns, whiskers: whole ranges"),
        ([5, 9], "medians of 5 to 9 turns, whiskers: 95 % intervals (whole ranges below 6 values)"),
    ],
)
def test_subtitle_says_what_the_whiskers_are(monkeypatch, counts, says):
    rows = [row("a", 1e3, n=counts[0]), row("b", 1e4, n=counts[1])]
    shown = look(monkeypatch, bars, lambda: plot_bars(rows, [None]))
    assert any(text.endswith(says) for text in shown)


def test_rows_without_a_value_are_named(monkeypatch):
    rows = [OURS, *USUAL[-1:], row("stands still", 0.0), row("undefined", float("nan")), {"name": "empty"}]
    shown = look(monkeypatch, bars, lambda: plot_bars(rows, [None]))
    assert [text for text in shown if text.startswith("Not measured")] == [
        "Not measured: litData: not installed: pip install litdata",
        "Not measured: stands still: 0 images/s",
        "Not measured: undefined: no value",
        "Not measured: empty: no value",
    ]


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
def test_nothing_overlaps(monkeypatch, count):
    kinds = ["ours", "limit", "baseline", "peer"]
    rows = [row(NAMES[at % 7] + f" {at}", 10 ** (9 * at / (count - 1)), kinds[at % 4]) for at in range(count)]
    shown = look(monkeypatch, bars, lambda: plot_bars(rows, [None]))
    assert {"1/s", "1,000 M/s"} <= set(shown)


@settings(max_examples=4)
@given(data=st.data())
def test_rows_of_any_kind(tmp_path_factory, data):
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
    with pytest.MonkeyPatch.context() as patch:
        look(patch, bars, lambda: plot_bars(rows, [None]))


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
