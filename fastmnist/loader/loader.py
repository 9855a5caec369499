"""Loader: batches from a compiled file, one gather each, in place of a DataLoader.

An epoch's way: order -> plan (`_plan`) -> parts (`_parts`) -> memory -> batches (`_batches`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch

from fastmnist.beton.reader import Beton, Verify
from fastmnist.errors import ConfigError, whole_number
from fastmnist.loader.arrays import Arrays, Samples, on_host, read_together
from fastmnist.loader.as_dataloader import LoaderBatchSampler, LoaderDataset, collate, positions_of, refuse_arguments
from fastmnist.loader.augment import Augmentation
from fastmnist.loader.device import DeviceGatherer, Finish, PinnedCopier, PlainCopier
from fastmnist.loader.epochs import DTYPES, Batch, EpochLoader, check_choice, joined
from fastmnist.loader.helpers import Helpers, Task
from fastmnist.loader.host import HostGatherer, Part, SampleCopy
from fastmnist.loader.kernels import mend_array_types
from fastmnist.loader.normalise import AnyMoments
from fastmnist.loader.order import EpochOrder, EpochPlan, Kind, Uneven
from fastmnist.loader.sampling import Numbers, OrderFunction, Rows, Sampling, checked_rows
from fastmnist.loader.windows import WindowReader
from fastmnist.loader_settings import OURS, checked_numbers
from fastmnist.system.machine import available_memory, choose_device

__all__ = ["DTYPES", "Batch", "Loader"]

RESIDENT_SHARE = 0.5  # of the free device memory that "auto" gives to the images
PART_SAMPLES = 1 << 13  # handed to the memory together
MOST_PLANNED_AHEAD = 1 << 20  # samples of an epoch that is planned during the one before


class Loader(EpochLoader):
    """Iterates over epochs of a compiled file, batch by batch.

    Each `for` loop runs through one epoch, in that epoch's own order; the next loop runs through the next epoch, also
    when the last one was left early. The order depends on (seed, epoch) alone, not on placement, threads or prefetch.
    A loader may be pickled, and used in a forked child; one thread at a time may iterate over it.

    Args:
        data: a `.beton` file, or one that is open already. Or a list of such, whose samples count as one after another;
            images of one shape and the same class names are needed. Several are read into memory.
        batch_size: images per batch.
        shuffle: a new order each epoch; otherwise the file's order.
        seed: of the order and of the augmentation, 0 or more.
        device: of the batches; None takes the GPU when there is one.
        placement: "resident" keeps all images in the device's memory (on CPU: a copy in RAM); "stream" gathers from
            the memory map, on a GPU through pinned memory and a copy stream; "auto" is resident on a device whose
            free memory is at least twice the images, and streams otherwise and on CPU.
        dtype: torch.uint8, the stored values; or float32, float16, bfloat16: (value / 255 - mean) / std.
        moments: mean and std of a float dtype: a file, usually that of the training images, or (mean, std), each one
            number per channel. None takes the file's own if it is a training split ("train" in the file); for any other
            file they must be given, since a test set normalised by its own moments is not what the model learned.
        augment: random shift, rotation, scale and flip of each image before it is normalised; needs a float dtype. A
            sample's draw depends on (seed, epoch, sample) alone.
        views: of each image, augmented independently; needs `augment`. Those of the first one are those of views=1.
        order: "random"; "quasi_random", some pages of the file at a time (see `order.quasi_random_order`);
            "sequential"; "auto" is sequential without `shuffle`, quasi-random when a file larger than the available
            memory is streamed, else random. Or a function (epoch, generator) -> the numbers of the epoch's samples in
            order: each of `indices` once, or `epoch_samples` of them, repeated or not. It must depend on its arguments
            alone (the generator is numpy's, seeded by (seed, epoch)): each process calls it, and a state that resumes
            cannot tell whether the function is the same.
        threads: that gather a batch on the host; 0 takes as many as pay, at most the cores there are.
        prefetch: batches on their way to a GPU ahead of the one that is handed out ("stream"). On a CPU a batch is
            gathered when it is asked for, in far less time than a step.
        drop_last: leave out the last batch when it is not full.
        rank, world_size: which of how many processes this is; None asks torch.distributed, or means 0 of 1. Each
            sample goes to one process, and all get equally many.
        uneven: when world_size does not divide the samples, "pad" repeats some, "drop" leaves some out.
        indices: (n,) the samples to iterate over; None takes all.
        weights: (n,) one number for each of `indices` (of all samples without them), in their order: how often a sample
            comes, in proportion. The draws too depend on (seed, epoch) alone, over all processes, and resume.
        balanced: draw each class equally often, on average; within a class by `weights`.
        replacement: with weights or `balanced`, whether a sample may come again in the same epoch. Otherwise each draw
            is among the samples that are left.
        epoch_samples: of all processes together; None takes as many as there are indices. Fewer, without weights, are
            others in each epoch.
        mix: of several files, the share of an epoch's samples that each has, on average; within a file by `weights`.
        verify: how the file is checked when it is opened here ("size" or "full").

    Yields:
        images (B, C, H, W) in channels_last, of `dtype`, and labels (B,) int64, both on `device`. A batch stays valid
        for as long as it is held. With several views images are (views, B, C, H, W), each view in channels_last:
        `first, second = images`. `chunks()` adds rows (B,) int64, the samples' numbers in the file.

    Raises:
        DataError: the file cannot be used, or was changed since it was opened (checked before each epoch).
        ConfigError: a setting cannot work.
        RuntimeError: the loader is closed, or another thread is in the middle of an epoch.

    >>> import tempfile
    >>> from fastmnist import Loader, write_beton
    >>> folder = tempfile.TemporaryDirectory()
    >>> images, labels = np.zeros((100, 28, 28), np.uint8), np.arange(100) % 10
    >>> path = write_beton(f"{folder.name}/example.beton", images, labels, split="train")
    >>> loader = Loader(path, batch_size=32, device="cpu", dtype=torch.float32)
    >>> len(loader)
    4
    >>> for images, labels in loader:
    ...     print(tuple(images.shape), images.dtype, tuple(labels.shape), labels.dtype)
    (32, 1, 28, 28) torch.float32 (32,) torch.int64
    (32, 1, 28, 28) torch.float32 (32,) torch.int64
    (32, 1, 28, 28) torch.float32 (32,) torch.int64
    (4, 1, 28, 28) torch.float32 (4,) torch.int64

    `chunks` adds which samples they are:

    >>> images, labels, rows = next(loader.chunks())
    >>> torch.equal(labels, rows % 10)
    True

    A state resumes at the exact next batch, whatever placement or threads:

    >>> resumed = Loader(path, batch_size=32, device="cpu", dtype=torch.float32, placement="resident")
    >>> resumed.load_state_dict(loader.state_dict())
    >>> [len(labels) for images, labels in resumed]
    [32, 32, 4]
    >>> loader.close(); resumed.close(); folder.cleanup()
    """

    def __init__(
        self,
        data: str | os.PathLike[str] | Samples | Sequence[str | os.PathLike[str] | Beton],
        batch_size: int = 512,
        *,
        shuffle: bool = True,
        seed: int = 0,
        device: str | torch.device | None = None,
        placement: Literal["auto", "resident", "stream"] = "auto",
        dtype: torch.dtype = torch.uint8,
        moments: AnyMoments | None = None,
        augment: Augmentation | None = None,
        views: int = 1,
        order: Literal["auto"] | Kind | OrderFunction = "auto",
        threads: int = 0,
        prefetch: int = 3,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        uneven: Uneven = "pad",
        indices: Rows | None = None,
        weights: Numbers | None = None,
        balanced: bool = False,
        replacement: bool = True,
        epoch_samples: int | None = None,
        mix: Sequence[float] | None = None,
        verify: Verify = "size",
        **other: Any,
    ) -> None:
        refuse_arguments(other)
        if not isinstance(data, (str, os.PathLike, Beton, Arrays, list, tuple)):
            raise ConfigError(
                f"Loader reads a compiled file, no {type(data).__name__}; fastmnist.write_beton(path, images, labels) "
                "writes one (docs/your-data.md), Loader.from_arrays(images, labels) takes arrays"
            )
        threads, prefetch = checked_numbers(OURS, threads=threads, prefetch=prefetch)
        check_choice("placement", placement, ("auto", "resident", "stream"))
        views = whole_number("views", views, 1)
        if views > 1 and augment is None:
            raise ConfigError(f"views {views} would be alike: they need augment= (fastmnist.Augmentation)")
        file: Samples
        if isinstance(data, (list, tuple)):
            file = read_together(data, verify)
        else:
            file = data if isinstance(data, (Beton, Arrays)) else Beton(data, verify)
        target = choose_device(device)
        own = None
        if callable(order):
            own, order = order, "random"
        if placement == "auto":
            samples = len(file) if indices is None else np.size(on_host(indices))
            placement = _choose_placement(target, samples * file.image_size)
        if order == "auto" and shuffle and placement == "stream" and isinstance(file, Beton):
            order = "quasi_random" if file.file_size > available_memory() else "random"
        super().__init__(
            file,
            batch_size,
            shuffle=shuffle,
            seed=seed,
            device=target,
            dtype=dtype,
            moments=moments,
            augment=augment,
            order=order,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            uneven=uneven,
            indices=indices,
            sampling=Sampling(weights, balanced, replacement, epoch_samples, order=own, mix=mix),
        )
        self._owns_file = file is not data
        self.placement, self.threads, self.prefetch, self.views = placement, threads, prefetch, views
        self._page_reader = Helpers(1)
        self._held: np.ndarray | None = None  # (N,) bool, samples that a resident copy has; None: all
        if placement == "resident" and not self._all:
            self._held = np.zeros(len(file), bool)
            self._held[self.indices] = True
        self._planned: tuple[int, Task] | None = None  # the next epoch's plan, in the making
        self._draws: tuple[int, np.ndarray] | None = None  # of an epoch's augmentation, for `get`
        self._sampled_epoch = 0  # that `batch_sampler` began last
        self._data, self._offsets = file.data, file.offsets
        self._memory = self._make_memory()

    @classmethod
    def from_arrays(
        cls,
        images: np.ndarray | torch.Tensor,
        labels: np.ndarray | torch.Tensor | Sequence[int],
        *,
        class_names: Sequence[str] = (),
        split: str = "",
        **settings: Any,
    ) -> Loader:
        """A loader of samples in memory, without a file.

        Args:
            images: (N, H, W) or (N, H, W, C) uint8, of numpy or torch; a C-contiguous one is not copied.
            labels: (N,) integers from 0.
            class_names, split: as of `write_beton`. settings: as of `Loader`.

        Raises:
            DataError: images and labels are no arrays of that kind. ConfigError: as of `Loader`.

        >>> loader = Loader.from_arrays(torch.zeros(100, 28, 28, dtype=torch.uint8), range(100), batch_size=32)
        >>> [len(labels) for images, labels in loader]
        [32, 32, 32, 4]
        """
        loader = cls(Arrays(images, labels, class_names, split), **settings)
        loader._owns_file = True
        return loader

    def _make_memory(self) -> HostGatherer | DeviceGatherer | PinnedCopier | PlainCopier:
        """The object that makes batches of parts; sets `_data` and `_offsets`, the images of a part."""
        mend_array_types()
        file, resident, batch_size = self.file, self.placement == "resident", self.batch_size * self.views
        if self.device.type == "cpu":
            if resident:
                copy = SampleCopy(file, self.indices)
                copy.images.flags.writeable = False  # as the map, so that one compiled kernel serves both
                self._data, self._offsets = copy.images.reshape(-1), copy.places * file.image_size
            return HostGatherer(file, batch_size, self.dtype, self.augment, self.threads, self.moments)
        finish = Finish(file.image_shape, self.dtype, self.augment, self.device, self.moments)
        if resident:
            self._data, self._offsets = np.empty(0, np.uint8), np.empty(0, np.int64)
            return DeviceGatherer(SampleCopy(file, self.indices), finish, self.device, batch_size)
        # Augmented and normalised on the other device: a quarter of the bytes to copy.
        host = HostGatherer(file, batch_size, torch.uint8, None, self.threads)
        if self.device.type != "cuda":
            return PlainCopier(host, finish, self.device)
        sizes = {"batch_size": batch_size, "image_size": file.image_size, "prefetch": self.prefetch}
        return PinnedCopier(host, finish, self.device, **sizes)

    @property
    def needs_file(self) -> bool:
        return self.placement == "stream"

    def _settings(self) -> dict[str, Any]:
        return (
            super()._settings()
            | {name: getattr(self, name) for name in (*OURS, "views")}
            | {name: value for name, value in vars(self._sampling).items() if value is not None}
        )

    def _plan(self, epoch: int, start: int = 0) -> EpochPlan:
        """The epoch's plan, unless it was made during the epoch before."""
        planned, self._planned = self._planned, None
        if planned is not None and (epoch, start) == (planned[0], 0):
            plan: EpochPlan = planned[1].result()
            return plan
        return _make_plan(self._epoch_order, self.augment, self.views, len(self.file), epoch, start)

    def _plan_ahead(self, epoch: int) -> None:
        """Has a helper make that epoch's plan."""
        memory, needed = self._memory, self._planned is None or self._planned[0] != epoch
        quick = self.order == "random" and self._sampling.order is None
        quick = quick and max(len(self.indices), self._epoch_order.total) <= MOST_PLANNED_AHEAD
        if isinstance(memory, HostGatherer) and memory.helpers.count and needed and quick:
            task = memory.helpers.submit(_make_plan, self._epoch_order, self.augment, self.views, len(self.file), epoch)
            self._planned = epoch, task

    def _batches(self, plan: EpochPlan, first: int) -> Iterator[Batch]:
        mend_array_types()
        return self._in_views(self._memory.batches(self._parts(plan, first)))

    def _joined(self, plan: EpochPlan, first: int, count: int) -> Iterator[Batch]:
        if not isinstance(self._memory, DeviceGatherer):
            return super()._joined(plan, first, count)
        size = count * self.batch_size
        return self._in_views(self._memory.batches(self._parts(plan, first, size), size * self.views))

    def _in_views(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Batches of `Part.in_views` as they are handed out."""
        if self.views == 1:
            return batches
        return (
            (images.unflatten(0, (self.views, -1)), labels[: len(labels) // self.views]) for images, labels in batches
        )

    def _parts(self, plan: EpochPlan, first: int, step: int = 0) -> Iterator[Part]:
        """The plan from batch `first` on, in parts of `step` samples; by default of whole batches."""
        size = step or self.batch_size
        step = step or max(1, PART_SAMPLES // self.batch_size) * self.batch_size
        begin, end, reader = first * self.batch_size, self._taken(plan), None
        if isinstance(self.file, Beton) and self.placement == "stream" and len(plan.windows) > 1:
            lag = self._memory.lag // self.views
            reader = WindowReader(self.file, plan.windows, first=begin, step=step, lag=lag, helper=self._page_reader)
        for start in range(begin, end, step):
            stop = min(start + step, end)
            rows = plan.rows[start:stop]
            draws = None if plan.draws is None else plan.draws[start:stop]
            if reader is None:
                part = Part(rows, draws, self._data, self._offsets, rows)
            else:
                part = Part(rows, draws, reader.data, reader.offsets(rows, start), np.arange(len(rows)))
            yield part if self.views == 1 else part.in_views(self.views, size)
            self._plan_ahead(plan.epoch + 1)

    @property
    def dataset(self) -> LoaderDataset:
        """The samples one by one, as code for DataLoader expects them: len(loader.dataset), .classes, [i]."""
        return LoaderDataset(self)

    sampler, num_workers, prefetch_factor = None, 0, None  # a DataLoader's, with a batch sampler of its own
    collate_fn = staticmethod(collate)

    @property
    def batch_sampler(self) -> LoaderBatchSampler:
        """The next epoch as positions in `dataset`: a DataLoader of both, and `collate_fn`, hands out the same batches.

        accelerate's `skip_first_batches` makes such a DataLoader.
        """
        return LoaderBatchSampler(lambda: self._loop(self._positions), len(self))

    def _positions(self, plan: EpochPlan, first: int) -> Iterator[list[int]]:
        self._sampled_epoch = plan.epoch
        positions = positions_of(plan.rows[: self._taken(plan)], self.indices)
        for start in range(first * self.batch_size, len(positions), self.batch_size):
            yield positions[start : start + self.batch_size].tolist()

    def get(self, indices: Rows, epoch: int = 0) -> Batch:
        """The samples `indices` (n,), numbers in the file in any order, as a batch; augmented as in `epoch`.

        Raises:
            ConfigError: a number is outside the file, or of no sample that a resident loader copied.
        """
        self._check_open()
        rows = self._checked_rows(indices)
        if self.needs_file:
            self.file.check_unchanged()
        draws = None
        if self.augment is not None:
            if self._draws is None or self._draws[0] != epoch:
                epoch = whole_number("epoch", epoch)
                self._draws = epoch, self.augment.draw_views(len(self.file), self.seed, epoch, self.views)
            draws = self._draws[1][rows]
        part = Part(rows, draws, self._data, self._offsets, rows)
        if self.views > 1:
            part = part.in_views(self.views, self.batch_size)
        images, labels = zip(*self._in_views(self._memory.batches(iter([part]))), strict=True)
        return joined(images), torch.cat(labels)

    def set_indices(self, indices: Rows, weights: Numbers | None = None) -> None:
        """Iterates over other samples from the next epoch on; the same in each process.

        A loop that is under way keeps its batches, and no longer moves the loader's position.

        Args:
            indices: (n,) numbers in the file. weights: (n,) as of `Loader`.

        Raises:
            ConfigError: as of `Loader`; a resident loader has no copy of a sample; or the loader has weights, which
                belong to its former indices, and gets no new ones. All stays as it was.
        """
        self._check_open()
        rows = self._checked_rows(indices)
        if weights is None and self._sampling.weights is not None:
            raise ConfigError("the loader's weights belong to its former indices: give set_indices(indices, weights)")
        sampling = self._sampling if weights is None else Sampling(**vars(self._sampling) | {"weights": weights})
        self._epoch_order = self._order_of(rows, sampling)
        self.indices, self._sampling, self._all, self._planned = rows, sampling, False, None
        epoch, position = self._next
        self.seek(epoch + (position > 0), 0)

    def _checked_rows(self, indices: Rows) -> np.ndarray:
        """(n,) int64, samples of the file that the loader can gather."""
        rows = checked_rows(indices, len(self.file))
        if self._held is not None and not self._held[rows].all():
            raise ConfigError(
                f"sample {rows[~self._held[rows]][0]} is not in the loader's memory: a resident loader copied the "
                "indices that it began with; make it with all that it will need, or with placement='stream'"
            )
        return rows

    def close(self) -> None:
        self._memory.close()
        self._page_reader.end()
        self._data = np.empty(0, np.uint8)
        super().close()


def _choose_placement(device: torch.device, size: int) -> Literal["resident", "stream"]:
    """The placement of `size` bytes of images."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return "resident" if size < RESIDENT_SHARE * free else "stream"
    return "stream" if device.type == "cpu" else "resident"


def _make_plan(
    order: EpochOrder, augment: Augmentation | None, views: int, samples: int, epoch: int, start: int = 0
) -> EpochPlan:
    plan = order.plan(epoch, start)
    if augment is None:
        return plan
    return plan._replace(draws=augment.draw_views(samples, order.seed, epoch, views)[plan.rows])
