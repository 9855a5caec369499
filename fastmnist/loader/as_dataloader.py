"""DataLoader's attributes for frameworks that read them, and its arguments, each with what to give `Loader` instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from fastmnist.errors import ConfigError
from fastmnist.loader.host import Batch

if TYPE_CHECKING:
    from fastmnist.loader.loader import Loader

_NO_WORKERS = "there are no worker processes; threads= gathers a batch on several cores, 0 takes as many as pay"
_ON_DEVICE = "batches arrive on the device that device= names, through pinned memory where that pays"
INSTEAD: Mapping[str, str] = {
    "dataset": "data= is a file that fastmnist.write_beton or fastmnist.compile_dataset wrote, or several; "
    "Loader.from_arrays(images, labels) takes arrays",
    "num_workers": _NO_WORKERS,
    "persistent_workers": _NO_WORKERS,
    "multiprocessing_context": _NO_WORKERS,
    "worker_init_fn": _NO_WORKERS,
    "timeout": _NO_WORKERS,
    "in_order": _NO_WORKERS,
    "prefetch_factor": "prefetch= is the number of batches on their way to a GPU",
    "pin_memory": _ON_DEVICE,
    "pin_memory_device": _ON_DEVICE,
    "generator": "seed= fixes the order of every epoch",
    "sampler": "indices= names the samples, weights= or balanced= draws them, order= and shuffle= order them, "
    "rank= and world_size= name a process's share",
    "batch_sampler": "batch_size=, indices=, order= and drop_last= make the batches",
    "collate_fn": "batches are gathered whole; change them in the loop",
    "transform": "augment=fastmnist.Augmentation(...) shifts, rotates and scales; transform whole batches in the loop",
}
"""For each argument of DataLoader's that `Loader` lacks, and for a dataset's `transform`."""


def refuse_arguments(given: Mapping[str, Any]) -> None:
    """Raises ConfigError for an argument of DataLoader's, with what to give instead, and TypeError for any other."""
    for name in given:
        if name in INSTEAD:
            raise ConfigError(f"Loader has no {name}: {INSTEAD[name]} (docs/your-loop.md)")
        raise TypeError(f"Loader got an unexpected keyword argument {name!r}")


class LoaderDataset(Dataset[Batch]):
    """The samples of a loader by position, 0 to len - 1, each as its batches have it.

    A sample is an image (C, H, W) and a label () int64 on the loader's device. Augmentation is that of the epoch which
    the loader's `batch_sampler` began last, at first epoch 0. One by one is slow: iterate over the loader to train.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader.indices)

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Batch]:
        if self._loader.views > 1:
            raise ConfigError("samples one by one have no views; iterate over the loader, or make one with views=1")
        rows = self._loader.indices[np.asarray(positions, np.int64)]
        return list(zip(*self._loader.get(rows, self._loader._sampled_epoch), strict=True))

    @property
    def classes(self) -> list[str]:
        """The classes' names, as torchvision's datasets have them."""
        return list(self._loader.file.class_names)


class LoaderBatchSampler:
    """The batches of a loader's next epoch as positions in `loader.dataset`; a loop over it uses up that epoch."""

    def __init__(self, begin: Callable[[], Iterator[list[int]]], batches: int) -> None:
        self._begin, self._batches = begin, batches

    def __iter__(self) -> Iterator[list[int]]:
        return self._begin()

    def __len__(self) -> int:
        return self._batches


def positions_of(rows: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """(n,) where each of `rows` is in `indices`, which hold all of them.

    >>> positions_of(np.array([7, 3]), np.array([3, 5, 7]))
    array([2, 0])
    """
    order = np.argsort(indices, kind="stable")
    found: np.ndarray = order[np.searchsorted(indices[order], rows)]
    return found


def collate(samples: Sequence[Batch]) -> Batch:
    """Samples of a LoaderDataset as a batch in channels_last."""
    images, labels = default_collate(list(samples))
    return images.contiguous(memory_format=torch.channels_last), labels
