"""Whether a model is as sure as it should be."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastmnist.report.style import QUIET, TRAIN, VALIDATION, new_figure, save, styled

# Most answers of a good model are more than 99 % sure: bins of equal width would hold them all in one.
EDGES = np.array([0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0])


class Calibration(NamedTuple):
    """Per bin that is not empty: sure, the mean probability; right, the share of right answers; answers, how many.

    error: the expected calibration error, the mean of |right - sure| over all answers.
    """

    sure: npt.NDArray[np.float64]
    right: npt.NDArray[np.float64]
    answers: npt.NDArray[np.int64]
    error: float


def calibration(probabilities: npt.NDArray[np.floating], labels: npt.NDArray[np.int64]) -> Calibration:
    """Of (N, C) probabilities and (N,) labels.

    M. P. Naeini et al., "Obtaining well calibrated probabilities using Bayesian binning", AAAI 2015.
    """
    confidence = probabilities.max(1).astype(np.float64)
    hit = probabilities.argmax(1) == labels
    bins = np.clip(np.searchsorted(EDGES, confidence, side="left") - 1, 0, len(EDGES) - 2)
    count = np.bincount(bins, minlength=len(EDGES) - 1)
    some = count > 0
    sure = np.bincount(bins, confidence, len(EDGES) - 1)[some] / count[some]
    right = np.bincount(bins, hit, len(EDGES) - 1)[some] / count[some]
    error = float((count[some] * np.abs(right - sure)).sum() / max(1, len(labels)))
    return Calibration(sure, right, count[some], error)


def plot_calibration(probabilities: npt.NDArray[np.floating], labels: npt.NDArray[np.int64], path: Path) -> Calibration:
    """Draws the share of right answers over how sure they were, and gives back what is drawn.

    Args:
        probabilities: (N, C). labels: (N,). path: the PNG to write.

    Raises:
        FastmnistError: the file cannot be written.
    """
    found = calibration(probabilities, labels)
    mean_sure = float(np.average(found.sure, weights=found.answers))
    mean_right = float(np.average(found.right, weights=found.answers))
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
        spread = np.maximum(np.sqrt(found.right * (1 - found.right) / found.answers), 0.5 / found.answers)
        axes.errorbar(found.sure, found.right, yerr=spread, fmt="o", color=TRAIN, ecolor=VALIDATION, capsize=2)
        for sure, right, count in zip(found.sure, found.right, found.answers, strict=True):
            if sure < 0.9:
                axes.annotate(f"{count:,}", (sure, right), xytext=(6, 4), textcoords="offset points", fontsize=8)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("probability of the answer (mean of a bin; small numbers: answers in it)")
        axes.set_ylabel("share of right answers, with its standard error")
        save(figure, path)
    return found
