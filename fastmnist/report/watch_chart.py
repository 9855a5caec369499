"""Timeline of a watched training run: where each step's time went, its stalls, and the memory."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmnist.report.style import MARGIN, QUIET, RULE, TRAIN, VALIDATION, new_figure, save, styled, wrapped
from fastmnist.system.environment import describe_hardware
from fastmnist.system.numbers import duration

WIDTH, HEIGHT = 11.0, 6.6
CEILING = 1.3  # of the slowest bin of the timeline: a stall higher up is drawn at the top
MEBI = 1 << 20


def plot_watch(found: Mapping[str, Any], path: Path) -> None:
    """Draws milliseconds of a step over the run, waiting and computing stacked, and memory below.

    Args:
        found: `measure.watch.Watch.to_dict`.
        path: .png or .svg.

    Raises:
        FastmnistError: the file cannot be written.
    """
    timeline = found["timeline"]
    edges = list(itertools.accumulate((one["seconds"] for one in timeline), initial=0.0))
    minutes = edges[-1] >= 180
    edges = [at / 60 if minutes else at for at in edges]
    waiting = [1e3 * one["waiting"] / one["steps"] for one in timeline]
    whole = [1e3 * (one["waiting"] + one["computing"]) / one["steps"] for one in timeline]
    with styled():
        figure = new_figure(WIDTH, HEIGHT)
        heading = wrapped(found["verdict"], WIDTH - 2 * MARGIN, 13, "bold", most=3)
        top = 0.2 + 0.24 * len(heading)
        figure.text(MARGIN / WIDTH, 1 - 0.14 / HEIGHT, "\n".join(heading), fontsize=13, fontweight="bold", va="top")
        figure.text(MARGIN / WIDTH, 1 - top / HEIGHT, _origin(found), fontsize=9, color=QUIET, va="top")
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1, rect=(0, 0, 1, 1 - (top + 0.2) / HEIGHT))
        steps, memory = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [2.2, 1]})
        steps.set_title("A step's time")
        steps.set_ylabel("milliseconds a step")
        steps.stairs(whole, edges, baseline=waiting, fill=True, color=TRAIN, alpha=0.75, label="computing")
        steps.stairs(waiting, edges, fill=True, color=VALIDATION, alpha=0.85, label="waiting for the batch")
        limit = CEILING * max(whole)
        worst = found["stalls"]["worst"]
        if worst:
            # A stall's place in time is that of its step in the timeline.
            ends = list(itertools.accumulate((one["steps"] for one in timeline), initial=1))
            places = []
            for stall in worst:
                at = next((n for n, end in enumerate(ends[1:]) if stall["step"] <= end), len(timeline) - 1)
                share = (stall["step"] - ends[at]) / max(1, ends[at + 1] - ends[at])
                places.append(edges[at] + min(1.0, max(0.0, share)) * (edges[at + 1] - edges[at]))
            heights = [min(1e3 * stall["seconds"], 0.97 * limit) for stall in worst]
            steps.plot(places, heights, "v", color="black", markersize=5, label="longest stalls", clip_on=False)
            right = places[0] > 0.7 * edges[-1]
            steps.annotate(
                f"the longest: {1e3 * worst[0]['seconds']:,.3g} ms, {worst[0]['cause']}",
                (places[0], heights[0]),
                xytext=(-8 if right else 8, -14),
                textcoords="offset points",
                ha="right" if right else "left",
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": RULE, "pad": 2},
            )
        steps.set_ylim(0, limit)
        steps.legend(loc="upper left", bbox_to_anchor=(0.55, 1.14), ncols=3, frameon=False, fontsize=9)
        memory.set_title("Memory of the process and its workers, without mapped files")
        memory.set_ylabel("MiB")
        sizes = [one["memory"] / MEBI for one in timeline]
        memory.plot(edges[1:], sizes, color=TRAIN, marker="." if len(sizes) == 1 else "")
        memory.set_ylim(0, max(1.0, 1.15 * max(sizes)))
        memory.set_xlim(0, edges[-1])
        memory.set_xlabel(f"{'minutes' if minutes else 'seconds'} since the first step")
        for axes in (steps, memory):
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
            axes.grid(visible=False, axis="x")
            axes.set_axisbelow(True)
        save(figure, path)


def _origin(found: Mapping[str, Any]) -> str:
    versions, where = found["versions"], describe_hardware(found["hardware"])
    return (
        f"{found['steps']:,} steps, {found['epochs']:,} epochs, {duration(found['seconds'])}; jitter "
        f"{found['jitter']:.2f} (p90 over p50); {where}; torch {versions['torch']}; {found['date'][:10]}"
    )
