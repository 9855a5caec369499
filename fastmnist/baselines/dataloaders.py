"""Plain and tuned DataLoader baselines, and the base of all baselines."""

from __future__ import annotations

import os
import weakref
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator
from typing import Any, ClassVar

import torch
from joblib import cpu_count
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from fastmnist.baselines.workers import (
    BatchDataset,
    ColourImages,
    GreyImages,
    PlannedBatches,
    batches_of,
    unchanged,
    worker_settings,
)
from fastmnist.beton.reader import Beton
from fastmnist.errors import ConfigError
from fastmnist.loader.epochs import Batch, EpochLoader
from fastmnist.loader.host import SampleCopy
from fastmnist.loader.order import AUGMENT_STREAM, EpochPlan, random_bits
from fastmnist.loader_settings import DATALOADER, checked_numbers

Data = str | os.PathLike[str] | Beton

MOST_WORKERS = 4  # that workers=None takes


class Baseline(EpochLoader):
    """A loader to compare with: it makes one dtype, and closing it ends what still runs."""

    file: Beton
    makes: ClassVar[torch.dtype] = torch.uint8

    def __init__(self, data: Data, batch_size: int = 512, **common: Any) -> None:
        super().__init__(data, batch_size, dtype=self.makes, **common)
        self._running: weakref.WeakSet[Generator[Batch]] = weakref.WeakSet()

    @property
    def needs_file(self) -> bool:
        return False

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in super()._settings().items() if name != "dtype"}

    def _batches(self, plan: EpochPlan, first: int) -> Iterator[Batch]:
        running = self._run(plan, first)
        self._running.add(running)
        return running

    @abstractmethod
    def _run(self, plan: EpochPlan, first: int) -> Generator[Batch]:
        """`_batches` as a generator, which closing the loader closes."""

    def close(self) -> None:
        for running in list(self._running):
            running.close()
        super().close()


class _Planned(Baseline):
    """One DataLoader for all epochs, whose batches are planned before each epoch: its workers can stay.

    A subclass makes the dataset (`_source`), a batch's request (`_requests`) and the batch on the device (`_moved`).
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
        self._planned: list[Any] = []  # requests of the epoch to come, one per batch
        self._epochs_begun = 0
        copy = SampleCopy(self.file, self.indices)
        self._places = copy.places
        images = torch.from_numpy(copy.images).view(-1, *self.file.image_shape)
        dataset, collate = self._source(images, torch.from_numpy(copy.labels))
        self._loader: DataLoader[Any] | None = DataLoader(
            dataset,
            batch_sampler=PlannedBatches(self._planned),
            collate_fn=collate,
            pin_memory=self.pin_memory,
            persistent_workers=persistent_workers and workers > 0,  # torch refuses both without workers
            prefetch_factor=prefetch_factor if workers else None,
            generator=torch.Generator().manual_seed(0),  # by default it draws from the bits that dropout uses
            **worker_settings(workers),
        )

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {name: getattr(self, name) for name in DATALOADER}

    @abstractmethod
    def _source(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[Dataset[Any], Callable[[Any], Any] | None]:
        """The dataset over images (n, H, W, C) uint8 and labels (n,), and its collate_fn; None is torch's own."""

    def _requests(self, plan: EpochPlan, first: int) -> list[Any]:
        """Of each batch from number `first` on: its places (B,) int64 in the dataset."""
        places = self._places[plan.rows[: self._taken(plan)]]
        return [
            places[at : at + self.batch_size] for at in range(first * self.batch_size, len(places), self.batch_size)
        ]

    @abstractmethod
    def _moved(self, images: torch.Tensor, labels: torch.Tensor) -> Batch:
        """The batch on the device, as it is handed out."""

    def _run(self, plan: EpochPlan, first: int) -> Generator[Batch]:
        assert self._loader is not None
        self._planned[:] = self._requests(plan, first)
        self._epochs_begun += 1
        turn, kept = self._epochs_begun, self._loader.persistent_workers
        for images, labels in batches_of(self._loader):
            yield self._moved(images, labels)
            if kept and turn != self._epochs_begun:  # the workers serve one epoch at a time
                raise RuntimeError("a later epoch of this loader has begun; start this one again with set_epoch")

    def close(self) -> None:
        super().close()
        self._loader = None  # which ends its workers


class PlainDataLoader(_Planned):
    """A notebook's loader: torchvision's MNIST, its transforms sample by sample, a DataLoader, `.to(device)`.

    Args:
        data, batch_size, common: as for `Loader`, without `dtype`.
        workers: processes; 0 loads in this one. They are not forked, because a fork would copy the locks of this
            process's threads: a script that uses workers needs `if __name__ == "__main__"`.
        prefetch_factor: batches that each worker is ahead; no effect without workers.
        persistent_workers: keep the workers until the loader is closed; otherwise each epoch starts new ones. No
            effect without workers.
        pin_memory: copy each batch asynchronously through page-locked memory; no effect on a CPU.

    Yields:
        images float32, normalised: without `augment` the bits of `Loader(dtype=torch.float32)`, in the same order.
        With it, random bits come from (seed, epoch, batch): the same for all of these settings, and in a resumed run.

    Raises:
        ConfigError: images that PIL cannot hold (neither 1 nor 3 channels); a setting that cannot work.
        RuntimeError: an error in a worker, with its traceback; no batch within a minute; with persistent workers, a
            batch of an epoch after a later one has begun.
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

    def _source(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[Dataset[Any], None]:
        height, width, channels = self.file.image_shape
        if channels not in (1, 3):
            raise ConfigError(f"{self.file.path}: PIL has no images of {channels} channels; take another loader")
        assert self.moments is not None
        steps: list[Any] = [transforms.ToTensor(), transforms.Normalize(*self.moments)]
        if self.augment is not None:
            strength = self.augment
            affine = transforms.RandomAffine(
                strength.rotation,
                translate=(min(1.0, strength.shift / width), min(1.0, strength.shift / height)),
                scale=(1 - strength.scale, 1 + strength.scale),
                interpolation=transforms.InterpolationMode.BILINEAR,
            )
            steps[:0] = [affine, transforms.RandomHorizontalFlip()] if strength.flip else [affine]
        kind = GreyImages if channels == 1 else ColourImages
        return kind(images, labels, transforms.Compose(steps)), None

    def _requests(self, plan: EpochPlan, first: int) -> list[tuple[int, list[int]]]:
        """Each batch brings a seed of its own, so that any process may make it."""
        seeds = random_bits(len(self), self.seed, plan.epoch, AUGMENT_STREAM).tolist()[first:]
        return [(seed, places.tolist()) for seed, places in zip(seeds, super()._requests(plan, first), strict=True)]

    def _moved(self, images: torch.Tensor, labels: torch.Tensor) -> Batch:
        pinned = self.pin_memory
        return (
            images.to(self.device, memory_format=torch.channels_last, non_blocking=pinned),
            labels.to(self.device, non_blocking=pinned),
        )


class TunedDataLoader(_Planned):
    """A tuned DataLoader: whole batches by `__getitems__`, persistent workers, pinned memory.

    Args:
        data, batch_size, common: as for `Loader`, without `dtype` and `augment`.
        workers: processes, not forked, see `PlainDataLoader`. 0 loads in this one; None takes 0 on a CPU of two cores
            or fewer, else one per core, at most 4. With workers the images are in shared memory (/dev/shm must hold
            them), and on a CPU the batches too: each one held takes two file descriptors.
        prefetch_factor, persistent_workers: as for `PlainDataLoader`.
        pin_memory: the same; None is yes on a GPU.

    Yields:
        images uint8: the batches of `Loader`, in the same order.

    Raises:
        ConfigError, RuntimeError: as `PlainDataLoader`, but for the channels: any number will do.
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

    def _source(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[Dataset[Any], Callable[[Any], Any]]:
        return BatchDataset(images, labels), unchanged

    def _moved(self, images: torch.Tensor, labels: torch.Tensor) -> Batch:
        return (
            images.permute(0, 3, 1, 2).to(self.device, non_blocking=True),
            labels.to(self.device, non_blocking=True),
        )
