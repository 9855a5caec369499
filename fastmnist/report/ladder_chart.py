"""Ladder as a table and a picture: the effect of each rung on the seconds of an epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmnist.report.style import INK, QUIET, RULE, TRAIN, VALIDATION, page, save, styled
from fastmnist.report.tables import console_table
from fastmnist.system.environment import describe_hardware
from fastmnist.system.numbers import percent

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]
HEADINGS = ("rung", "images/s", "seconds per epoch", "over the rung below", "test accuracy", "set-up")
LEFT, RIGHT, BAR, BELOW = 2.3, 2.2, 0.42, 0.6  # inches
NOTE = {"none": "no difference here", "slower": "slower here"}
LOST_IN_ONE = 0.05  # accuracy; with one seed a smaller loss may be chance


def notes(rows: Sequence[Row]) -> list[str]:
    """The reason for each rung that was not measured, is no faster or loses accuracy, one line each."""
    measured = [row for row in rows if "images_per_second" in row]
    found = []
    if measured and min(row["n"] for row in measured) < 2:
        found.append("With one seed no rung is called faster or slower: two runs of one rung differ too (--seeds 3)")
    for below, row in pairwise(measured):
        if less_accurate(row, below):
            lost = f"{percent(row['test_accuracy']['mean'], 1)} of the test images right instead of "
            found.append(f"{row['name']}, LESS ACCURATE here: {lost}{percent(below['test_accuracy']['mean'], 1)}")
    for row in rows:
        if "left_out" in row:
            found.append(f"{row['name']}, left out: {row['left_out']}")
        elif "error" in row:
            found.append(f"{row['name']}, failed: {row['error']}")
        elif row["effect"] in NOTE:
            found.append(f"{row['name']}, {NOTE[row['effect']]}: {row['explanation']}")
    return found


def cells(row: Row) -> tuple[str, ...]:
    """Cells of a measured rung under HEADINGS."""
    rate, accuracy = row["images_per_second"], row["test_accuracy"]
    over = "" if row["over_below"] is None else f"{row['over_below']:.2f}"
    return (
        row["name"],
        f"{rate['median']:,.0f}" + (f" ({rate['min']:,.0f} to {rate['max']:,.0f})" if row["n"] > 1 else ""),
        f"{row['seconds_per_epoch']:.3g}",
        over,
        f"{100 * accuracy['mean']:.2f} %" + (f" ± {100 * accuracy['stdev']:.2f}" if row["n"] > 1 else ""),
        f"{row['compile_seconds']:.1f} s",
    )


def ladder_table(rows: Sequence[Row]) -> Table:
    """The measured rungs; `notes` has the others."""
    return console_table(HEADINGS, [cells(row) for row in rows if "images_per_second" in row])


def ladder_markdown(found: Mapping[str, Any]) -> str:
    """The measured rungs as Markdown, with notes and origin."""
    lines = [f"| {' | '.join(HEADINGS)} |", "| --- | ---: | ---: | --- | ---: | ---: |"]
    lines += [f"| {' | '.join(cells(row))} |" for row in found["rows"] if "images_per_second" in row]
    said = [f"- {line}" for line in notes(found["rows"])]
    return "\n".join([*lines, "", *said, *([""] if said else []), _origin(found)]) + "\n"


def plot_ladder(found: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Draws seconds per epoch, rung under rung, and what each one saves or costs.

    Args:
        found: `Ladder.to_dict()`. paths: to write, .png or .svg.

    Raises:
        FastmnistError: a file cannot be written.
    """
    rows = found["rows"]
    measured = [row for row in rows if "seconds_per_epoch" in row]
    longest = max(row["seconds_per_epoch"] for row in measured)
    heading = _heading(measured)
    with styled():
        figure, axes = page(
            heading, _origin(found), [], left=LEFT, right=RIGHT, height=BAR * len(rows) + 0.2, below=BELOW
        )
        before: float | None = None
        below: Row | None = None
        for at, row in enumerate(rows):
            if "seconds_per_epoch" not in row:
                text = f"left out: {row['left_out']}" if "left_out" in row else "failed, see below the table"
                axes.text(longest * 0.01, at, text, va="center", fontsize=9, color=QUIET)
                continue
            seconds = row["seconds_per_epoch"]
            axes.barh(at, seconds, height=0.62, color=TRAIN, zorder=2)
            if before is not None and row["effect"] in ("faster", "slower"):
                saved = before - seconds
                colour = RULE if saved >= 0 else VALIDATION
                axes.barh(at, abs(saved), left=min(before, seconds), height=0.62, color=colour, zorder=2)
            label = f"{seconds:.3g} s"
            if row["effect"] == "faster":
                label += f", {row['over_below']:.2f} times as fast"
            elif row["effect"] is not None:
                label += f", {NOTE[row['effect']]}"
            lost = below is not None and less_accurate(row, below)
            if below is not None and (lost or more_accurate(row, below)):
                label = f"{seconds:.3g} s, {100 * row['test_accuracy']['mean']:.1f} % instead of "
                label += f"{100 * below['test_accuracy']['mean']:.1f} % right"
            end = seconds if before is None or row["effect"] in (None, "none") else max(seconds, before)
            colour = VALIDATION if lost else INK
            axes.text(end + longest * 0.012, at, label, va="center", fontsize=9, color=colour)
            before, below = seconds, row
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, longest)
        axes.grid(visible=False, axis="y")
        dataset = found["settings"]["dataset"]
        axes.set_xlabel(f"seconds for one epoch of {dataset}; pale: what the rung saves, orange: what it costs")
        for path in paths:
            save(figure, path, heading)


def more_accurate(row: Row, below: Row) -> bool:
    """Whether the rung's mean accuracy exceeds that of the rung below by more than two standard deviations."""
    found, before = row["test_accuracy"], below["test_accuracy"]
    enough = min(row["n"], below["n"]) > 1
    return bool(enough and found["mean"] - before["mean"] > 2 * max(found["stdev"], before["stdev"]))


def less_accurate(row: Row, below: Row) -> bool:
    """Whether the rung loses accuracy, by the same measure; with one seed, whether it loses more than LOST_IN_ONE."""
    if min(row["n"], below["n"]) > 1:
        return more_accurate(below, row)
    lost: float = below["test_accuracy"]["mean"] - row["test_accuracy"]["mean"]
    return lost > LOST_IN_ONE


def _heading(measured: Sequence[Row]) -> str:
    first, last = measured[0]["seconds_per_epoch"], measured[-1]["seconds_per_epoch"]
    return f"From {first:.3g} s to {last:.3g} s per epoch: {first / last:.2g} times as fast"


def _origin(found: Mapping[str, Any]) -> str:
    settings = found["settings"]
    several = f"medians of {settings['seeds']} seeds (accuracy: mean and standard deviation)"
    return (
        f"{settings['images']:,} training images per run, {several if settings['seeds'] > 1 else 'one seed'}; "
        f"{describe_hardware(found['hardware'])}; torch {found['versions']['torch']}; {found['date'][:10]}."
    )
