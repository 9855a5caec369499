"""Shuffled batches of normalised float32, epochs of 60,000 images, against a plain copy of as many floats.

The others gather a batch of bytes by `index_select` and then normalise it; their permutation is ready before the clock
starts. A share above 1: batches come and go in memory that stays in the processor's cache, which the copy's do not.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torchvision.transforms import v2

from fastmnist.loader.loader import Loader

BATCH_SIZE, EPOCHS = 512, 12  # epochs in a round: about a tenth of a second
Normalise = Callable[[torch.Tensor], torch.Tensor]


def eager(data) -> Normalise:
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in data.moments)
    return lambda images: (images.to(torch.float32) / 255 - mean) / std


def in_place(data) -> Normalise:
    """The same without memory for each result in between, and with one multiplication for the two divisions."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in data.moments)
    scale, shift = 1 / (255 * std), -mean / std
    return lambda images: images.to(torch.float32).mul_(scale).add_(shift)


def transforms(data) -> Normalise:
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(*data.moments)])


OURS = {"fastmnist.Loader": {"threads": 0}, "fastmnist.Loader, 1 thread": {"threads": 1}}
OTHERS = {"torch, eager": eager, "torch, in place": in_place, "torchvision.transforms.v2": transforms}


@pytest.fixture(scope="module")
def copy(data):
    return data.copying(torch.float32)


@pytest.mark.benchmark(group="normalise")
@pytest.mark.parametrize("side", [*OURS, *OTHERS])
def test_float32(side, data, measure, copy):
    images, labels = data.images.permute(0, 3, 1, 2), data.labels
    parts: list[torch.Tensor] = []
    if side in OURS:
        loader = Loader(data.path, BATCH_SIZE, device="cpu", dtype=torch.float32, **OURS[side])
    else:
        normalise = OTHERS[side](data)

    def shuffle() -> None:
        parts[:] = [part for _ in range(EPOCHS) for part in torch.randperm(data.count).split(BATCH_SIZE)]

    def ours() -> None:
        for _ in range(EPOCHS):
            for _ in loader:
                pass

    def others() -> None:
        for part in parts:
            normalise(images.index_select(0, part))
            labels.index_select(0, part)

    measure(
        ours if side in OURS else others,
        setup=shuffle,
        images=EPOCHS * data.count,
        limit=copy,
        settings={"batch_size": BATCH_SIZE, **OURS.get(side, {})},
    )
