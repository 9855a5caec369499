"""By which moments images are normalised: a training file's own, and for any other file those that are given."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from fastmnist.baselines.loaders import LOADERS
from fastmnist.beton.reader import Beton
from fastmnist.beton.writer import write_beton
from fastmnist.errors import ConfigError, DataError
from fastmnist.loader.augment import Augmentation
from fastmnist.loader.loader import Loader
from tests.loader.batches import assert_same_batches, copied, values_of

FLOAT = {"device": "cpu", "dtype": torch.float32, "shuffle": False}


@pytest.fixture(scope="module")
def splits(scratch):
    """{split: path} of files with other moments each; images of two channels."""
    folder, paths = scratch(), {}
    for seed, split in enumerate(("train", "test", "")):
        images = np.random.default_rng(seed).integers(0, 200 + seed * 20, (37, 6, 5, 2), np.uint8)
        paths[split] = write_beton(folder / f"a-{split}.beton", images, np.zeros(37, int), split=split)
    return paths


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("placement", ["stream", "resident"])
@pytest.mark.parametrize("how", ["path", "text", "file", "pair", "array"])
def test_a_second_file_is_normalised_like_the_first(splits, dtype, placement, how):
    with Beton(splits["train"]) as train, Beton(splits["test"]) as test:
        given = {
            "path": splits["train"],
            "text": str(splits["train"]),
            "file": train,
            "pair": train.moments,
            "array": np.array(train.moments),
        }
        options = FLOAT | {"dtype": dtype, "placement": placement}
        with Loader(splits["test"], 37, **options, moments=given[how]) as loader:
            [(images, _)] = loader
            assert torch.equal(images, values_of(test.images(np.arange(37)), train.moments, dtype))
            assert loader.moments == train.moments != test.moments


def test_a_training_file_brings_its_own(splits, scratch):
    with Beton(splits["train"]) as train, Loader(splits["train"], 37, **FLOAT) as loader:
        [(images, _)] = loader
        assert torch.equal(images, values_of(train.images(np.arange(37)), train.moments, torch.float32))


@pytest.mark.parametrize("split", ["test", ""])
def test_any_other_file_needs_them(splits, split):
    for kind, options in ((Loader, FLOAT), (LOADERS["dataloader"], {"device": "cpu"})):
        with pytest.raises(ConfigError, match="moments="):
            kind(splits[split], **options)
    with Loader(splits[split], device="cpu") as loader:  # the stored values
        assert loader.moments is None


def test_augmented_images_are_normalised_by_them_too(splits):
    nothing = Augmentation(0.0, 0.0, 0.0)
    options = FLOAT | {"moments": splits["train"]}
    with (
        Loader(splits["test"], 10, **options, augment=nothing) as still,
        Loader(splits["test"], 10, **options) as plain,
    ):
        for (found, _), (expected, _) in zip(still, plain, strict=True):
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_a_copy_keeps_them(splits):
    with Loader(splits["test"], 10, **FLOAT, moments=splits["train"]) as loader:
        expected = copied(loader)
        loader.set_epoch(0)
        with pickle.loads(pickle.dumps(loader)) as copy:
            assert_same_batches(copy, expected)


def test_stored_values_take_none(samples):
    with pytest.raises(ConfigError, match="moments"):
        Loader(samples[0], device="cpu", moments=samples[0])


def test_one_channel_takes_plain_numbers(samples):
    with Loader(samples[0], **FLOAT, moments=(0.25, 0.5)) as loader:
        assert loader.moments == ((0.25,), (0.5,))


@pytest.mark.parametrize(
    "moments",
    [
        ((0.1,), (0.2,)),  # one channel of two
        ((0.1, 0.1), (0.2, 0.0)),
        ((0.1, float("nan")), (0.2, 0.2)),
        ((0.1, 0.1), (0.2, 0.2), (0.3, 0.3)),
        0.5,
        (("a", "b"), (0.2, 0.2)),
    ],
)
def test_moments_that_cannot_work_are_refused(splits, moments):
    with pytest.raises(ConfigError, match="moments"):
        Loader(splits["test"], **FLOAT, moments=moments)


def test_a_file_of_moments_that_is_not_there_is_named(splits):
    with pytest.raises(DataError, match="nowhere"):
        Loader(splits["test"], **FLOAT, moments="nowhere.beton")
