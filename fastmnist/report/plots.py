"""Pictures of a model's answers on a test set: confusion matrix, worst mistakes, right answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastmnist.report.style import (
    INK,
    QUIET,
    RULE,
    TRAIN,
    VALIDATION,
    drawable,
    new_figure,
    save,
    styled,
)
from fastmnist.system.numbers import percent, probability

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FULL_COLOUR = 12  # mistakes in one cell from which on the fullest cell has the darkest colour
COLUMNS, WORST, RIGHT = 8, 24, 16  # tiles in a row; most mistakes and most right answers shown
LONGEST_NAME = 14  # characters under a tile


def plot_confusion(confusion: npt.NDArray[np.int64], class_names: Sequence[str], path: Path, *, subject: str) -> None:
    """Draws the confusion matrix so that the mistakes stand out.

    Args:
        confusion: (C, C) int64 counts; rows are true classes, columns predicted ones.
        class_names: C names.
        path: the PNG to write.
        subject: what was evaluated, such as "mnist, 10,000 test images".

    Raises:
        ValueError: the matrix is not square, or the number of names is not C.
        FastmnistError: the file cannot be written.
    """
    count = len(class_names)
    if confusion.shape != (count, count) or count == 0:
        raise ValueError(f"a confusion matrix of shape {confusion.shape} does not fit {count} class names")
    names = [drawable(name) for name in class_names]
    errors = confusion - np.diag(np.diag(confusion))
    cell = min(0.62, max(0.2, 7.4 / count))  # inches
    text = cell * 72 * 0.34  # points
    label = min(10.0, max(6.5, cell * 72 * 0.5))
    with styled():
        from matplotlib.colors import LinearSegmentedColormap

        longest = max(map(len, names))
        turned = longest * label * 0.62 / 72 > cell
        room = min(2.5, longest * label * 0.62 / 72) + 0.55
        matrix, below, beside, above = cell * count, (room if turned else 0.7), 1.0, 1.15
        width, height = max(room + matrix + beside, 7.6), below + matrix + above
        figure = new_figure(width, height, engine="none")
        axes = figure.add_axes((room / width, below / height, matrix / width, matrix / height))

        # The diagonal stays grey: on any scale that shows it, a few mistakes among hundreds would be white.
        colours = LinearSegmentedColormap.from_list("mistakes", ["#fde8d7", "#f4a261", "#c2410c", "#6b1d06"])
        most = int(errors.max())
        # The square root keeps single mistakes apart from none and from many; a handful is never at its end.
        shade = np.ma.masked_where(errors <= 0, np.sqrt(np.maximum(errors, 0) / max(most, FULL_COLOUR)))
        axes.imshow(shade, cmap=colours, vmin=0, vmax=1)
        for at in range(count):
            axes.add_patch(_square(at))
        _counts(axes, confusion, shade, cell, text)

        axes.set_xticks(range(count), names, fontsize=label, rotation=90 if turned else 0)
        axes.set_yticks(range(count), names, fontsize=label)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
        axes.tick_params(which="minor", length=0)
        axes.grid(visible=True, which="minor", color=RULE, linewidth=0.5)
        axes.spines[:].set_visible(False)
        for row in range(count):
            total = int(confusion[row].sum())
            share = percent(confusion[row, row] / total, 1) if total else "no images"
            axes.text(count - 0.3, row, share, fontsize=label, color=QUIET, va="center_baseline")
        axes.text(count - 0.3, -0.75, "right", fontsize=label, color=QUIET, va="bottom")

        title, finding = _confusion_title(confusion, errors, names)
        figure.text(0.15 / width, 1 - 0.14 / height, title, fontsize=14, fontweight="bold", va="top")
        figure.text(0.15 / width, 1 - 0.44 / height, finding, fontsize=10, va="top")
        below_title = f"{drawable(subject, 80)}; mistakes coloured by their number"
        figure.text(0.15 / width, 1 - 0.66 / height, below_title, fontsize=9, color=QUIET, va="top")
        save(figure, path)


def plot_predictions(
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    probabilities: npt.NDArray[np.float32],
    class_names: Sequence[str],
    path: Path,
) -> None:
    """Draws the worst mistakes, then a sample of right answers spread over the classes.

    A mistake is worse the further the probability of its predicted class lies above that of the true one.

    Args:
        images: (N, H, W) or (N, H, W, C) uint8, C being 1, 3 or 4.
        labels: (N,) int64, true classes.
        probabilities: (N, number of classes) float32.
        class_names: one name for each class.
        path: the PNG to write.

    Raises:
        ValueError: the shapes do not fit, or there are no images.
        FastmnistError: the file cannot be written.
    """
    count = len(labels)
    if count == 0 or len(images) != count or probabilities.shape != (count, len(class_names)):
        raise ValueError(
            f"{len(images)} images, {count} labels, probabilities of shape {probabilities.shape} and "
            f"{len(class_names)} class names do not fit together"
        )
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    predicted = probabilities.argmax(axis=1)
    everyone = np.arange(count)
    gap = probabilities[everyone, predicted] - probabilities[everyone, labels]
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-gap[wrong], kind="stable")][:WORST]
    sample = _spread(np.flatnonzero(predicted == labels), labels, RIGHT)
    mistakes = f"{len(wrong):,} of {count:,} images answered wrongly"
    sections = []
    if len(worst):
        shown = f"The {len(worst)} worst" if len(wrong) > len(worst) else f"All {len(worst)}"
        heading = f"{shown} of these mistakes, most confidently wrong first"
        sections.append((heading if len(worst) > 1 else "It is this one", worst, VALIDATION))
    if len(sample):
        sections.append(("Right answers, spread over the classes", sample, TRAIN))

    rows = sum(math.ceil(len(chosen) / COLUMNS) for _, chosen, _ in sections)
    tile_width, tile_height, header, top = 1.3, 1.76, 0.42, 0.5  # inches
    width = COLUMNS * tile_width + 0.3
    height = top + rows * tile_height + len(sections) * header + 0.1
    names = [drawable(name, LONGEST_NAME) for name in class_names]
    side = 1.12
    with styled():
        figure = new_figure(width, height, engine="none")
        axes = figure.add_axes((0, 0, 1, 1))
        figure.text(0.15 / width, 1 - 0.15 / height, mistakes, fontsize=15, fontweight="bold", va="top")
        y = top
        for heading, chosen, colour in sections:
            axes.text(0.15, y + 0.12, heading, fontsize=11, fontweight="bold", color=colour, va="top")
            y += header
            for place, index in enumerate(chosen):
                left = 0.15 + place % COLUMNS * tile_width + (tile_width - side) / 2
                upper = y + place // COLUMNS * tile_height
                _tile(axes, images[index], left, upper, side)
                true, answer = int(labels[index]), int(predicted[index])
                sure = probability(float(probabilities[index, answer]))
                lines = (
                    (f"true: {names[true]}", INK),
                    (f"read: {names[answer]}", colour),
                    (f"{sure} sure", colour),
                )
                for line, (text, tint) in enumerate(lines):
                    below = upper + side + 0.04 + 0.15 * line
                    axes.text(left + side / 2, below, text, fontsize=8, ha="center", va="top", color=tint)
            y += math.ceil(len(chosen) / COLUMNS) * tile_height
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        axes.set_aspect("auto")
        axes.set_axis_off()
        save(figure, path)


def _square(at: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((at - 0.5, at - 0.5), 1, 1, facecolor="#eef1f4", edgecolor="none", zorder=1)


def _counts(axes: Axes, confusion: npt.NDArray[np.int64], shade: Any, cell: float, size: float) -> None:
    """Writes the number into each cell that is not empty and has room for it."""
    fits = int(cell * 72 * 0.9 / (0.636 * size))  # 0.636: width of DejaVu Sans's digits over their size
    for row, column in zip(*np.nonzero(confusion), strict=True):
        text = str(confusion[row, column])
        own = row == column
        if own and len(text) > fits and len(text) <= fits + 1:
            axes.text(column, row, text, fontsize=size * 0.78, ha="center", va="center_baseline", color=QUIET)
        elif len(text) <= fits:
            dark = not own and shade[row, column] > 0.55
            colour = QUIET if own else "white" if dark else INK
            axes.text(column, row, text, fontsize=size, ha="center", va="center_baseline", color=colour)


def _confusion_title(
    confusion: npt.NDArray[np.int64], errors: npt.NDArray[np.int64], names: Sequence[str]
) -> tuple[str, str]:
    total, right = int(confusion.sum()), int(np.trace(confusion))
    if total == 0:
        return "Nothing was evaluated", "The matrix is empty"
    title = f"{right:,} of {total:,} right ({percent(right / total)})"
    if right == total:
        return title, "No mistakes"
    row, column = divmod(int(errors.argmax()), len(names))
    times = int(errors[row, column])
    often = "once" if times == 1 else f"{times:,} times"
    return title, f"Most frequent mistake: {names[row]} read as {names[column]}, {often}"


def _spread(candidates: npt.NDArray[np.intp], labels: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.intp]:
    """At most `most` of the candidates, in order of class: as even over the classes as they allow."""
    by_class = [candidates[labels[candidates] == label] for label in np.unique(labels[candidates])]
    if len(by_class) > most:
        kept = np.linspace(0, len(by_class) - 1, most).round().astype(int)
        by_class = [by_class[at] for at in kept]
    turns = [(turn, at) for at, members in enumerate(by_class) for turn in range(min(len(members), most))]
    chosen = sorted(turns)[:most]
    return np.array([by_class[at][turn] for turn, at in sorted(chosen, key=lambda pair: pair[::-1])], dtype=np.intp)


def _tile(axes: Axes, image: npt.NDArray[np.uint8], left: float, upper: float, side: float) -> None:
    height, width = image.shape[:2]
    scale = side / max(height, width)
    x, y = left + (side - width * scale) / 2, upper + (side - height * scale) / 2
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=(x, x + width * scale, y + height * scale, y))
