"""Datasets and settings of DataLoader worker processes, which import this module and no other of ours."""

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

LONGEST_WAIT = 60  # seconds for one batch from workers, their start included


class Seeded(Dataset[Any]):
    """A dataset whose transforms use torch's random bits, seeded by each batch's request: (seed, places)."""

    def __getitems__(self, batch: tuple[int, list[int]]) -> list[Any]:
        seed, places = batch
        with torch.random.fork_rng(devices=[]):  # without workers, dropout uses the same generator
            torch.default_generator.manual_seed(seed)
            return [self[place] for place in places]


class GreyImages(Seeded, MNIST):
    """torchvision's MNIST over images (N, H, W, 1) uint8 of a compiled file, without its download."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, transform: Any) -> None:
        VisionDataset.__init__(self, transform=transform)
        self.data, self.targets = images.squeeze(3), labels


class ColourImages(Seeded):
    """The same over images (N, H, W, 3) uint8."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, transform: Any) -> None:
        self.data, self.targets, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.data[index].numpy())), int(self.targets[index])


class BatchDataset(Dataset[Any]):
    """Whole batches of images (N, H, W, C) uint8 and labels (N,) int64."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __getitems__(self, places: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.from_numpy(places)
        return self.images.index_select(0, chosen), self.labels.index_select(0, chosen)


class PlannedBatches(Sampler[Any]):
    """A batch sampler that yields the requests in `batches` at the time an epoch begins."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self.batches))

    def __len__(self) -> int:
        return len(self.batches)


def unchanged(batch: Any) -> Any:
    """A collate_fn for batches that need no collating."""
    return batch


def worker_settings(workers: int) -> dict[str, Any]:
    """A DataLoader's settings for that many worker processes."""
    if not workers:
        return {}
    # A fork of this process would copy the locks of torch's and numba's threads in whatever state they are, and may
    # hang; Python 3.12 warns of it. The fork server imports this module once for all workers.
    if "forkserver" in multiprocessing.get_all_start_methods():
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__])
    else:  # Windows
        context = multiprocessing.get_context("spawn")
    return {
        "num_workers": workers,
        "multiprocessing_context": context,
        "timeout": LONGEST_WAIT,
        "worker_init_fn": ignore_ctrl_c,
    }


def batches_of(loader: DataLoader[Any]) -> Generator[Any]:
    """The loader's batches. Errors lose their traceback, whose frames would keep the workers alive.

    torch's own frames are part of a reference cycle; an error in a worker carries its traceback in its text.
    """
    batches = iter(loader)
    try:
        yield from batches
    except BaseException as error:
        raise error.with_traceback(None) from None
    finally:
        del loader, batches


def ignore_ctrl_c(worker: int) -> None:
    """A terminal sends Ctrl-C to workers too, but the run needs their batches to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
