"""Reliability diagram: accuracy over confidence."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import binned_statistic

from fastmnist.report.style import QUIET, TRAIN, VALIDATION, new_figure, save, styled
from fastmnist.training.evaluate import accuracy_interval

# A good model is more than 99 % sure of most answers: equal widths would put them all into one bin, and equal counts
# (scikit-learn's calibration_curve has these two) would show nothing of the others.
EDGES = np.array([0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0])


class Calibration(NamedTuple):
    """Per bin that is not empty, (bins,): its number, the mean confidence, the accuracy, and the number of answers.

    error: expected calibration error, the mean of |right - sure| over all answers.
    """

    bins: npt.NDArray[np.int64]
    sure: npt.NDArray[np.float64]
    right: npt.NDArray[np.float64]
    answers: npt.NDArray[np.int64]
    error: float


def calibration(probabilities: npt.NDArray[np.floating], labels: npt.NDArray[np.int64]) -> Calibration:
    """Calibration of probabilities (N, C) against labels (N,).

    M. P. Naeini et al., "Obtaining well calibrated probabilities using Bayesian binning", AAAI 2015.

    >>> sure = np.array([[0.6, 0.4], [0.35, 0.65], [0.96, 0.04], [0.97, 0.03]])  # (N, C)
    >>> calibration(sure, np.array([0, 0, 0, 0])).right
    array([0.5, 1. ])
    """
    confidence = np.minimum(probabilities.max(1), 1.0)
    correct = probabilities.argmax(1) == labels
    means, _, bins = binned_statistic(confidence, [confidence, correct], "mean", EDGES)
    answers = np.bincount(bins - 1, minlength=len(EDGES) - 1)
    filled = np.flatnonzero(answers)
    (sure, right), answers = means[:, filled], answers[filled]
    error = float(np.average(np.abs(right - sure), weights=answers))
    return Calibration(filled, sure, right, answers, error)


def plot_calibration(probabilities: npt.NDArray[np.floating], labels: npt.NDArray[np.int64], path: Path) -> Calibration:
    """Draws the accuracy and the number of answers by their confidence as a PNG, and returns what is drawn.

    Raises:
        FastmnistError: the file cannot be written.
    """
    drawn = calibration(probabilities, labels)
    mean_sure = float(np.average(drawn.sure, weights=drawn.answers))
    mean_right = float(np.average(drawn.right, weights=drawn.answers))
    way = "too unsure" if mean_right > mean_sure else "too sure"
    names = [f"{100 * EDGES[at]:g} to\n{100 * EDGES[at + 1]:g}" for at in drawn.bins]
    places = np.arange(len(names))
    counts = zip(np.rint(drawn.right * drawn.answers).astype(int).tolist(), drawn.answers.tolist(), strict=True)
    intervals = np.array([accuracy_interval(*count) for count in counts])
    with styled():
        figure = new_figure(8, 6)
        figure.suptitle(
            f"On average {100 * mean_sure:.1f} % sure and {100 * mean_right:.1f} % right: {way} "
            f"by {100 * abs(mean_right - mean_sure):.1f} points",
            x=0.01,
            ha="left",
            fontweight="bold",
        )
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        axes.vlines(places, *intervals.T, color=TRAIN, linewidth=2)
        axes.plot(places, drawn.right, "o", color=TRAIN, label="right answers, with the 95 % interval")
        axes.plot(places, drawn.sure, "_", color=VALIDATION, markersize=26, markeredgewidth=3, label="mean probability")
        axes.set_ylim(0, 1.02)
        axes.set_ylabel("share of the bin's answers")
        axes.legend(loc="lower right", frameon=False)
        for place, count in zip(places, drawn.answers, strict=True):
            below.annotate(
                f"{count:,}", (place, count), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=9
            )
        below.bar(places, drawn.answers, color=QUIET, width=0.7)
        below.set_ylim(0, 1.3 * drawn.answers.max())
        below.set_xticks(places, names)
        below.set_ylabel("answers")
        below.set_xlabel("probability that the model gave its answer (%)")
        axes.grid(visible=False, axis="x")
        below.grid(visible=False)
        save(figure, path)
    return drawn
