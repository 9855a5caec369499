"""Chart of a loader comparison: a bar per loader on a log scale, the fastest on top."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmnist.report.style import (
    INK,
    MARGIN,
    PAGE,
    QUIET,
    VALIDATION,
    drawable,
    page,
    save,
    styled,
    text_width,
    wrapped,
)
from fastmnist.system.environment import describe_hardware
from fastmnist.system.numbers import number, rough_percent, times
from fastmnist.system.statistics import LEAST_FOR_INTERVAL, ratios

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]

PLAIN = "DataLoader, plain"  # the title compares ours with it
ACCENT, NEUTRAL = VALIDATION, "#a3b5c7"
ROOM_FOR_NAMES = 3.1  # inches at most
ROOM_FOR_NUMBER = 0.65  # inches for each on an axis
RIGHT = MARGIN + 0.1  # inches: room for half of the last number on the axis
LEAST_BAR = 0.3  # decades: least length of the shortest bar
LOOKS: dict[str, dict[str, Any]] = {
    "ours": {"facecolor": ACCENT, "edgecolor": ACCENT, "label": "fastmnist"},
    "limit": {"facecolor": "white", "edgecolor": QUIET, "hatch": "/////", "label": "limit: plain memory copy"},
    "other": {"facecolor": NEUTRAL, "edgecolor": NEUTRAL, "label": "other loaders"},
}


def plot_bars(rows: Sequence[Row], paths: Sequence[Path]) -> None:
    """Draws each loader's rate with its interval, sorted.

    Args:
        rows: as `statistics.row` makes them, all of one unit such as "images/s", with "kind" ("ours", "limit",
            "baseline" or "peer"); failed ones have "error" instead of a median. Rows without a median above zero are
            named beneath the chart.
        paths: the files to write, .png (1500 pixels wide) or .svg.

    Raises:
        ValueError: no row has a value, the units differ or are not per second, or a suffix is another.
        FastmnistError: a file cannot be written.
    """
    drawn = measured(rows)
    if not drawn:
        raise ValueError("none of the rows has a value to draw")
    things = _things(drawn)
    heading = finding(rows)
    with styled():
        weights = ["bold" if _kind(row) == "ours" else "normal" for row in drawn]
        names = [
            wrapped(name_of(row, 90), ROOM_FOR_NAMES, 10, weight, most=2)
            for row, weight in zip(drawn, weights, strict=True)
        ]
        left = MARGIN + 0.1 + max(
            text_width(line, 10, weight) for lines, weight in zip(names, weights, strict=True) for line in lines
        )  # fmt: skip
        missing = [f"Not measured: {name_of(row, 60)}: {_why(row)}" for row in rows if not has_value(row)]
        notes = [line for note in missing for line in wrapped(note, PAGE - 2 * MARGIN, 9, most=3)]
        two_lines = any(len(lines) > 1 for lines in names)
        pitch = min(0.46, max(0.4 if two_lines else 0.32, 5 / len(drawn)))
        figure, axes = page(
            heading, _origin(drawn), notes, left=left, right=RIGHT, height=pitch * len(drawn), below=0.48
        )  # fmt: skip
        labels = [f"{number(row['median'])}/s" for row in drawn]
        floor = 10.0 ** math.floor(math.log10(drawn[-1]["median"]) - LEAST_BAR)
        ceiling = _ceiling(drawn, labels, floor, PAGE - left - RIGHT)
        axes.set_xscale("log")
        axes.set_xlim(floor, ceiling)
        axes.set_ylim(len(drawn) - 0.5, -0.5)
        _label_log_axis(axes, floor, ceiling)
        axes.set_xlabel(f"{things} per second, log scale", loc="left", fontsize=9, color=QUIET)
        axes.set_yticks(range(len(drawn)), ["\n".join(lines) for lines in names], linespacing=1.05)
        for place, text in enumerate(axes.get_yticklabels()):
            text.set_fontweight(weights[place])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_axisbelow(True)
        for place, (row, label) in enumerate(zip(drawn, labels, strict=True)):
            _bar(axes, place, row, label, floor)
        _limit_line(axes, drawn)
        _key(axes, {_kind(row) for row in drawn}, pitch * len(drawn))
        for path in paths:
            save(figure, path, title=heading)


def measured(rows: Sequence[Row]) -> list[Row]:
    """The rows with a median above zero, the fastest first."""
    return sorted((row for row in rows if has_value(row)), key=lambda row: (-row["median"], str(row.get("name"))))


def finding(rows: Sequence[Row]) -> str:
    """The outcome in a sentence: our fastest against the plain DataLoader and the memory's limit.

    Raises:
        ValueError: no row has a value, or the units differ or are not per second.
    """
    drawn = measured(rows)
    things = _things(drawn)
    of_kind = {kind: [row for row in drawn if _kind(row) == kind] for kind in LOOKS}
    others = of_kind["other"]
    if not of_kind["ours"]:
        fastest = (others or drawn)[0]
        among = f", the fastest of {len(others)}," if len(others) > 1 else ""
        return f"{name_of(fastest)}{among} hands out {_amount(fastest['median'])} {things} per second"

    ours = of_kind["ours"][0]
    plain = next((row for row in others if row.get("name") == PLAIN), None)
    rival = plain or next(iter(others), None)
    text = f"{name_of(ours)} hands out "
    if rival is None:
        text += f"{_amount(ours['median'])} {things} per second"
    else:
        against = ratio(ours, rival, "over_plain" if rival is plain else "")
        text += (
            f"{against.often()} {things} per second as {'the plain DataLoader' if rival is plain else name_of(rival)}"
        )
    if of_kind["limit"]:
        text += f", {_share(ratio(ours, of_kind['limit'][0], 'of_limit').median)}"
    if others and others[0] is not rival:
        ahead = ratio(others[0], ours)
        if ahead.low > 1:
            text += f"; {name_of(others[0])} hands out {ahead.often()} as that"
    return text


class Ratio(NamedTuple):
    """One row's rate over another's, with its interval."""

    median: float
    low: float
    high: float

    def often(self) -> str:
        """In words; "as many" if the interval holds 1."""
        if self.low <= 1 <= self.high:
            return "as many"
        return f"{times(self.median) if self.median > 1 else rough_percent(self.median)} as many"


def ratio(row: Row, other: Row, known: str = "") -> Ratio:
    """Turn by turn if both rows have equally many values; else of the medians, with the intervals' extremes.

    Args:
        known: the row's key for this ratio; used if present.
    """
    if measured := row.get(known):
        return Ratio(measured["median"], measured["low"], measured["high"])
    values, to = row.get("values") or [], other.get("values") or []
    if values and len(values) == len(to) and min(to) > 0:
        summary = ratios(values, to)
        return Ratio(summary.median, summary.low, summary.high)
    (low, high), (other_low, other_high) = interval(row), interval(other)
    most = high / other_low if other_low > 0 else math.inf
    return Ratio(row["median"] / other["median"], low / other_high, most)


def interval(row: Row) -> tuple[float, float]:
    """(low, high) around the median; a missing end is the median."""
    median = float(row["median"])
    low, high = (float(row[key]) if is_number(row.get(key)) else median for key in ("low", "high"))
    return min(low, median), max(high, median)


def describe_origin(rows: Sequence[Row]) -> list[str]:
    """Hardware and days of the rows, for people."""
    machines: list[str] = []
    for row in rows:
        hardware = row.get("hardware") or {}
        if {"processor", "cores"} <= set(hardware):
            machine = drawable(describe_hardware(hardware), 100)
            machines += [] if machine in machines else [machine]
    parts = machines if len(machines) < 3 else [f"{len(machines)} machines"]
    days = sorted({drawable(str(row["date"])[:10]) for row in rows if row.get("date")})
    return [*parts, *([days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"] if days else [])]


def describe_interval(counts: Sequence[int]) -> str:
    """The meaning of low and high for rows with so many values each."""
    if min(counts) >= LEAST_FOR_INTERVAL:
        return "95 % intervals"
    if max(counts) < LEAST_FOR_INTERVAL:
        return "whole ranges"
    return f"95 % intervals (whole ranges below {LEAST_FOR_INTERVAL} values)"


def _origin(rows: Sequence[Row]) -> str:
    sizes = sorted({int(row["settings"]["batch_size"]) for row in rows if "batch_size" in (row.get("settings") or {})})
    parts = describe_origin(rows)
    if sizes:
        parts.append(f"batch size {' or '.join(str(size) for size in sizes)}")
    counts = sorted({int(row["n"]) for row in rows if row.get("n")})
    if counts:
        many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        turns = "one turn each" if counts == [1] else f"medians of {many} turns, whiskers: {describe_interval(counts)}"
        parts.append(turns)
    return " · ".join(parts)


def _things(rows: Sequence[Row]) -> str:
    """ "images" of "images/s"."""
    units = sorted({str(row.get("unit")) for row in rows})
    if not units:
        raise ValueError("none of the rows has a value to draw")
    if len(units) > 1 or not units[0].endswith("/s"):
        raise ValueError(f"a comparison has one unit per second, such as images/s, not {', '.join(units)}")
    return drawable(units[0].removesuffix("/s"), 16)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def has_value(row: Row) -> bool:
    median = row.get("median")
    return is_number(median) and median > 0  # type: ignore[operator]


def _kind(row: Row) -> str:
    kind = row.get("kind")
    return kind if kind in ("ours", "limit") else "other"


def name_of(row: Row, longest: int = 48) -> str:
    return drawable(row.get("name") or "", longest) or "(no name)"


def _why(row: Row) -> str:
    if row.get("error"):
        return drawable(row["error"], 300)
    return f"{number(row['median'])} {drawable(row.get('unit') or '')}" if row.get("median") == 0 else "no value"


def _amount(value: float) -> str:
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {word}"
    return number(value)


def _share(of: float) -> str:
    if of < 0.995:
        return f"{rough_percent(of)} of what memory allows"
    return "as fast as memory allows" if of < 1.1 else f"{times(of)} as fast as a plain copy of memory"


def _ceiling(rows: Sequence[Row], labels: Sequence[str], floor: float, width: float) -> float:
    """The axis's end that leaves room for the label behind each bar and whisker."""
    start = math.log10(floor)
    ends = []
    for row, label in zip(rows, labels, strict=True):
        share = 1 - (text_width(label, 10, "bold") + 0.15) / width
        ends.append((math.log10(interval(row)[1]) - start) / share)
    return float(10 ** (start + max(ends)))


def _label_log_axis(axes: Axes, floor: float, ceiling: float) -> None:
    """Ticks at powers of ten, as far as there is room; at 2 and 5 times them too, if there is."""
    from matplotlib.ticker import FixedLocator, NullLocator

    decade = axes.get_position().width * PAGE / math.log10(ceiling / floor)  # inches
    first, last = math.floor(math.log10(floor)), math.ceil(math.log10(ceiling))
    step = math.ceil(ROOM_FOR_NUMBER / decade)
    factors = (1, 2, 5) if decade * math.log10(2) > ROOM_FOR_NUMBER else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1, step) for factor in factors]
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if floor <= tick <= ceiling]))
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize=9, labelcolor=QUIET, length=0)


def _bar(axes: Axes, place: int, row: Row, label: str, floor: float) -> None:
    median = float(row["median"])
    low, high = interval(row)
    kind = _kind(row)
    look = {key: value for key, value in LOOKS[kind].items() if key != "label"}
    axes.barh(place, median - floor, left=floor, height=0.62, linewidth=0.8, zorder=2, **look)
    if high > low:
        axes.errorbar(
            median, place, xerr=[[median - max(low, floor)], [high - median]], fmt="none", ecolor=INK,
            elinewidth=1.1, capsize=2.5, capthick=1.1, zorder=3,
        )  # fmt: skip
    axes.annotate(
        label, (high, place), (6, 0), textcoords="offset points", va="center_baseline", zorder=4,
        fontweight="bold" if kind == "ours" else "normal", color=ACCENT if kind == "ours" else INK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2},
    )  # fmt: skip


def _limit_line(axes: Axes, rows: Sequence[Row]) -> None:
    """A dashed line from the highest limit down."""
    for place, row in enumerate(rows):
        if _kind(row) == "limit":
            at, ends = [row["median"]] * 2, [place + 0.31, len(rows) - 0.5]
            axes.plot(at, ends, color=QUIET, linewidth=0.9, linestyle=(0, (3, 3)), zorder=1)
            return


def _key(axes: Axes, kinds: set[str], height: float) -> None:
    from matplotlib.patches import Patch

    if len(kinds) < 2:
        return
    axes.legend(
        [Patch(**look, linewidth=0.8) for kind, look in LOOKS.items() if kind in kinds],
        [look["label"] for kind, look in LOOKS.items() if kind in kinds],
        loc="lower right", bbox_to_anchor=(1, -0.4 / height), ncols=3, frameon=False, fontsize=9, labelcolor=INK,
        borderpad=0, borderaxespad=0, handlelength=1.4, handleheight=0.9, handletextpad=0.5, columnspacing=1.4,
    )  # fmt: skip
