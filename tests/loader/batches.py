"""Shared by the tests of loaders: their small file, marks, and batches copied, joined and compared."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import normalize

from fastmnist.loader.augment import Augmentation

Batch = tuple[torch.Tensor, ...]

COUNT, SHAPE = 103, (6, 5)  # of the small file's images
MOVES = Augmentation(1.0, 20.0, 0.1)
FFCV_MARKS = [pytest.mark.ffcv, pytest.mark.filterwarnings("ignore")]  # FFCV 1.0 of 2023 warns at every import
FFCV = pytest.param("ffcv", marks=FFCV_MARKS)
OTHERS = ["dataloader", "tuned", "tensors", FFCV]
EVERY = ["ours", *OTHERS]
# On a machine of one core DataLoader advises against two workers.
with_workers = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def copied(batches: Iterable[Batch]) -> list[Batch]:
    return [tuple(tensor.clone() for tensor in batch) for batch in batches]


def joined(batches: Iterable[Batch]) -> Batch:
    return tuple(torch.cat(tensors) for tensors in zip(*batches, strict=True))


def assert_same_batches(found: Iterable[Batch], expected: Iterable[Batch]) -> None:
    found, expected = list(found), list(expected)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a.cpu(), b.cpu())


def values_of(images: np.ndarray, moments, dtype: torch.dtype) -> torch.Tensor:
    """(n, H, W, C) uint8 as the loader's documentation has them, by torchvision: (n, C, H, W)."""
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2)
    return tensors if dtype == torch.uint8 else normalize(tensors.to(torch.float32).div(255), *moments).to(dtype)


def assert_epoch(loader, sizes: list[int]) -> np.ndarray:
    """The rows of the loader's next epoch, whose batches hold what the file holds at those rows."""
    file, rows = loader.file, []
    batches = list(loader.chunks())
    assert [len(batch.labels) for batch in batches] == sizes
    for batch in batches:
        numbers = batch.rows.numpy()
        assert batch.rows.dtype == batch.labels.dtype == torch.int64
        assert batch.images.dtype == loader.dtype
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        np.testing.assert_array_equal(batch.labels, file.labels[numbers])
        if loader.augment is None:
            assert torch.equal(batch.images, values_of(file.images(numbers), file.moments, loader.dtype))
        rows.append(numbers)
    return np.concatenate(rows) if rows else np.empty(0, np.int64)
