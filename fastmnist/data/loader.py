"""Loader: batches from a compiled file, one gather each, in place of a DataLoader."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from joblib import cpu_count

from fastmnist.data.augment import Augmentation, warp_on_device
from fastmnist.data.beton import Beton, Verify
from fastmnist.data.buffers import BufferPool
from fastmnist.data.epochs import DTYPES, Batch, EpochLoader, check_choice
from fastmnist.data.host import available_memory
from fastmnist.data.kernels import gather, gather_float32, gather_looked_up
from fastmnist.data.normalise import Normaliser, normalisation_table
from fastmnist.data.order import Kind, Uneven, Window
from fastmnist.data.paging import WindowReader
from fastmnist.data.threads import Helpers
from fastmnist.data.transfer import Part, copied_batches
from fastmnist.data.warp import gather_warped
from fastmnist.errors import ConfigError

__all__ = ["DTYPES", "Batch", "Loader"]

RESIDENT_SHARE = 0.5  # of the free device memory that "auto" gives to the images
BYTES_PER_THREAD = 1600 << 10  # of output that a helper must be given, or to call it costs more than it saves
MOST_TOGETHER = 32  # batches that are gathered in one go for that
MOST_COPYING_THREADS, MOST_THREADS = 4, 16  # with threads=0: more do not copy faster; more do not keep up with Python
SAMPLES_AT_A_TIME = 1 << 15  # whose labels and transforms are looked up together: one look costs as much as many


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
        reuse_buffers: hand out the same host memory for images each time: a batch is then valid only until the next.
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
        reuse_buffers: bool = False,
        verify: Verify = "size",
    ) -> None:
        if threads < 0 or prefetch < 0:
            raise ConfigError(f"threads {threads} and prefetch {prefetch} must be at least 0")
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
        self.threads, self.prefetch, self.reuse_buffers = threads, prefetch, reuse_buffers
        self._reading = Helpers(1)
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
        return super()._settings() | {
            "placement": self.placement,
            "threads": self.threads,
            "prefetch": self.prefetch,
            "reuse_buffers": self.reuse_buffers,
        }

    def _prepare(self) -> None:
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
        # A batch for another device is normalised there: a quarter of the bytes to copy.
        host_dtype = self.dtype if self.device.type == "cpu" else torch.uint8
        warps = self.augment is not None and self.device.type == "cpu"
        self._constants: tuple[Any, ...]
        self._kernel, self._constants = _warping_kernel(file) if warps else _kernel(file, host_dtype)
        dtype = torch.float32 if warps else host_dtype
        self._share_work(warps, size * dtype.itemsize)
        self._pool = BufferPool(
            self.batch_size, file.image_shape, dtype, keep=2 * self._together, reuse=self.reuse_buffers
        )

    def _share_work(self, warps: bool, row_bytes: int) -> None:
        """Settles how many threads work on how many batches together, so that each has enough for its call to pay."""
        self._threads = self.threads or min(cpu_count(), MOST_THREADS if warps else MOST_COPYING_THREADS)
        self._least = max(1, BYTES_PER_THREAD // row_bytes)
        together = -(-self._threads * self._least // self.batch_size)
        if self._threads == 1 or together > MOST_TOGETHER:
            self._threads = together = 1
        self._together = 1 if self.reuse_buffers else together
        self._helpers = Helpers(max(1, self._threads - 1))

    def _rows(self, epoch: int) -> tuple[np.ndarray, list[Window]]:
        """What `_data` is indexed with, in the epoch's order: samples of the file, or rows of the resident copy."""
        if self.placement == "resident":
            return self._epoch_order(epoch), []
        return self._samples(epoch)

    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        groups = self._groups(epoch, first)
        if self._on_device:
            return self._device_batches(groups)
        if self.device.type == "cuda":
            size = (self.batch_size, self.file.image_size)
            return copied_batches(self._parts(groups), self._fill, self._finish, size, self.device, self.prefetch)
        return self._host_batches(groups)

    def _groups(self, epoch: int, first: int) -> Iterator[Part]:
        """Whole batches, several at a time, with their transforms."""
        rows, windows = self._rows(epoch)
        samples = self.indices if self.placement == "resident" else None
        drawn = None
        if self.augment is not None:
            drawn = self.augment.draw(len(self.file), self.seed, epoch)
        step = max(1, SAMPLES_AT_A_TIME // self.batch_size) * self.batch_size
        reader = WindowReader(self.file, windows, step, self._reading) if len(windows) > 1 else None
        for start in range(first * self.batch_size, self._taken, step):
            stop = min(start + step, self._taken)
            part = rows[start:stop]
            matrices = None
            if self.augment is not None and drawn is not None:
                of_samples = part if samples is None else samples[part]
                matrices = self.augment.matrices(drawn[of_samples], self.file.image_shape[:2])
            if reader is None:
                yield Part(part, matrices, self._data, self._offsets, part)
            else:
                yield Part(part, matrices, reader.data, reader.offsets(part, start), np.arange(len(part)))

    def _host_batches(self, groups: Iterator[Part]) -> Iterator[Batch]:
        size, pool, together, labels = self.batch_size, self._pool, self._together, self._labels
        finish = self.device.type != "cpu" or self.dtype != pool.dtype
        for group in groups:
            rows, matrices, data, offsets, order = group
            constants = self._constants if matrices is None else (matrices, *self._constants)
            targets = torch.from_numpy(labels[rows]).split(size)
            for first in range(0, len(targets), together):
                start = first * size
                stop = min(start + together * size, len(rows))
                taken = [pool.take(min(size, stop - at)) for at in range(start, stop, size)]
                job = (self._kernel, data, offsets, order, start, constants, taken, size)
                cuts = self._cuts(stop - start)
                pieces = [(end, self._helpers.submit(_fill, *job, begin, end)) for begin, end in pairwise(cuts[1:])]
                _fill(*job, 0, cuts[1])
                done = cuts[1]
                for number, (_, images) in enumerate(taken, 1):
                    while pieces and done < number * size:
                        done, piece = pieces.pop(0)
                        piece.wait()
                    start += len(taken[number - 1][0])
                    target = targets[first + number - 1]
                    if finish:
                        moved = None if matrices is None else matrices[start - len(target) : start]
                        yield self._elsewhere(images, target, moved)
                    else:
                        yield images, target

    def _cuts(self, count: int) -> list[int]:
        """Where a job of `count` rows is cut, one piece per thread, each large enough to pay."""
        pieces = max(1, min(self._threads, count // max(1, self._least // 2)))
        return [count * piece // pieces for piece in range(pieces + 1)]

    def _elsewhere(self, images: torch.Tensor, labels: torch.Tensor, matrices: np.ndarray | None) -> Batch:
        """A batch of the host as it is wanted: on another kind of device, or as a type that the kernel cannot make."""
        if self.device.type == "cpu":
            return images.to(self.dtype), labels
        return self._finish(images.to(self.device), matrices), labels.to(self.device)

    def _parts(self, groups: Iterator[Part]) -> Iterator[Part]:
        """The same, batch by batch."""
        for group in groups:
            for start in range(0, len(group.rows), self.batch_size):
                yield group.cut(start, start + self.batch_size)

    def _fill(self, part: Part, images: np.ndarray, labels: np.ndarray) -> None:
        self._kernel(part.data, part.offsets, part.order, 0, *self._constants, images)
        np.take(self._labels, part.rows, out=labels, mode="clip")  # "raise" would copy through a buffer

    def _finish(self, images: torch.Tensor, matrices: np.ndarray | torch.Tensor | None) -> torch.Tensor:
        """What is left to do on the device: images uint8 (B, C, H, W), or their bytes (B, H * W * C)."""
        if images.dim() == 2:
            images = images.view(-1, *self.file.image_shape).permute(0, 3, 1, 2)
        if self.dtype == torch.uint8:
            return images
        if matrices is not None:
            on_device = torch.as_tensor(matrices).to(self.device, non_blocking=True)
            images = warp_on_device(images.to(torch.float32), on_device).contiguous(memory_format=torch.channels_last)
        return self._normalise(images, self.dtype)

    def _device_batches(self, groups: Iterator[Part]) -> Iterator[Batch]:
        for group in groups:
            rows = torch.from_numpy(group.rows).to(self.device)
            matrices = None if group.matrices is None else torch.from_numpy(group.matrices).to(self.device)
            for start in range(0, len(rows), self.batch_size):
                chosen = slice(start, start + self.batch_size)
                images = self._device_images.index_select(0, rows[chosen])
                moved = None if matrices is None else matrices[chosen]
                yield self._finish(images, moved), self._device_labels.index_select(0, rows[chosen])

    def close(self) -> None:
        self._helpers.end()
        self._reading.end()
        self._data = np.empty(0, np.uint8)
        self._device_images = self._device_labels = torch.empty(0)
        super().close()


def _kernel(file: Beton, dtype: torch.dtype) -> tuple[Callable[..., None], tuple[np.ndarray, ...]]:
    """The function that gathers a batch as `dtype`, and the arrays that it takes before `out`."""
    if dtype == torch.uint8:
        return gather, ()
    if dtype == torch.float32:
        mean, std = (np.array(values, np.float32) for values in file.moments)
        return gather_float32, (mean, std)
    return gather_looked_up, (normalisation_table(*file.moments, dtype),)


def _warping_kernel(file: Beton) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """The same for augmented images; transforms come before the arrays."""
    mean, std = (np.array(values) for values in file.moments)
    scale, bias = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
    height, width, _ = file.image_shape

    def kernel(data, offsets, rows, start, matrices, out):  # type: ignore[no-untyped-def]
        gather_warped(data, offsets, rows, start, height, width, matrices, scale, bias, out)

    return kernel, ()


def _fill(
    kernel: Callable[..., None],
    data: np.ndarray,
    offsets: np.ndarray,
    order: np.ndarray,
    start: int,
    constants: tuple[Any, ...],
    taken: list[tuple[np.ndarray, torch.Tensor]],
    size: int,
    begin: int,
    end: int,
) -> None:
    """Gathers places `start` + `begin` to `start` + `end` of `order` into the batches `taken`, `size` in each.

    The batches' tensors are among the arguments so that their memory is nobody else's before this is done.
    """
    while begin < end:
        number, within = divmod(begin, size)
        memory = taken[number][0]
        count = min(len(memory) - within, end - begin)
        kernel(data, offsets, order, start + begin, *constants, memory[within : within + count])
        begin += count
