"""Batches moved at random (shift, rotation, size), normalised, float32; against a plain copy of as many floats.

Epochs of 60,000 images, each with a transform of its own; but of torchvision's transforms, which draw once for all
that they are handed and so are called image by image, one in 30.
"""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import v2

from fastmnist.loader.augment import Augmentation, warp_on_device
from fastmnist.loader.loader import Loader
from fastmnist.loader.normalise import Normaliser

BATCH_SIZE, EPOCHS, ONE_IN = 512, 3, 30  # epochs in a round: about a tenth of a second of ours
MOVES = Augmentation(shift=2.0, rotation=8.0, scale=0.08)


def loader(data, threads: int):
    batches = Loader(data.path, BATCH_SIZE, device="cpu", dtype=torch.float32, augment=MOVES, threads=threads)

    def epoch() -> None:
        for _ in batches:
            pass

    return epoch


def grid_sample(data):
    images, normalise = data.images.permute(0, 3, 1, 2), Normaliser(*data.moments)
    height, width = images.shape[-2:]

    def epoch() -> None:
        matrices = torch.from_numpy(MOVES.matrices(MOVES.draw(data.count, 0, 0), (height, width)))
        for part in torch.randperm(data.count).split(BATCH_SIZE):
            normalise(warp_on_device(images.index_select(0, part).to(torch.float32), matrices[part]))
            data.labels.index_select(0, part)

    return epoch


def random_affine(data):
    images = data.images.permute(0, 3, 1, 2)
    height, width = images.shape[-2:]
    affine = v2.RandomAffine(
        MOVES.rotation,
        (MOVES.shift / width, MOVES.shift / height),
        (1 - MOVES.scale, 1 + MOVES.scale),
        interpolation=v2.InterpolationMode.BILINEAR,
    )
    transform = v2.Compose([affine, v2.ToDtype(torch.float32, scale=True), v2.Normalize(*data.moments)])

    def some() -> None:
        for part in torch.randperm(data.count)[: data.count // ONE_IN].split(BATCH_SIZE):
            torch.stack([transform(images[row]) for row in part.tolist()])
            data.labels.index_select(0, part)

    return some


SIDES = {
    "fastmnist.Loader": (lambda data: loader(data, 0), {"threads": 0}),
    "fastmnist.Loader, 1 thread": (lambda data: loader(data, 1), {"threads": 1}),
    "torch, grid_sample": (grid_sample, {}),
    "torchvision, RandomAffine": (random_affine, {"one_image_in": ONE_IN}),
}


@pytest.fixture(scope="module")
def copy(data):
    return data.copying(torch.float32)


@pytest.mark.benchmark(group="augment")
@pytest.mark.parametrize("side", SIDES)
def test_augmented(side, data, measure, copy):
    make, settings = SIDES[side]
    epoch = make(data)
    epochs, images = (1, data.count // ONE_IN) if "one_image_in" in settings else (EPOCHS, EPOCHS * data.count)

    def several() -> None:
        for _ in range(epochs):
            epoch()

    measure(several, images=images, limit=copy, settings={"batch_size": BATCH_SIZE, **settings})
