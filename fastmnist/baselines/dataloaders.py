"""torch's DataLoader as notebooks write it and as those do who know it, and what the other loaders have in common."""

from __future__ import annotations

import os
import weakref
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from joblib import cpu_count
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from fastmnist.baselines.workers import Batched, Coloured, Grey, Plan, batches_of, of_workers, unchanged
from fastmnist.beton.reader import Beton
from fastmnist.errors import ConfigError
from fastmnist.loader.epochs import Batch, EpochLoader
from fastmnist.loader.kernels import gather
from fastmnist.loader.order import AUGMENT_STREAM, random_bits
from fastmnist.loader_settings import DATALOADER, checked_numbers

Data = str | os.PathLike[str] | Beton

MOST_WORKERS = 4  # that workers=None takes


class Baseline(EpochLoader):
    """What these have in common: the one dtype that each makes, and that closing it ends what still runs."""

    makes: ClassVar[torch.dtype] = torch.uint8

    def __init__(self, data: Data, batch_size: int = 512, **common: Any) -> None:
        super().__init__(data, batch_size, dtype=self.makes, **common)
        self._running: weakref.WeakSet[Generator[Batch]] = weakref.WeakSet()

    @property
    def needs_file(self) -> bool:
        return False

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in super()._settings().items() if name != "dtype"}

    def _copy(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All images (n, H, W, C) uint8 and labels (n,) int64 that are iterated over, in memory of their own."""
        file = self.file
        images = np.empty((len(self.indices), file.image_size), np.uint8)
        gather(file.data, file.offsets, self.indices, 0, images)
        return torch.from_numpy(images).view(-1, *file.image_shape), torch.from_numpy(file.labels[self.indices])

    def _positions(self, epoch: int, first: int) -> np.ndarray:
        """(n,) int64: which of those are handed out, from batch `first` on."""
        return self._epoch_order(epoch)[first * self.batch_size : self._taken]

    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        running = self._run(epoch, first)
        self._running.add(running)
        return running

    @abstractmethod
    def _run(self, epoch: int, first: int) -> Generator[Batch]:
        """The same as a generator, which closing the loader closes."""

    def close(self) -> None:
        for running in list(self._running):
            running.close()
        super().close()


class _Planned(Baseline):
    """One DataLoader for all epochs, which is told before each which batches to make: its workers can be kept.

    A subclass says what it is over (`_source`), how a batch is asked for (`_plan_of`) and moved (`_moved`).
    """

    def __init__(
        self,
        data: Data,
        batch_size: int,
        *,
        workers: int | None,
        prefetch_factor: int,
        persistent_workers: bool,
        pin_memory: bool | None,
        **common: Any,
    ) -> None:
        [prefetch_factor] = checked_numbers(DATALOADER, prefetch_factor=prefetch_factor)
        if workers is not None:
            [workers] = checked_numbers(DATALOADER, workers=workers)
        super().__init__(data, batch_size, **common)
        if workers is None:
            workers = 0 if self.device.type == "cpu" and cpu_count() <= 2 else min(MOST_WORKERS, cpu_count())
        self.workers, self.prefetch_factor, self.persistent_workers = workers, prefetch_factor, persistent_workers
        self.pin_memory = self.device.type == "cuda" and pin_memory is not False
        self._plan: list[Any] = []  # what is asked for next, batch by batch
        self._epochs_begun = 0
        dataset, collate = self._source()
        self._loader: DataLoader[Any] | None = DataLoader(
            dataset,
            batch_sampler=Plan(self._plan),
            collate_fn=collate,
            pin_memory=self.pin_memory,
            persistent_workers=persistent_workers and workers > 0,  # torch refuses both without workers
            prefetch_factor=prefetch_factor if workers else None,
            generator=torch.Generator().manual_seed(0),  # or it draws from the bits that a model's dropout uses
            **of_workers(workers),
        )

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {name: getattr(self, name) for name in DATALOADER}

    @abstractmethod
    def _source(self) -> tuple[Dataset[Any], Callable[[Any], Any] | None]:
        """The dataset, and what makes a batch of what it gives; None is torch's own way."""

    def _plan_of(self, epoch: int, first: int) -> list[Any]:
        """What the dataset is asked for, from batch `first` on: the rows of a batch (n,) int64, one after the other."""
        positions = self._positions(epoch, first)
        return [positions[at : at + self.batch_size] for at in range(0, len(positions), self.batch_size)]

    @abstractmethod
    def _moved(self, images: torch.Tensor, labels: torch.Tensor) -> Batch:
        """That batch on the device, as it is handed out."""

    def _run(self, epoch: int, first: int) -> Generator[Batch]:
        assert self._loader is not None
        self._plan[:] = self._plan_of(epoch, first)
        self._epochs_begun += 1
        turn, kept = self._epochs_begun, self._loader.persistent_workers
        for images, labels in batches_of(self._loader):
            yield self._moved(images, labels)
            if kept and turn != self._epochs_begun:  # the workers serve one epoch at a time
                raise RuntimeError("a later epoch of this loader has begun; begin this one anew (set_epoch)")

    def close(self) -> None:
        super().close()
        self._loader = None  # which ends its workers


class PlainDataLoader(_Planned):
    """What notebooks write: torchvision's MNIST, its transforms sample by sample, a DataLoader, `.to(device)`.

    Args:
        data, batch_size, common: as for `Loader`, without `dtype`.
        workers: processes; 0 loads in this one. They are not forked from this process, because its threads would be
            lost there with what they hold: a script that asks for workers needs `if __name__ == "__main__"`.
        prefetch_factor: batches that each worker is ahead.
        persistent_workers: keep them until the loader is closed; they are begun anew each epoch otherwise.
        pin_memory: copy each batch through page-locked memory, without waiting for it; has no effect on a CPU.

    The two settings before the last have no effect without workers.

    Yields:
        images float32, normalised: without `augment` the bits of `Loader(dtype=torch.float32)`, in the same order.
        With it, random bits come from (seed, epoch, batch): they repeat, also when a run is resumed, and are the same
        for all of these settings.

    Raises:
        ConfigError: images that PIL does not hold (neither 1 nor 3 channels); a setting that cannot work.
        RuntimeError: an error in a worker, with its traceback; no batch within a minute; with persistent workers, a
            batch of an epoch when a later one has begun.
    """

    makes = torch.float32

    def __init__(
        self,
        data: Data,
        batch_size: int = 512,
        *,
        workers: int = 0,
        prefetch_factor: int = 2,
        persistent_workers: bool = False,
        pin_memory: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(
            data,
            batch_size,
            workers=workers,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            pin_memory=pin_memory,
            **common,
        )

    def _source(self) -> tuple[Dataset[Any], None]:
        height, width, channels = self.file.image_shape
        if channels not in (1, 3):
            raise ConfigError(f"{self.file.path}: PIL has no images of {channels} channels; take another loader")
        steps: list[Any] = [transforms.ToTensor(), transforms.Normalize(*self.file.moments)]
        if self.augment is not None:
            moves = self.augment
            affine = transforms.RandomAffine(
                moves.rotation,
                translate=(min(1.0, moves.shift / width), min(1.0, moves.shift / height)),
                scale=(1 - moves.scale, 1 + moves.scale),
                interpolation=transforms.InterpolationMode.BILINEAR,
            )
            steps.insert(0, affine)
        kind = Grey if channels == 1 else Coloured
        return kind(*self._copy(), transforms.Compose(steps)), None

    def _plan_of(self, epoch: int, first: int) -> list[tuple[int, list[int]]]:
        """A seed comes before the rows, so that it does not matter which process makes the batch."""
        seeds = random_bits(len(self), self.seed, epoch, AUGMENT_STREAM).tolist()[first:]
        return [(seed, rows.tolist()) for seed, rows in zip(seeds, super()._plan_of(epoch, first), strict=True)]

    def _moved(self, images: torch.Tensor, labels: torch.Tensor) -> Batch:
        pinned = self.pin_memory
        return (
            images.to(self.device, memory_format=torch.channels_last, non_blocking=pinned),
            labels.to(self.device, non_blocking=pinned),
        )


class TunedDataLoader(_Planned):
    """A DataLoader as those write it who know it: whole batches by `__getitems__`, persistent workers, pinned memory.

    Args:
        data, batch_size, common: as for `Loader`, without `dtype` and `augment`.
        workers: processes, not forked, see `PlainDataLoader`. 0 loads in this one; None takes 0 for a CPU of two
            cores or fewer, else as many as there are cores, at most 4. The images are in shared memory then (/dev/shm
            must hold them), and on a CPU the batches too: each that is held takes two file descriptors.
        prefetch_factor, persistent_workers: as for `PlainDataLoader`.
        pin_memory: the same; None is yes on a GPU.

    Yields:
        images uint8: the batches of `Loader`, in the same order.

    Raises:
        ConfigError, RuntimeError: as `PlainDataLoader`, but that images of any number of channels will do.
    """

    def __init__(
        self,
        data: Data,
        batch_size: int = 512,
        *,
        workers: int | None = None,
        prefetch_factor: int = 2,
        persistent_workers: bool = True,
        pin_memory: bool | None = None,
        **common: Any,
    ) -> None:
        super().__init__(
            data,
            batch_size,
            workers=workers,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            pin_memory=pin_memory,
            **common,
        )

    def _source(self) -> tuple[Dataset[Any], Callable[[Any], Any]]:
        return Batched(*self._copy()), unchanged

    def _moved(self, images: torch.Tensor, labels: torch.Tensor) -> Batch:
        return (
            images.permute(0, 3, 1, 2).to(self.device, non_blocking=True),
            labels.to(self.device, non_blocking=True),
        )
