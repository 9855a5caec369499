"""The three pictures of a run: learning curves, confusion matrix and predictions.

matplotlib is imported by the functions that draw, so that nothing else waits for it. Only its object API is
used: no pyplot, no open figures, no settings that outlive a call. The same input gives the same bytes.
"""

from __future__ import annotations

import io
import math
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastmnist.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
Points = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]

INK, QUIET, RULE = "#1f2328", "#57606a", "#d8dee4"
# Blue and orange of the Okabe-Ito palette, which colour-blind readers can tell apart; the orange is darker
# than theirs to be read as text on white.
TRAIN, VALIDATION = "#0072b2", "#b8500a"
STYLE: dict[Any, Any] = {
    "axes.edgecolor": QUIET,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "font.family": ["DejaVu Sans"],  # it comes with matplotlib, so text looks the same everywhere
    "font.size": 10,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "image.interpolation": "nearest",
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "savefig.dpi": 150,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called "$"
    "xtick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.color": QUIET,
    "ytick.labelcolor": INK,
}
MARKED_EPOCHS = 30  # with more epochs than this their boundaries are not drawn

FULL_COLOUR = 12  # this many mistakes in one cell, or the most there are, have the darkest colour
COLUMNS, WORST, RIGHT = 8, 24, 16  # tiles in a row, mistakes shown at most, right answers shown at most
LONGEST_NAME = 14  # characters under a tile


def plot_curves(records: Sequence[Record], path: Path) -> None:
    """Draw loss, error, learning rate and speed over a run's optimizer steps.

    Args:
        records: lines of metrics.jsonl, "step" and "epoch" records in any mixture; None and missing values
            leave a gap.
        path: the PNG to write, 1650 x 1200 pixels.

    Raises:
        ValueError: there are no records.
        FastmnistError: the file cannot be written.
    """
    if not records:
        raise ValueError("there are no records to plot: metrics.jsonl is empty")
    steps = [record for record in records if record.get("kind") == "step"]
    epochs = [record for record in records if record.get("kind") == "epoch"]
    with _styled():
        figure = _figure(11, 8)
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
        _save(figure, path)


def plot_confusion(confusion: npt.NDArray[np.int64], class_names: Sequence[str], path: Path, *, subject: str) -> None:
    """Draw the confusion matrix so that the mistakes stand out.

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
    names = [_drawable(name) for name in class_names]
    errors = confusion - np.diag(np.diag(confusion))
    cell = min(0.62, max(0.2, 7.4 / count))  # inches
    text = cell * 72 * 0.34  # points
    label = min(10.0, max(6.5, cell * 72 * 0.5))
    with _styled():
        from matplotlib.colors import LinearSegmentedColormap

        longest = max(map(len, names))
        turned = longest * label * 0.62 / 72 > cell
        room = min(2.5, longest * label * 0.62 / 72) + 0.55
        matrix, below, beside, above = cell * count, (room if turned else 0.7), 1.0, 1.15
        width, height = max(room + matrix + beside, 7.6), below + matrix + above
        figure = _figure(width, height, engine="none")
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
            share = _percent(int(confusion[row, row]), total, 1) if total else "no images"
            axes.text(count - 0.3, row, share, fontsize=label, color=QUIET, va="center_baseline")
        axes.text(count - 0.3, -0.75, "right", fontsize=label, color=QUIET, va="bottom")

        title, finding = _confusion_title(confusion, errors, names)
        figure.text(0.15 / width, 1 - 0.14 / height, title, fontsize=14, fontweight="bold", va="top")
        figure.text(0.15 / width, 1 - 0.44 / height, finding, fontsize=10, va="top")
        below_title = f"{_drawable(subject, 80)}; mistakes coloured by their number"
        figure.text(0.15 / width, 1 - 0.66 / height, below_title, fontsize=9, color=QUIET, va="top")
        _save(figure, path)


def plot_predictions(
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    probabilities: npt.NDArray[np.float32],
    class_names: Sequence[str],
    path: Path,
) -> None:
    """Draw the worst mistakes, then a sample of right answers spread over the classes.

    The worst mistake is the one with the largest gap between the probability of the predicted class and that
    of the true one.

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
        sections.append(
            (f"{shown} of these mistakes, the most confident first" if len(worst) > 1 else "It is this one",
             worst, VALIDATION)
        )  # fmt: skip
    if len(sample):
        sections.append(("Right answers, spread over the classes", sample, TRAIN))

    rows = sum(math.ceil(len(chosen) / COLUMNS) for _, chosen, _ in sections)
    tile_width, tile_height, header, top = 1.3, 1.76, 0.42, 0.5  # inches
    width = COLUMNS * tile_width + 0.3
    height = top + rows * tile_height + len(sections) * header + 0.1
    names = [_drawable(name, LONGEST_NAME) for name in class_names]
    side = 1.12
    with _styled():
        figure = _figure(width, height, engine="none")
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
                sure = _share(float(probabilities[index, answer]))
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
        _save(figure, path)


@contextmanager
def _styled() -> Iterator[None]:
    """STYLE on top of matplotlib's own defaults: the user's matplotlibrc changes nothing here."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _figure(width: float, height: float, engine: str = "constrained") -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=engine)  # type: ignore[arg-type]
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # no version: same input, same bytes
    write_bytes(path, buffer.getvalue())


def _step(record: Record) -> int:
    return int(record.get("step") or 0)


def _number(record: Record, key: str) -> float | None:
    """A finite number or None: a loss that overflowed has no place on an axis."""
    value = record.get(key)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _points(records: Sequence[Record], key: str) -> Points:
    pairs = [(_step(record), value) for record in records if (value := _number(record, key)) is not None]
    array = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _curves_title(steps: Sequence[Record], epochs: Sequence[Record]) -> str:
    if epochs:
        last = epochs[-1]
        done = int(last.get("epoch") or 0) + 1
        after = f" after {done} epoch{'s' if done != 1 else ''}"
        keys: tuple[tuple[str, str], ...] = (("val_accuracy", "Validation"), ("train_accuracy", "Training"))
    else:
        last = steps[-1] if steps else {}
        done = _step(last)
        after = f" after {done:,} step{'s' if done != 1 else ''}"
        keys = (("accuracy", "Training"),)
    seconds = _number(last, "seconds")
    clock = "" if seconds is None else f" ({_duration(seconds)})"
    for key, name in keys:
        accuracy = _number(last, key)
        if accuracy is not None:
            return f"{name} accuracy {_share(accuracy)}{after}{clock}"
    return f"Training{after}{clock}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:,.0f} s"


def _share(share: float) -> str:
    """A probability as per cent; 100 % and 0 % are kept for the exact values."""
    if 0.9995 <= share < 1:
        return ">99.9 %"
    if 0 < share < 0.0005:
        return "<0.1 %"
    return f"{100 * share:.1f} %" if 0 < share < 1 else f"{100 * share:.0f} %"


def _percent(part: int, whole: int, digits: int) -> str:
    """The share as per cent, never rounded up to 100."""
    if part == whole:
        return "100 %"
    return f"{min(100 * part / whole, 100 - 10.0**-digits):.{digits}f} %"


def _two_curves(
    steps: Sequence[Record],
    epochs: Sequence[Record],
    keys: tuple[str, str, str],
    change: Callable[[float], float],
) -> tuple[Points, Points, Points]:
    """Step, epoch and validation points of one quantity, each value sent through `change`."""
    curves = []
    for records, key in zip((steps, epochs, epochs), keys, strict=True):
        x, y = _points(records, key)
        curves.append((x, np.array([change(value) for value in y], dtype=np.float64)))
    return curves[0], curves[1], curves[2]


def _log_panel(
    axes: Axes, steps: Points, epochs: Points, validation: Points, show: Callable[[float], str], most: float
) -> None:
    """Noisy steps in pale, epoch means and validation in full colour, all labelled at their last point."""
    positive = np.concatenate([points[1] for points in (steps, epochs, validation)])
    positive = positive[positive > 0]
    if len(positive) == 0:
        _nothing(axes, "all zero" if len(steps[0]) + len(epochs[0]) + len(validation[0]) else "not recorded")
        return
    # Zero has no place on a log axis: it is drawn on the lower edge.
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
    """Ticks at 1, 2 and 5 times powers of ten, or at powers alone over many decades, written in full."""
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


def _square(at: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((at - 0.5, at - 0.5), 1, 1, facecolor="#eef1f4", edgecolor="none", zorder=1)


def _counts(axes: Axes, confusion: npt.NDArray[np.int64], shade: Any, cell: float, size: float) -> None:
    """The number in each cell that is not empty, left out where it would not fit."""
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
    title = f"{right:,} of {total:,} right ({_percent(right, total, 2)})"
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


@cache
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(findfont(FontProperties(family=["DejaVu Sans"]))).get_charmap())


def _drawable(name: str, longest: int = 24) -> str:
    """The name as one short line that the font can draw; a character that it lacks is given by its number."""
    line = " ".join(str(name).split())
    parts = []
    for character in line:
        if unicodedata.category(character)[0] == "C" or ord(character) not in _glyphs():
            parts.append(f"U+{ord(character):04X}")
        else:
            parts.append(character)
    text = "".join(parts)
    return text if len(text) <= longest else text[: longest - 1] + "…"
