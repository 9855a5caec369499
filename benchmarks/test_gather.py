"""Shuffled batches of bytes in memory, epochs of 60,000 images, against a plain copy of as many.

Every side gathers images and labels. The permutation of the others is ready before their clock starts, and batches that
are gathered into one buffer cannot be kept; ours draws its own, and all its batches can be kept.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastmnist.loader.loader import Loader

BATCH_SIZE, EPOCHS = 512, 36  # epochs in a round: about a tenth of a second
Round = tuple[Callable[[], None], Callable[[], None]]  # what comes before the clock starts, and what is timed


def loader(data, threads: int) -> Round:
    batches = Loader(data.path, BATCH_SIZE, device="cpu", threads=threads)

    def epochs() -> None:
        for _ in range(EPOCHS):
            for _ in batches:
                pass

    return lambda: None, epochs


def in_parts(data, gather: Callable[[torch.Tensor], None]) -> Round:
    """gather: called with the samples of each batch."""
    parts: list[torch.Tensor] = []

    def shuffle() -> None:
        whole = data.count // BATCH_SIZE * BATCH_SIZE
        parts[:] = [part for _ in range(EPOCHS) for part in torch.randperm(data.count)[:whole].split(BATCH_SIZE)]

    def epochs() -> None:
        for part in parts:
            gather(part)

    return shuffle, epochs


def index_select(data) -> Round:
    images, labels = data.images.flatten(1), data.labels
    out = torch.empty((BATCH_SIZE, images.shape[1]), dtype=torch.uint8), torch.empty(BATCH_SIZE, dtype=torch.int64)

    def gather(part: torch.Tensor) -> None:
        torch.index_select(images, 0, part, out=out[0])
        torch.index_select(labels, 0, part, out=out[1])

    return in_parts(data, gather)


def take(data) -> Round:
    images, labels = data.images.flatten(1).numpy(), data.labels.numpy()
    out = np.empty((BATCH_SIZE, images.shape[1]), np.uint8), np.empty(BATCH_SIZE, np.int64)

    def gather(part: torch.Tensor) -> None:
        rows = part.numpy()
        np.take(images, rows, 0, out=out[0], mode="clip")  # "raise" would copy through a buffer
        np.take(labels, rows, 0, out=out[1], mode="clip")

    return in_parts(data, gather)


def indexing(data) -> Round:
    images, labels = data.images, data.labels
    return in_parts(data, lambda part: (images[part], labels[part]))


SIDES = {
    "fastmnist.Loader": (lambda data: loader(data, 0), {"threads": 0}),
    "fastmnist.Loader, 1 thread": (lambda data: loader(data, 1), {"threads": 1}),
    "torch.index_select(out=)": (index_select, {}),
    "np.take(out=)": (take, {}),
    "X[permutation]": (indexing, {}),
}


@pytest.fixture(scope="module")
def copy(data):
    return data.copying(torch.uint8)


@pytest.mark.benchmark(group="gather")
@pytest.mark.parametrize("side", SIDES)
def test_bytes(side, data, measure, copy):
    make, settings = SIDES[side]
    setup, epochs = make(data)
    images = EPOCHS * data.count if side.startswith("fastmnist") else EPOCHS * (data.count // BATCH_SIZE * BATCH_SIZE)
    measure(epochs, setup=setup, images=images, limit=copy, settings={"batch_size": BATCH_SIZE, **settings})
