"""Reliability diagram: accuracy over confidence."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import binned_statistic

from fastmnist.report.style import QUIET, TRAIN, VALIDATION, new_figure, save, styled

# A good model is more than 99 % sure of most answers: equal widths would put them all into one bin, and equal counts
# (scikit-learn's calibration_curve has these two) would show nothing of the others.
EDGES = np.array([0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0])


class Calibration(NamedTuple):
    """Per bin that is not empty, (bins,): sure, the mean confidence; right, the accuracy; answers, their number.

    error: expected calibration error, the mean of |right - sure| over all answers.
    """

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
    (sure, right), answers = means[:, answers > 0], answers[answers > 0]
    error = float(np.average(np.abs(right - sure), weights=answers))
    return Calibration(sure, right, answers, error)


def plot_calibration(probabilities: npt.NDArray[np.floating], labels: npt.NDArray[np.int64], path: Path) -> Calibration:
    """Draws the accuracy of answers over their confidence as a PNG, and returns what is drawn.

    Raises:
        FastmnistError: the file cannot be written.
    """
    drawn = calibration(probabilities, labels)
    mean_sure = float(np.average(drawn.sure, weights=drawn.answers))
    mean_right = float(np.average(drawn.right, weights=drawn.answers))
    way = "too unsure" if mean_right > mean_sure else "too sure"
    with styled():
        figure = new_figure(7, 6)
        axes = figure.subplots()
        axes.set_title(
            f"On average {100 * mean_sure:.1f} % sure and {100 * mean_right:.1f} % right: {way} "
            f"by {100 * abs(mean_right - mean_sure):.1f} points"
        )
        axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            "as sure as right", (0.22, 0.22), xytext=(4, -14), textcoords="offset points", color=QUIET, fontsize=9
        )
        # The standard error of a share, or half an answer where all or none are right.
        spread = np.maximum(np.sqrt(drawn.right * (1 - drawn.right) / drawn.answers), 0.5 / drawn.answers)
        axes.errorbar(drawn.sure, drawn.right, yerr=spread, fmt="o", color=TRAIN, ecolor=VALIDATION, capsize=2)
        for sure, right, count in zip(drawn.sure, drawn.right, drawn.answers, strict=True):
            if sure < 0.9:
                axes.annotate(f"{count:,}", (sure, right), xytext=(6, 4), textcoords="offset points", fontsize=8)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("probability of the answer (mean of a bin; small numbers: answers in it)")
        axes.set_ylabel("share of right answers, with its standard error")
        save(figure, path)
    return drawn
