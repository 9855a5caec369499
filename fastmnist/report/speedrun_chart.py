"""Picture of a speedrun: accuracy on the test set over seconds of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastmnist.report.style import INK, QUIET, TRAIN, VALIDATION, page, save, styled
from fastmnist.system.environment import describe_hardware
from fastmnist.system.numbers import percent, seconds

GRID = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # shares of wrong answers
LEFT, RIGHT, HEIGHT, BELOW = 0.9, 0.4, 3.9, 0.75


def plot_speedrun(found: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """Draws the curve of one seed and the end of every seed, and names the time outside the training clock below.

    Args:
        found: `Speedrun.to_dict()`.
        paths: to write, .png or .svg.

    Raises:
        FastmnistError: a file cannot be written.
    """
    runs = found["runs"]
    seconds = np.array([run["train_seconds"] for run in runs])
    wrong = np.array([1 - run["test_accuracy"] for run in runs])
    way = [(point["train_seconds"], 1 - point["test_accuracy"]) for point in found["curve"]]
    least = 0.5 / found["test_images"]  # a log scale has no place for 0 wrong answers
    heading = _heading(found)
    with styled():
        figure, axes = page(
            heading, _origin(found), [_clocks(found)], left=LEFT, right=RIGHT, height=HEIGHT, below=BELOW
        )
        if way:
            x, y = np.array(way).T
            axes.plot(x, np.maximum(y, least), color=TRAIN, marker="o", markersize=4)
            axes.annotate(
                f"seed {runs[0]['seed']} on its way, the clock stopped at each point",
                (x[len(x) // 2], max(y[len(x) // 2], least)),
                xytext=(10, -12),
                textcoords="offset points",
                color=TRAIN,
            )
        axes.scatter(seconds, np.maximum(wrong, least), s=42, color=VALIDATION, edgecolor="white", zorder=3)
        mean = max(float(wrong.mean()), least)
        axes.axhline(mean, color=VALIDATION, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        count = "1 seed" if len(runs) == 1 else f"all {len(runs)} seeds"
        axes.annotate(
            f"{count} at the end, mean {percent(1 - mean)}",
            (0, mean),
            xytext=(6, 5),
            textcoords="offset points",
            color=VALIDATION,
        )
        every = [*wrong, *(share for _, share in way)]
        low, high = max(min(every), least) * 0.6, max(every) * 1.3
        axes.set_yscale("log")
        axes.set_ylim(high, low)  # accuracy grows upwards
        axes.set_xlim(0, max([*seconds, *(at for at, _ in way)]) * 1.06)
        shown = [share for share in GRID if low <= share <= high]
        axes.set_yticks(shown, [f"{100 * (1 - share):g} %" for share in shown])
        axes.set_yticks([], minor=True)
        axes.set_xlabel("seconds of training (loading, augmentation and steps; without set-up and evaluation)")
        axes.set_ylabel("accuracy on the test set", color=INK)
        axes.tick_params(colors=QUIET)
        for path in paths:
            save(figure, path, heading)


def _heading(found: Mapping[str, Any]) -> str:
    return (
        f"{percent(found['test_accuracy_mean'])} test accuracy on {found['dataset']} after "
        f"{seconds(found['train_seconds_mean'])} of training"
    )


def _origin(found: Mapping[str, Any]) -> str:
    n = found["n"]
    preset = f"preset {found['preset']}, " if found["preset"] != "none" else ""
    return (
        f"{preset}{'1 seed' if n == 1 else f'{n} seeds'}, standard deviation "
        f"{100 * found['test_accuracy_stdev']:.2f} points and {seconds(found['train_seconds_stdev'])}; "
        f"{found['train_images']:,} training images, {found['steps']:,} steps of {found['config']['batch_size']}; "
        f"{describe_hardware(found['hardware'])}; torch {found['versions']['torch']}; {found['date'][:10]}"
    )


def _clocks(found: Mapping[str, Any]) -> str:
    evaluate = np.mean([run["evaluate_seconds"] for run in found["runs"]])
    return (
        f"Not in it: imports {seconds(found['import_seconds'])}, data {seconds(found['data_seconds'])}, warm-up and "
        f"compile ({found['compile']}) {seconds(found['compile_seconds'])}, evaluation {seconds(float(evaluate))}."
    )
