"""Evaluation of a model on a whole split: probabilities, loss, accuracy, confusion matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix
from torch import nn
from torch.nn import functional

from fastmnist.loader.loader import Loader
from fastmnist.loader.normalise import Normaliser
from fastmnist.system.processes import gather, rank, world_size
from fastmnist.training.parallel import take_buffers_of_first

EVALUATION_BATCH = 500
EVALUATION_BATCH_ON_GPU = 2500  # a fifth of the launches, which bound an evaluation


@dataclass(frozen=True)
class Evaluation:
    """labels (N,) int64; probabilities (N, C) float32; loss: mean cross-entropy."""

    labels: np.ndarray
    probabilities: np.ndarray
    loss: float

    @property
    def predictions(self) -> np.ndarray:
        """(N,) int64: the most probable class."""
        predictions: np.ndarray = self.probabilities.argmax(1)
        return predictions

    @property
    def accuracy(self) -> float:
        return float((self.predictions == self.labels).mean())

    @property
    def mistakes(self) -> int:
        return int((self.predictions != self.labels).sum())

    def to_dict(self, class_names: Sequence[str]) -> dict[str, Any]:
        """Plain values, for --json."""
        confusion = self.confusion()
        shares = confusion.diagonal() / np.maximum(confusion.sum(1), 1)
        return {
            "test_accuracy": self.accuracy,
            "test_loss": self.loss,
            "test_images": len(self.labels),
            "per_class": dict(zip(class_names, shares.tolist(), strict=True)),
            "confusion": confusion.tolist(),
        }

    def confusion(self) -> np.ndarray:
        """(C, C) int64: rows are true classes, columns predictions."""
        matrix: np.ndarray = confusion_matrix(
            self.labels, self.predictions, labels=np.arange(self.probabilities.shape[1])
        )
        return matrix


class StopRequested(Exception):  # noqa: N818  # not an error
    """The user stopped something that has no use half done."""


@torch.inference_mode()
def evaluate_model(
    model: nn.Module,
    loader: Loader,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    shifted: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Evaluates the model on one epoch of a loader of uint8 images in the file's order.

    Several processes share the batches, and all return the whole: each image counts once. Always in float32, so that
    a run's accuracy is that of its saved weights anywhere.

    Args:
        mean, std: per channel, of the data that the model was trained on.
        shifted: average the logits of each image over itself and its shifts by one pixel in four directions.

    Raises:
        StopRequested: `stop`, asked before each batch, returned True in some process.
    """
    was_training = model.training
    model.eval()
    device = loader.device
    normalise = Normaliser(mean, std, device)
    take_buffers_of_first(model)
    own, stopped = {}, False
    try:
        for number, (images, labels) in enumerate(loader):
            if stopped := stop():
                break
            if number % world_size() == rank():
                logits = model(normalise(images)) if not shifted else _over_shifts(model, normalise, images)
                own[number] = logits, labels.clone()
    finally:
        model.train(was_training)
    if any(gather(stopped)):
        raise StopRequested
    batches = {number: found for shared in gather(_on_cpu(own)) for number, found in shared.items()}
    all_logits, all_labels = (torch.cat(parts) for parts in zip(*(batches[n] for n in sorted(batches)), strict=True))
    return Evaluation(
        labels=all_labels.cpu().numpy(),
        probabilities=all_logits.softmax(1).cpu().numpy(),
        loss=float(functional.cross_entropy(all_logits, all_labels)),
    )


def _on_cpu(batches: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """The batches as they travel between processes; as they are in a single one."""
    if world_size() == 1:
        return batches
    return {number: (logits.cpu(), labels.cpu()) for number, (logits, labels) in batches.items()}


def accuracy_interval(right: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of an accuracy of `right` out of `count` (E. B. Wilson, 1927).

    >>> low, high = accuracy_interval(9_914, 10_000)
    >>> f"{low:.2%} to {high:.2%}"
    '98.94% to 99.30%'
    """
    interval = binomtest(right, count).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def _over_shifts(model: nn.Module, normalise: Normaliser, images: torch.Tensor) -> torch.Tensor:
    height, width = images.shape[2:]
    padded = functional.pad(images, (1, 1, 1, 1))  # MNIST and its kin are black at the edges
    moved = [padded[:, :, y : y + height, x : x + width] for y, x in ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))]
    return torch.stack([model(normalise(view)) for view in moved]).mean(0)
