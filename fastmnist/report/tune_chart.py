"""The picture of a search for the fastest settings: every value that was measured, a line for each candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmnist.report.bench_chart import (
    ACCENT,
    describe_interval,
    describe_origin,
    interval,
    is_number,
    label_log_axis,
    name_of,
    ratio,
    times,
)
from fastmnist.report.style import INK, MARGIN, PAGE, QUIET, drawable, page, save, styled, text_width, wrapped
from fastmnist.report.tables import number
from fastmnist.system.statistics import summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Candidate = Mapping[str, Any]

DEFAULTS = "defaults"  # the name of the settings that others are held against, where `found` has no other
MOST_LINES, MOST_NOTES, MOST_NAMES = 30, 12, 8
LOG_FROM = 20  # a span of that many times makes the axis logarithmic
ROOM_FOR_NAMES = 2.9  # inches at most
STANDING = ("best", "tie", "slower")
UNDRAWN = {"failed": "Failed", "too much memory": "Too much memory", "dropped": "Left out"}  # else "Not measured"
PALE = "#a3b5c7"


def plot_search(found: Mapping[str, Any], path: Path, *, title: str | None = None) -> None:
    """Draw each candidate's values with their median and interval, the fastest on top.

    Args:
        found: "candidates", each with "name", "rounds" (the values of each round), "status", "reason", "chosen" and
            "median", "low", "high" (taken from the values where they are missing); and where known "unit", "what",
            "seconds", "budget_seconds", "hardware", "date" and "default", the name of the settings that the chosen
            ones are held against.
        path: the file to write, .png (1500 pixels wide) or .svg.
        title: instead of the finding.

    Raises:
        ValueError: no candidate has a value, or the suffix is another.
        FastmnistError: the file cannot be written.
    """
    ranked = rank(found["candidates"])
    if not ranked:
        raise ValueError("none of the candidates has a value to draw")
    chosen, default = _chosen(ranked), _default(found, ranked)
    drawn = ranked[:MOST_LINES]
    kept = [line for line in (chosen, default) if line is not None and line not in drawn]
    drawn[len(drawn) - len(kept) :] = kept
    unit = drawable(found.get("unit") or "images/s", 16)
    per_second = "/s" if unit.endswith("/s") else ""
    heading = drawable(title, 400) if title else finding(found)
    with styled():
        bold = ["bold" if candidate is chosen else "normal" for candidate in drawn]
        names = [
            wrapped(name_of(candidate, 90), ROOM_FOR_NAMES, 10, weight, most=2)
            for candidate, weight in zip(drawn, bold, strict=True)
        ]
        medians = [f"{number(candidate['median'])}{per_second}" for candidate in drawn]
        outcomes = [_outcome(candidate, chosen) for candidate in drawn]
        left = MARGIN + 0.1 + _widest(names, bold, 10)
        middle = _widest([[text] for text in medians], bold, 10) + 0.15
        right = MARGIN + middle + 0.15 + _widest([[text] for text in outcomes], bold, 9)
        lines = [_key(drawn), *_notes(found["candidates"], len(ranked) - len(drawn))]
        notes = [line for text in lines for line in wrapped(text, PAGE - 2 * MARGIN, 9, most=4)]
        pitch = max(0.4 if any(len(name) > 1 for name in names) else 0.3, min(0.44, 4 / len(drawn)))
        height = pitch * len(drawn)
        figure, axes = page(heading, _origin(found), notes, left=left, right=right, height=height, below=0.48)
        log = _scale(axes, drawn)
        label = f"{unit.removesuffix('/s')} per second" if per_second else unit
        axes.set_xlabel(label + ", log scale" * log, loc="left", fontsize=9, color=QUIET)
        axes.set_ylim(len(drawn) - 0.5, -0.5)
        axes.set_yticks(range(len(drawn)), ["\n".join(name) for name in names], linespacing=1.05)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.axvspan(*interval(drawn[0]), color=ACCENT, alpha=0.14, linewidth=1, zorder=1)
        wide = PAGE - left - right
        for place, (candidate, text) in enumerate(zip(drawn, axes.get_yticklabels(), strict=True)):
            is_chosen = candidate is chosen
            colour = ACCENT if is_chosen else INK if candidate["status"] in STANDING else QUIET
            text.set(fontweight=bold[place], color=colour)
            _line(axes, place, candidate, colour, is_chosen)
            for words, end, size, align in (
                (medians[place], wide + middle, 10, "right"),
                (outcomes[place], wide + middle + 0.15, 9, "left"),
            ):
                axes.text(
                    end / wide, place, words, transform=axes.get_yaxis_transform(), ha=align, va="center_baseline",
                    fontsize=size, fontweight=bold[place], color=colour,
                )  # fmt: skip
        save(figure, path, title=heading)


def rank(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Those with a median above zero, the best first, what was dropped last; median and interval are filled in."""
    ranked = []
    for candidate in candidates:
        values = _values(candidate)
        line = {"status": "not measured", **candidate}
        if not is_number(line.get("median")) and values:
            summary = summarise(values)
            line |= {"median": summary.median, "low": summary.low, "high": summary.high}
        if is_number(line.get("median")) and line["median"] > 0:
            ranked.append(line)
    ranked.sort(key=lambda line: (line["status"] != "best", line["status"] not in STANDING, -line["median"]))
    return ranked


def finding(found: Mapping[str, Any]) -> str:
    """What was found, in a sentence.

    Raises:
        ValueError: no candidate has a value.
    """
    ranked = rank(found["candidates"])
    if not ranked:
        raise ValueError("none of the candidates has a value")
    chosen = _chosen(ranked)
    default, name, gain = _default(found, ranked), name_of(chosen, 90), ""
    tied = [candidate for candidate in ranked if candidate["status"] in ("best", "tie")]
    if default is not None and default is not chosen and default not in tied:
        against = ratio(chosen, default)
        gain = f", {times(against.median)} the defaults" if against.low > 1 else ""
    if len(ranked) == 1:
        return f"{name}: the only settings that could be measured"
    if len(tied) > 1 and chosen in tied:
        if len(tied) == len(ranked):
            return (
                f"All settings tie: {'the defaults are kept' if chosen is default else f'the simplest is kept, {name}'}"
            )
        if chosen is default:
            return f"The defaults are kept: {len(tied)} of {len(ranked)} settings tie"
        return f"{name}: the simplest of {len(tied)} settings that tie{gain}"
    return "The defaults are the fastest here" if chosen is default else f"{name}: the fastest here{gain}"


def _chosen(ranked: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return next((candidate for candidate in ranked if candidate.get("chosen")), ranked[0])


def _default(found: Mapping[str, Any], ranked: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    name = found.get("default") or DEFAULTS
    return next((candidate for candidate in ranked if candidate.get("name") == name), None)


def _values(candidate: Candidate) -> list[float]:
    return [value for values in candidate.get("rounds") or [] for value in values if is_number(value)]


def _widest(texts: Sequence[Sequence[str]], weights: Sequence[str], size: float) -> float:
    return max(text_width(line, size, weight) for lines, weight in zip(texts, weights, strict=True) for line in lines)


def _outcome(candidate: Candidate, chosen: Candidate) -> str:
    status = candidate["status"]
    if status == "dropped":
        rounds = sum(bool(values) for values in candidate.get("rounds") or [])
        text = f"dropped after round {rounds}" if rounds else "dropped"
    else:
        text = drawable(status)
    return f"{text}, chosen" if candidate is chosen else text


def _origin(found: Mapping[str, Any]) -> str:
    parts = [drawable(found["what"], 120)] if found.get("what") else []
    parts += describe_origin([found])
    if is_number(found.get("seconds")):
        budget = found.get("budget_seconds")
        parts.append(f"{found['seconds']:,.0f} s" + (f" of a budget of {budget:,.0f} s" if is_number(budget) else ""))
    return " · ".join(parts)


def _key(drawn: Sequence[Candidate]) -> str:
    counts = [count for candidate in drawn if (count := candidate.get("n") or len(_values(candidate)))] or [1]
    return (
        f"Dots: single values, hollow in the first round. Above them: medians and {describe_interval(counts)}. "
        "Shaded: the best's."
    )


def _notes(candidates: Sequence[Candidate], undrawn: int) -> list[str]:
    """Why some of the candidates have no line, or one that does not count."""
    groups: dict[str, list[str]] = {}
    measured = [candidate.get("name") for candidate in rank(candidates)]
    for candidate in candidates:
        status = candidate.get("status", "not measured")
        if candidate.get("name") in measured and (status in STANDING or status == "dropped"):
            continue
        reason = drawable(candidate.get("reason") or "", 160)
        label = UNDRAWN.get(status, "Not measured") + (f" ({reason})" if reason else "")
        groups.setdefault(label, []).append(name_of(candidate))
    notes = []
    for label, names in list(groups.items())[:MOST_NOTES]:
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        notes.append(f"{label}: {'; '.join(names[:MOST_NAMES])}{more}")
    others = sum(len(names) for names in list(groups.values())[MOST_NOTES:])
    notes += [f"{others} more failed or were not measured, for other reasons"] * bool(others)
    return [f"{undrawn} slower ones are not drawn"] * bool(undrawn) + notes


def _scale(axes: Axes, drawn: Sequence[Candidate]) -> bool:
    """Sets the horizontal axis; says whether it is logarithmic."""
    from matplotlib.ticker import MaxNLocator

    shown = [value for candidate in drawn for value in (*_values(candidate), candidate["median"])]
    low, high = min(value for value in shown if value > 0), max(*shown, *(interval(line)[1] for line in drawn))
    if high <= LOG_FROM * low:
        axes.set_xlim(0, high * 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(lambda value, _: number(value))
        axes.tick_params(axis="x", labelsize=9, labelcolor=QUIET, length=0)
        return False
    floor, ceiling = low / (high / low) ** 0.03, high * (high / low) ** 0.03
    axes.set_xscale("log")
    axes.set_xlim(floor, ceiling)
    label_log_axis(axes, floor, ceiling)
    return True


def _line(axes: Axes, place: int, candidate: Candidate, colour: str, chosen: bool) -> None:
    """Values as dots, and above them the median with its interval."""
    standing = candidate["status"] in STANDING
    floor = axes.get_xlim()[0]
    for number_of, values in enumerate(candidate.get("rounds") or []):
        shown = [value for value in values if is_number(value) and value > floor]
        face = "none" if number_of == 0 else colour
        axes.scatter(
            shown, [place + 0.18] * len(shown), s=13, facecolors=face, edgecolors=colour, linewidths=0.8,
            alpha=0.6 if standing else 0.4, zorder=3,
        )  # fmt: skip
    low, high = interval(candidate)
    shade = colour if standing else PALE
    axes.plot([max(low, floor), high], [place - 0.14] * 2, color=shade, linewidth=2.2, zorder=3)
    axes.plot(
        candidate["median"], place - 0.14, marker="D" if chosen else "o", markersize=7.5 if chosen else 6.5,
        markerfacecolor=shade if chosen or candidate["status"] in ("best", "tie") else "white",
        markeredgecolor=shade, markeredgewidth=1.4, zorder=4,
    )  # fmt: skip
