"""Loader: batches from a compiled file, one gather each, in place of a DataLoader."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from fastmnist.beton.reader import Beton, Verify
from fastmnist.loader.augment import Augmentation, warp_on_device
from fastmnist.loader.cuda import copied_batches, on_device
from fastmnist.loader.epochs import DTYPES, Batch, EpochLoader, check_choice
from fastmnist.loader.gathering import HostGatherer, Part
from fastmnist.loader.helpers import Helpers, Piece
from fastmnist.loader.jit import mend_array_types
from fastmnist.loader.kernels import gather
from fastmnist.loader.normalise import Normaliser
from fastmnist.loader.order import EpochOrder, Kind, Uneven, Window
from fastmnist.loader.windows import WindowReader
from fastmnist.loader_settings import OURS, checked_numbers
from fastmnist.system.machine import available_memory

__all__ = ["DTYPES", "Batch", "Loader"]

RESIDENT_SHARE = 0.5  # of the free device memory that "auto" gives to the images
SAMPLES_AT_A_TIME = 1 << 13  # that are passed on together
MOST_PLANNED_AHEAD = 1 << 20  # samples of an epoch whose order is made before it is asked for


class Plan(NamedTuple):
    """What an epoch hands out.

    rows (n,) int64: samples of the file, or rows of the resident copy, in order. windows: of a quasi-random order.
    draws (n, 4) float32: of the augmentation, if there is one.
    """

    rows: np.ndarray
    windows: list[Window]
    draws: np.ndarray | None


class Loader(EpochLoader):
    """Iterates over epochs of a compiled file, batch by batch.

    Each `for` loop runs through one epoch, in that epoch's own order; the next loop runs through the next epoch, also
    when the last one was left early. The order depends on (seed, epoch) alone, not on placement, threads or prefetch.
    A loader may be pickled, and used in a forked child; one thread at a time may iterate over it.

    Args:
        data: a `.beton` file, or one that is open already.
        batch_size: images per batch.
        shuffle: a new order each epoch; otherwise the file's order.
        seed: of the order and of the augmentation, 0 or more.
        device: where batches are; None takes the GPU when there is one.
        placement: "resident" keeps all images in the device's memory (on CPU: a copy in RAM); "stream" gathers from
            the memory map, on a GPU through pinned memory and a copy stream; "auto" is resident on a device whose
            free memory is at least twice the images, and streams otherwise and on CPU.
        dtype: torch.uint8, the stored values; or float32, float16, bfloat16: (value / 255 - mean) / std.
        augment: moves each image at random before it is normalised; needs a float dtype. What a sample gets depends on
            (seed, epoch, sample) alone.
        order: "random"; "quasi_random", some pages of the file at a time (see `order.quasi_random_order`);
            "sequential"; "auto" is sequential without `shuffle`, quasi-random for a file larger than the memory that
            is available when it is streamed, else random.
        threads: that gather a batch on the host; 0 takes as many as pay, at most the cores there are.
        prefetch: batches on their way to a GPU ahead of the one that is handed out ("stream"). On a CPU the gather
            takes far less than a step, and runs when the batch is asked for.
        drop_last: leave out the last batch when it is not full.
        rank, world_size: which of how many processes this is; None asks torch.distributed, or means 0 of 1. Each
            sample goes to one process, and all get equally many.
        uneven: what happens when world_size does not divide the samples: "pad" repeats some, "drop" leaves some out.
        indices: (n,) the samples to iterate over; None takes all.
        verify: how the file is checked when it is opened here ("size" or "full").

    Yields:
        images (B, C, H, W) in channels_last, of `dtype`, and labels (B,) int64, both on `device`. A batch stays valid
        for as long as it is held.

    Raises:
        DataError: the file cannot be used, or was changed since it was opened (asked before each epoch).
        ConfigError: a setting cannot work.
        RuntimeError: the loader is closed, or another thread is in the middle of an epoch.
    """

    def __init__(
        self,
        data: str | os.PathLike[str] | Beton,
        batch_size: int = 512,
        *,
        shuffle: bool = True,
        seed: int = 0,
        device: str | torch.device | None = None,
        placement: Literal["auto", "resident", "stream"] = "auto",
        dtype: torch.dtype = torch.uint8,
        augment: Augmentation | None = None,
        order: Literal["auto"] | Kind = "auto",
        threads: int = 0,
        prefetch: int = 3,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        uneven: Uneven = "pad",
        indices: Sequence[int] | np.ndarray | None = None,
        verify: Verify = "size",
    ) -> None:
        threads, prefetch = checked_numbers(OURS, threads=threads, prefetch=prefetch)
        check_choice("placement", placement, ("auto", "resident", "stream"))
        self.placement: str = placement
        super().__init__(
            data,
            batch_size,
            shuffle=shuffle,
            seed=seed,
            device=device,
            dtype=dtype,
            augment=augment,
            order=order,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            uneven=uneven,
            indices=indices,
            verify=verify,
        )
        self.threads, self.prefetch = threads, prefetch
        self._reading = Helpers(1)
        self._plan_ahead: tuple[int, Piece] | None = None
        self._prepare()

    @property
    def needs_file(self) -> bool:
        return self.placement == "stream"

    def _settle(self) -> None:
        size = len(self.indices) * self.file.image_size
        if self.placement != "auto":
            return
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            self.placement = "resident" if size < RESIDENT_SHARE * free else "stream"
        else:
            self.placement = "stream" if self.device.type == "cpu" else "resident"

    def _choose_order(self, shuffle: bool) -> Kind:
        if shuffle and self.placement == "stream" and self.file.file_size > available_memory():
            return "quasi_random"
        return super()._choose_order(shuffle)

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {name: getattr(self, name) for name in OURS}

    def _prepare(self) -> None:
        mend_array_types()
        file, size = self.file, self.file.image_size
        if self.dtype != torch.uint8:  # the statistics of a file without ours take a pass over it
            self._normalise = Normaliser(*file.moments, self.device)
        self._data, self._offsets, self._labels = file.data, file.offsets, file.labels
        self._on_device = self.placement == "resident" and self.device.type != "cpu"
        if self.placement == "resident":
            dense = np.empty((len(self.indices), size), np.uint8)
            gather(self._data, self._offsets, self.indices, 0, dense)
            self._labels = file.labels[self.indices]
            if self._on_device:
                self._device_images = torch.from_numpy(dense).to(self.device)
                self._device_labels = torch.from_numpy(self._labels).to(self.device)
                return
            dense.flags.writeable = False  # like the map, so that one compiled kernel serves both
            self._data, self._offsets = dense.reshape(-1), np.arange(len(dense)) * size
        # A batch for another device is augmented and normalised there: a quarter of the bytes to copy.
        here = self.device.type == "cpu"
        self._host = HostGatherer(
            file,
            self.batch_size,
            self.dtype if here else torch.uint8,
            self.augment if here else None,
            self.threads,
        )

    def _plan(self, epoch: int) -> Plan:
        """The epoch's plan, which may have been made during the one before it."""
        ready, self._plan_ahead = self._plan_ahead, None
        if ready is not None and ready[0] == epoch:
            plan: Plan = ready[1].wait()
            return plan
        return _make_plan(epoch, *self._plan_arguments())

    def _plan_arguments(self) -> tuple[Any, ...]:
        subset = None if self._all else self.indices
        return self._epoch_order, subset, self.placement == "resident", self.augment, len(self.file), self.seed

    def _plan_next(self, epoch: int, helpers: Helpers) -> None:
        ready = self._plan_ahead is not None and self._plan_ahead[0] == epoch
        if helpers.count and not ready and self.order == "random" and len(self.indices) <= MOST_PLANNED_AHEAD:
            self._plan_ahead = epoch, helpers.submit(_make_plan, epoch, *self._plan_arguments())

    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        mend_array_types()
        parts = self._parts(epoch, first)
        if self._on_device:
            return self._device_batches(parts, self.batch_size)
        if self.device.type == "cuda":
            size = (self.batch_size, self.file.image_size)
            single = (part.cut(a, a + size[0]) for part in parts for a in range(0, len(part.rows), size[0]))
            return copied_batches(single, self._fill, self._finish, size, self.device, self.prefetch)
        if self.device.type != "cpu":
            return self._moved(parts)
        batches = self._host.batches(parts, self._labels, partial(self._plan_next, epoch + 1))
        if self._host.dtype == self.dtype:
            return batches
        return ((images.to(self.dtype), labels) for images, labels in batches)

    def _chunks(self, epoch: int, first: int, count: int) -> Iterator[Batch]:
        if not self._on_device:
            return super()._chunks(epoch, first, count)
        size = count * self.batch_size
        return self._device_batches(self._parts(epoch, first, size), size)

    def _parts(self, epoch: int, first: int, step: int = 0) -> Iterator[Part]:
        """The epoch from batch `first` on, some whole batches at a time (`step` samples)."""
        rows, windows, draws = self._plan(epoch)
        step = step or max(1, SAMPLES_AT_A_TIME // self.batch_size) * self.batch_size
        begin, reader = first * self.batch_size, None
        if len(windows) > 1:
            lag = self._host.lag
            reader = WindowReader(self.file, windows, first=begin, step=step, lag=lag, helper=self._reading)
        for start in range(begin, self._taken, step):
            stop = min(start + step, self._taken)
            part = rows[start:stop]
            drawn = None if draws is None else draws[start:stop]
            if reader is None:
                yield Part(part, drawn, self._data, self._offsets, part)
            else:
                yield Part(part, drawn, reader.data, reader.offsets(part, start), np.arange(len(part)))

    def _fill(self, part: Part, images: np.ndarray, labels: np.ndarray) -> None:
        self._host.into(part._replace(draws=None), images, labels, self._labels)

    def _finish(self, images: torch.Tensor, draws: np.ndarray | None) -> torch.Tensor:
        """What is left to do on the device: images uint8 (B, C, H, W), or their bytes (B, H * W * C)."""
        if images.dim() == 2:
            images = images.view(-1, *self.file.image_shape).permute(0, 3, 1, 2)
        if self.dtype == torch.uint8:
            return images
        if self.augment is not None and draws is not None:
            matrices = on_device(self.augment.matrices(draws, self.file.image_shape[:2]), self.device)
            images = warp_on_device(images.to(torch.float32), matrices).contiguous(memory_format=torch.channels_last)
        return self._normalise(images, self.dtype)

    def _moved(self, parts: Iterator[Part]) -> Iterator[Batch]:
        """For devices that have no copy stream of ours."""
        for part in parts:
            plain = iter([part._replace(draws=None)])
            start = 0
            for images, labels in self._host.batches(plain, self._labels, lambda helpers: None):
                draws = None if part.draws is None else part.draws[start : start + len(labels)]
                yield self._finish(images.to(self.device), draws), labels.to(self.device)
                start += len(labels)

    def _device_batches(self, parts: Iterator[Part], size: int) -> Iterator[Batch]:
        for part in parts:
            rows = on_device(part.rows, self.device)
            for start in range(0, len(rows), size):
                chosen = slice(start, start + size)
                images = self._device_images.index_select(0, rows[chosen])
                draws = None if part.draws is None else part.draws[chosen]
                yield self._finish(images, draws), self._device_labels.index_select(0, rows[chosen])

    def close(self) -> None:
        if not self._on_device:
            self._host.end()
        self._reading.end()
        self._data = np.empty(0, np.uint8)
        self._device_images = self._device_labels = torch.empty(0, device="cpu")
        super().close()


def _make_plan(
    epoch: int,
    order: EpochOrder,
    subset: np.ndarray | None,
    resident: bool,
    augment: Augmentation | None,
    samples: int,
    seed: int,
) -> Plan:
    positions, windows = order.with_windows(epoch)
    chosen = positions if subset is None else subset[positions]
    draws = None if augment is None else augment.draw(samples, seed, epoch)[chosen]
    if resident:
        return Plan(positions, [], draws)
    return Plan(chosen, windows, draws)
