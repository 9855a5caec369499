"""Learning curves of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastmnist.report.style import QUIET, RULE, TRAIN, VALIDATION, new_figure, save, styled
from fastmnist.system import numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, Any]
Points = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]

MARKED_EPOCHS = 30  # with more epochs, their boundaries are not drawn


def plot_curves(records: Sequence[Record], path: Path) -> None:
    """Draws loss, error, learning rate and speed over a run's optimizer steps.

    Args:
        records: lines of metrics.jsonl, "step" and "epoch" records in any mixture; a missing value leaves a gap.
        path: the PNG to write, 1650 x 1200 pixels.

    Raises:
        ValueError: there are no records.
        FastmnistError: the file cannot be written.
    """
    if not records:
        raise ValueError("there are no records to plot: metrics.jsonl is empty")
    steps = [record for record in records if record.get("kind") == "step"]
    epochs = [record for record in records if record.get("kind") == "epoch"]
    with styled():
        figure = new_figure(11, 8)
        title = _curves_title(steps, epochs)
        figure.text(0.012, 0.982, title, fontsize=15, fontweight="bold", va="top")
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1, rect=(0, 0, 1, 0.945))
        loss, error, rate, speed = figure.subplots(2, 2).flat

        loss.set_title("Loss (cross-entropy)")
        loss.set_ylabel("nats per image, log scale")
        curves = _two_curves(steps, epochs, ("loss", "train_loss", "val_loss"), float)
        _log_panel(loss, *curves, _plain, math.inf)

        error.set_title("Error: images answered wrongly")
        error.set_ylabel("% of images, log scale")
        curves = _two_curves(
            steps, epochs, ("accuracy", "train_accuracy", "val_accuracy"), lambda share: 100 * (1 - share)
        )
        _log_panel(error, *curves, lambda value: f"{_plain(value)} %", 100)

        rate.set_title("Learning rate")
        rate.set_ylabel("learning rate")
        _plain_panel(rate, _points(steps, "learning_rate"))

        speed.set_title("Training speed, mean so far")
        speed.set_ylabel("images per second")
        drawn = steps if len(steps) > 1 else [*steps, *epochs]
        _plain_panel(speed, _points(sorted(drawn, key=_step), "images_per_second"))
        speed.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")

        last = max(_step(record) for record in records)
        for axes in (loss, error, rate, speed):
            axes.set_xlabel("optimizer steps")
            axes.set_xlim(0, max(1, last) * 1.02)
            axes.xaxis.get_major_locator().set_params(integer=True, nbins=7)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.grid(visible=False, axis="x")
            if 1 < len(epochs) <= MARKED_EPOCHS:
                for record in epochs:
                    axes.axvline(_step(record), color=RULE, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
        if 1 < len(epochs) <= MARKED_EPOCHS:
            rate.set_xlabel("optimizer steps (dashed: end of an epoch)")
            speed.set_xlabel("optimizer steps (dashed: end of an epoch)")
        save(figure, path)


def _step(record: Record) -> int:
    return int(record.get("step") or 0)


def _number(record: Record, key: str) -> float | None:
    """A finite number, or None: no axis has a place for a loss that overflowed."""
    value = record.get(key)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _points(records: Sequence[Record], key: str) -> Points:
    pairs = [(_step(record), value) for record in records if (value := _number(record, key)) is not None]
    array = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _curves_title(steps: Sequence[Record], epochs: Sequence[Record]) -> str:
    if epochs:
        last = epochs[-1]
        epochs_done = float(last.get("epochs") or int(last.get("epoch") or 0) + 1)
        after = f" after {epochs_done:.3g} epoch{'s' if epochs_done != 1 else ''}"
        keys: tuple[tuple[str, str], ...] = (("val_accuracy", "Validation"), ("train_accuracy", "Training"))
    else:
        last = steps[-1] if steps else {}
        done = _step(last)
        after = f" after {done:,} step{'s' if done != 1 else ''}"
        keys = (("accuracy", "Training"),)
    seconds = _number(last, "seconds")
    clock = "" if seconds is None else f" ({numbers.seconds(seconds, 1)})"
    for key, name in keys:
        accuracy = _number(last, key)
        if accuracy is not None:
            return f"{name} accuracy {numbers.probability(accuracy)}{after}{clock}"
    return f"Training{after}{clock}"


def _two_curves(
    steps: Sequence[Record],
    epochs: Sequence[Record],
    keys: tuple[str, str, str],
    change: Callable[[float], float],
) -> tuple[Points, Points, Points]:
    """Step, epoch and validation points of one quantity, their values mapped by `change`."""
    curves = []
    for records, key in zip((steps, epochs, epochs), keys, strict=True):
        x, y = _points(records, key)
        curves.append((x, np.array([change(value) for value in y], dtype=np.float64)))
    return curves[0], curves[1], curves[2]


def _log_panel(
    axes: Axes, steps: Points, epochs: Points, validation: Points, show: Callable[[float], str], most: float
) -> None:
    """Draws steps pale, epoch means and validation in full colour, and names all with their last values."""
    positive = np.concatenate([points[1] for points in (steps, epochs, validation)])
    positive = positive[positive > 0]
    if len(positive) == 0:
        _nothing(axes, "all zero" if len(steps[0]) + len(epochs[0]) + len(validation[0]) else "not recorded")
        return
    # A log axis has no zero: it is drawn on the lower edge.
    floor = float(positive.min()) * 0.7
    ceiling = min(float(positive.max()) * 1.4, most * 1.02)
    axes.set_yscale("log")
    axes.set_ylim(floor, ceiling)
    _label_log_axis(axes, floor, ceiling)

    labels = []
    for points, colour, name in (
        (steps, TRAIN, "training steps"),
        (epochs, TRAIN, "training"),
        (validation, VALIDATION, "validation"),
    ):
        x, y = points[0], np.maximum(points[1], floor)
        if len(x) == 0:
            continue
        noisy = points is steps
        pale = noisy and len(epochs[0]) > 0
        dots = len(x) == 1 if noisy else len(x) <= MARKED_EPOCHS
        axes.plot(
            x, y, color=colour, alpha=0.4 if pale else 1, linewidth=1 if noisy else 1.8,
            marker="o" if dots else "", markersize=5,
        )  # fmt: skip
        if pale:
            labels.append((math.inf, "each logged step, pale", colour))
        else:
            labels.append((-y[-1], f"{name} {show(points[1][-1])}", colour))
    # Losses and errors fall, so the upper right corner is free for the names, ordered as the ends are.
    for place, (_, text, colour) in enumerate(sorted(labels)):
        pale = text.endswith("pale")
        axes.text(
            0.98, 0.94 - 0.075 * place, text, transform=axes.transAxes, ha="right", va="center", color=colour,
            fontsize=9 if pale else 10, fontweight="normal" if pale else "bold",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
        )  # fmt: skip


def _label_log_axis(axes: Axes, floor: float, ceiling: float) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, over many decades at powers alone, written in full."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    decades = math.log10(ceiling / floor)
    factors = (1, 2, 5) if decades <= 3 else (1,)
    if decades < 0.7:
        factors = tuple(range(1, 10))  # type: ignore[assignment]
    first, last = math.floor(math.log10(floor)), math.ceil(math.log10(ceiling))
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if floor <= tick <= ceiling]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _plain_panel(axes: Axes, points: Points) -> None:
    x, y = points
    if len(x) == 0:
        _nothing(axes, "not recorded")
        return
    axes.plot(x, y, color=TRAIN, marker="o" if len(x) <= 3 else "", markersize=5)
    axes.set_ylim(0, max(float(y.max()) * 1.1, 1e-12))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _nothing(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=QUIET)
    axes.set_yticks([])


def _plain(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"
