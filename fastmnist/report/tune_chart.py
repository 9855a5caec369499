"""Chart of a tuner's search: a line per candidate, with each value, the median and its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmnist.report.bench_chart import (
    ACCENT,
    NEUTRAL,
    describe_interval,
    describe_origin,
    has_value,
    interval,
    name_of,
)
from fastmnist.report.style import INK, MARGIN, PAGE, QUIET, drawable, page, save, styled, text_width, wrapped
from fastmnist.system.numbers import number, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Candidate = Mapping[str, Any]

MOST_LINES, MOST_NOTES, MOST_NAMES = 30, 12, 8
ROOM_FOR_NAMES = 2.9  # inches at most
STANDING = ("best", "tie", "slower")
UNDRAWN = {"failed": "Failed", "too much memory": "Too much memory", "dropped": "Left out"}  # else "Not measured"


def plot_search(search: Mapping[str, Any], path: Path) -> None:
    """Draws how many times as fast as the defaults each candidate is, the fastest on top.

    A candidate is compared with the defaults in the same round: between rounds a shared machine drifts by more than the
    settings differ.

    Args:
        search: as `Tuning.to_dict` returns it. Candidates without a value are named beneath the chart.
        path: the file to write, .png (1500 pixels wide) or .svg.

    Raises:
        ValueError: no candidate has a value, or the suffix is another.
        FastmnistError: the file cannot be written.
    """
    heading, search = finding(search), {**search, "candidates": [_in_ratios(line) for line in search["candidates"]]}
    ranked = rank(search["candidates"])
    chosen, default = _chosen(ranked), _default(search, ranked)
    drawn = ranked[:MOST_LINES]
    kept = [line for line in (chosen, default) if line is not None and line not in drawn]
    drawn[len(drawn) - len(kept) :] = kept
    with styled():
        bold = ["bold" if candidate is chosen else "normal" for candidate in drawn]
        names = [
            wrapped(name_of(candidate, 90), ROOM_FOR_NAMES, 10, weight, most=2)
            for candidate, weight in zip(drawn, bold, strict=True)
        ]
        medians = [f"{candidate['median']:.2f}" for candidate in drawn]
        outcomes = [candidate["status"] + ", chosen" * (candidate is chosen) for candidate in drawn]
        left = MARGIN + 0.1 + _widest(names, bold, 10)
        middle = _widest([[text] for text in medians], bold, 10) + 0.15
        right = MARGIN + middle + 0.15 + _widest([[text] for text in outcomes], bold, 9)
        lines = [_key(drawn), *_notes(search["candidates"], len(ranked) - len(drawn))]
        notes = [line for text in lines for line in wrapped(text, PAGE - 2 * MARGIN, 9, most=4)]
        pitch = max(0.4 if any(len(name) > 1 for name in names) else 0.3, min(0.44, 4 / len(drawn)))
        height = pitch * len(drawn)
        figure, axes = page(heading, _origin(search), notes, left=left, right=right, height=height, below=0.48)
        _scale(axes, drawn)
        label = f"{drawable(search['unit'], 16)} over the defaults' in the same round"
        axes.set_xlabel(label, loc="left", fontsize=9, color=QUIET)
        axes.axvline(1, color=NEUTRAL, linewidth=1, zorder=1)
        axes.set_ylim(len(drawn) - 0.5, -0.5)
        axes.set_yticks(range(len(drawn)), ["\n".join(name) for name in names], linespacing=1.05)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.axvspan(*interval(drawn[0]), color=ACCENT, alpha=0.14, linewidth=1, zorder=1)
        wide = PAGE - left - right
        for place, (candidate, text) in enumerate(zip(drawn, axes.get_yticklabels(), strict=True)):
            colour = ACCENT if candidate is chosen else INK if candidate["status"] in STANDING else QUIET
            text.set(fontweight=bold[place], color=colour)
            _line(axes, place, candidate, colour, candidate is chosen)
            for words, end, size, align in (
                (medians[place], wide + middle, 10, "right"),
                (outcomes[place], wide + middle + 0.15, 9, "left"),
            ):
                axes.text(
                    end / wide, place, words, transform=axes.get_yaxis_transform(), ha=align, va="center_baseline",
                    fontsize=size, fontweight=bold[place], color=colour,
                )  # fmt: skip
        save(figure, path, title=heading)


def rank(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates with a median above zero: the best first, dropped ones last."""
    return sorted(
        filter(has_value, candidates),
        key=lambda line: (line["status"] != "best", line["status"] not in STANDING, -line["median"]),
    )


def finding(search: Mapping[str, Any]) -> str:
    """The outcome in a sentence.

    Raises:
        ValueError: no candidate has a value.
    """
    ranked = rank(search["candidates"])
    if not ranked:
        raise ValueError("none of the candidates has a value to draw")
    chosen, default = _chosen(ranked), _default(search, ranked)
    name, gain = name_of(chosen, 90), ""
    tied = [candidate for candidate in ranked if candidate["status"] in ("best", "tie")]
    if len(ranked) == 1:
        return f"{name}: the only settings that could be measured"
    if chosen is default:
        return (
            f"The defaults are kept: {f'{len(tied)} of {len(ranked)} settings tie' if len(tied) > 1 else 'the fastest'}"
        )
    if default is not None and default not in tied:
        against = chosen["over_default"]
        gain = f", {times(against['median'])} the defaults" if against["low"] > 1 else ""
    return f"{name}: {f'the simplest of {len(tied)} settings that tie' if len(tied) > 1 else 'the fastest'}{gain}"


def _in_ratios(line: Candidate) -> Candidate:
    return {**line, "rounds": line["ratios"], **line["over_default"]} if "over_default" in line else line


def _chosen(ranked: Sequence[Candidate]) -> Candidate:
    return next((candidate for candidate in ranked if candidate["chosen"]), ranked[0])


def _default(search: Mapping[str, Any], ranked: Sequence[Candidate]) -> Candidate | None:
    return next((candidate for candidate in ranked if candidate["name"] == search["default"]), None)


def _values(candidate: Candidate) -> list[float]:
    return [value for values in candidate["rounds"] for value in values]


def _widest(texts: Sequence[Sequence[str]], weights: Sequence[str], size: float) -> float:
    return max(text_width(line, size, weight) for lines, weight in zip(texts, weights, strict=True) for line in lines)


def _origin(search: Mapping[str, Any]) -> str:
    seconds = f"{search['seconds']:,.0f} s of a budget of {search['budget_seconds']:,.0f} s"
    return " · ".join([drawable(search["what"], 120), *describe_origin([search]), seconds])


def _key(drawn: Sequence[Candidate]) -> str:
    return (
        "Dots: the ratio in each round, hollow in the first. "
        f"Above them: medians and {describe_interval([candidate['n'] for candidate in drawn])}. Shaded: the best's."
    )


def _notes(candidates: Sequence[Candidate], undrawn: int) -> list[str]:
    """The candidates without a line, or with one that does not count, by reason."""
    groups: dict[str, list[str]] = {}
    for candidate in candidates:
        status = candidate["status"]
        if has_value(candidate) and (status in STANDING or status == "dropped"):
            continue
        reason = drawable(candidate["reason"], 160)
        label = UNDRAWN.get(status, "Not measured") + (f" ({reason})" if reason else "")
        groups.setdefault(label, []).append(name_of(candidate))
    notes = []
    for label, names in list(groups.items())[:MOST_NOTES]:
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        notes.append(f"{label}: {'; '.join(names[:MOST_NAMES])}{more}")
    others = sum(len(names) for names in list(groups.values())[MOST_NOTES:])
    notes += [f"{others} more failed or were not measured, for other reasons"] * bool(others)
    return [f"{undrawn} slower ones are not drawn"] * bool(undrawn) + notes


def _scale(axes: Axes, drawn: Sequence[Candidate]) -> None:
    """A linear axis from zero."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, 1.03 * max(max(*_values(candidate), interval(candidate)[1]) for candidate in drawn))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    axes.tick_params(axis="x", labelsize=9, labelcolor=QUIET, length=0)


def _line(axes: Axes, place: int, candidate: Candidate, colour: str, chosen: bool) -> None:
    """Values as dots, and above them the median with its interval."""
    standing = candidate["status"] in STANDING
    for turn, values in enumerate(candidate["rounds"]):
        axes.scatter(
            values, [place + 0.18] * len(values), s=13, facecolors="none" if turn == 0 else colour,
            edgecolors=colour, linewidths=0.8, alpha=0.6 if standing else 0.4, zorder=3,
        )  # fmt: skip
    shade = colour if standing else NEUTRAL
    axes.plot(interval(candidate), [place - 0.14] * 2, color=shade, linewidth=2.2, zorder=3)
    axes.plot(
        candidate["median"], place - 0.14, marker="D" if chosen else "o", markersize=7.5 if chosen else 6.5,
        markerfacecolor=shade if chosen or candidate["status"] in ("best", "tie") else "white",
        markeredgecolor=shade, markeredgewidth=1.4, zorder=4,
    )  # fmt: skip
