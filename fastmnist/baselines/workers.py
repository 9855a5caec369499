"""What the worker processes of a DataLoader run, and how they are begun. They import no more than this."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import MNIST, VisionDataset

LONGEST_WAIT = 60  # seconds for one batch from workers, their start included, before it counts as an error


class Seeded(Dataset[Any]):
    """A dataset whose samples draw from torch's random bits: each batch brings the seed of its own."""

    def __getitems__(self, batch: tuple[int, list[int]]) -> list[Any]:
        seed, rows = batch
        with torch.random.fork_rng(devices=[]):  # without workers they are the bits that a model's dropout uses
            torch.default_generator.manual_seed(seed)
            return [self[row] for row in rows]


class Grey(Seeded, MNIST):
    """torchvision's MNIST on the images of a compiled file: (N, H, W, 1) uint8, without a download of its own."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, transform: Any) -> None:
        VisionDataset.__init__(self, transform=transform)
        self.data, self.targets = images.squeeze(3), labels


class Coloured(Seeded):
    """The same for (N, H, W, 3), which that class does not hold."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, transform: Any) -> None:
        self.data, self.targets, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.data[index].numpy())), int(self.targets[index])


class Batched(Dataset[Any]):
    """images (N, H, W, C) uint8 and labels (N,) int64, a whole batch of them at a time."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __getitems__(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.from_numpy(rows)
        return self.images.index_select(0, chosen), self.labels.index_select(0, chosen)


class Plan(Sampler[Any]):
    """A batch sampler whose batches, as the dataset is asked for them, are those in the list when an epoch begins."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self.batches))

    def __len__(self) -> int:
        return len(self.batches)


def unchanged(batch: Any) -> Any:
    """In place of a collate_fn, for batches that come as such."""
    return batch


def of_workers(workers: int) -> dict[str, Any]:
    """A DataLoader's settings for that many workers."""
    if not workers:
        return {}
    # A fork of this process would copy the locks of torch's and numba's threads as they happen to be, and may hang;
    # Python 3.12 warns of it. The server that they are forked from instead imports this module once for all.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return {
        "num_workers": workers,
        "multiprocessing_context": context,
        "timeout": LONGEST_WAIT,
        "worker_init_fn": ignore_ctrl_c,
    }


def batches_of(loader: DataLoader[Any]) -> Generator[Any]:
    """What it yields. The workers end with the last reference to them, so none stays in the traceback of an error.

    torch's own frames there are part of a reference cycle; what went wrong in a worker is in the error's text.
    """
    batches = iter(loader)
    try:
        yield from batches
    except BaseException as error:
        raise error.with_traceback(None) from None
    finally:
        del loader, batches


def ignore_ctrl_c(worker: int) -> None:
    """A terminal sends Ctrl-C to the workers too, while the run still needs their batches to end its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
