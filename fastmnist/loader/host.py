"""Host memory: copies of samples, buffers that are reused, and batches gathered into them by several threads."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from fastmnist.loader.arrays import Samples
from fastmnist.loader.augment import Augmentation
from fastmnist.loader.helpers import Helpers, Task
from fastmnist.loader.kernels import gather, gather_float32, gather_looked_up, mend_array_types
from fastmnist.loader.normalise import Moments, normalisation_table, scale_and_bias
from fastmnist.loader.warp import gather_warped
from fastmnist.system.machine import cores_of_this_process

Batch = tuple[torch.Tensor, torch.Tensor]

# Output of one kernel call: less does not pay for a helper, more does not stay in its core's cache (on 2 cores 0.8 to
# 2.4 MB did equally well).
CALL_BYTES = 1600 << 10
MOST_TOGETHER = 32  # batches in one call
MOST_COPYING_THREADS, MOST_THREADS = 4, 16  # with threads=0: above 4 copies gain nothing; above 16, dispatch dominates
LEAST_KEPT = 16  # buffers searched for a free one; older ones belong to whoever holds their batches

# numpy has no bfloat16: two-byte floats are handled as integers of that width.
NUMPY_TYPES = {
    torch.uint8: np.uint8,
    torch.float32: np.float32,
    torch.float16: np.int16,
    torch.bfloat16: np.int16,
}


class SampleCopy:
    """Some samples of a file, copied side by side.

    Attributes:
        images: (n, bytes) uint8. labels: (n,) int64.
        places: (samples of the file,) int64, where in both each copied sample is.
    """

    def __init__(self, file: Samples, samples: np.ndarray) -> None:
        mend_array_types()
        self.images = np.empty((len(samples), file.image_size), np.uint8)
        gather(file.data, file.offsets, samples, 0, self.images)
        self.labels = file.labels[samples]
        self.places = np.zeros(len(file), np.int64)
        self.places[samples] = np.arange(len(samples))


class _Buffer:
    """Memory of one call's images: `rows` (n, values) for the kernels, `images` (n, C, H, W) channels_last."""

    def __init__(self, count: int, image_shape: tuple[int, int, int], numpy_type: type) -> None:
        self._memory: np.ndarray = np.empty((count, *image_shape), numpy_type)
        self.rows = self._memory.reshape(count, -1)
        self.images = self._memory.transpose(0, 3, 1, 2)
        self._unused = sys.getrefcount(self._memory)

    def is_free(self) -> bool:
        """True once no batch is left: each batch's array refers to the whole memory, each tensor to its array."""
        return sys.getrefcount(self._memory) == self._unused


class BufferPool:
    """Buffers for up to `most` images each, reused once the last batch in them is gone.

    Fresh memory for each batch would cost a page fault per 4 KiB, more than the gather itself.

    Args:
        most: images of a buffer.
        image_shape: (H, W, C).
        dtype: of the tensors, one of NUMPY_TYPES.
        keep: buffers to keep at least, for a caller that takes many at a time.
    """

    def __init__(self, most: int, image_shape: tuple[int, int, int], dtype: torch.dtype, *, keep: int = 0) -> None:
        self._shape = most, image_shape, NUMPY_TYPES[dtype]
        self._kept: deque[_Buffer] = deque(maxlen=max(keep, LEAST_KEPT))

    def __len__(self) -> int:
        """Buffers that are kept, free or not."""
        return len(self._kept)

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The same memory twice: (count, values) for a kernel's output, and (count, C, H, W) channels_last."""
        buffer = self._free_buffer()
        return buffer.rows[:count], buffer.images[:count]  # views, whose references mark the buffer as taken

    def _free_buffer(self) -> _Buffer:
        for _ in range(len(self._kept)):
            buffer = self._kept[0]
            self._kept.rotate(-1)  # the least recently used comes first
            if buffer.is_free():
                return buffer
        buffer = _Buffer(*self._shape)
        self._kept.append(buffer)
        return buffer


def tensor_maker(dtype: torch.dtype) -> Callable[[np.ndarray], torch.Tensor]:
    """The function that makes a tensor of `dtype` over an array's memory.

    Each tensor has a storage of its own over its part of the memory: unlike views of one tensor, two of them share no
    version counter, and `torch.save` writes that part alone.
    """
    if dtype in (torch.uint8, torch.float32):
        return torch.from_numpy

    def make(array: np.ndarray) -> torch.Tensor:
        integers = torch.from_numpy(array)
        empty = torch.empty(0, dtype=dtype, device="cpu")
        return empty.set_(integers.untyped_storage(), 0, integers.shape, integers.stride())  # type: ignore[call-overload]

    return make


class Part(NamedTuple):
    """Consecutive samples of an epoch, and where their images are.

    Attributes:
        rows: (n,) int64, the samples' numbers in the file.
        draws: (n, 4 or 5) float32, of `Augmentation.draw`; None where the loader does not augment.
        data: (bytes,) uint8. Image i begins at offsets[order[i]]; order is (n,) int64.
    """

    rows: np.ndarray
    draws: np.ndarray | None
    data: np.ndarray
    offsets: np.ndarray
    order: np.ndarray

    def in_views(self, views: int, size: int) -> Part:
        """Each batch of `size` samples `views` times, one view after another; draws are (n, views, 4 or 5) before."""
        starts = range(0, len(self.rows), size)
        batches = [np.arange(start, min(start + size, len(self.rows))) for start in starts]
        place = np.concatenate([np.tile(batch, views) for batch in batches])
        view = np.concatenate([np.repeat(np.arange(views), len(batch)) for batch in batches])
        draws = None if self.draws is None else self.draws[place, view]
        return Part(self.rows[place], draws, self.data, self.offsets, self.order[place])

    def split(self, size: int) -> Iterator[Part]:
        """Consecutive parts of `size` samples, the last one of what is left."""
        for start in range(0, len(self.rows), size):
            chosen = slice(start, start + size)
            draws = None if self.draws is None else self.draws[chosen]
            yield Part(self.rows[chosen], draws, self.data, self.offsets, self.order[chosen])


class HostGatherer:
    """Batches on the CPU, each safe to keep, gathered some at a time by the calling thread and by helpers ahead of it.

    A batch that is held keeps the batches gathered with it: about CALL_BYTES, or one batch where that is more.

    Attributes:
        threads: that gather. helpers: all of these but the calling one.
        lag: samples of earlier parts that may not be gathered yet when the next part is taken.

    Args:
        file: whose labels are used.
        batch_size: of all batches but the last.
        dtype: uint8, or a float type for normalised values.
        augment: applied to the images, which are computed in float32 then.
        threads: that gather; 0 takes as many as pay.
        moments: to normalise with; needed for a float dtype.
    """

    def __init__(
        self,
        file: Samples,
        batch_size: int,
        dtype: torch.dtype,
        augment: Augmentation | None,
        threads: int,
        moments: Moments | None = None,
    ) -> None:
        self._labels, self._batch_size, self._dtype, self._augment = file.labels, batch_size, dtype, augment
        self._gathered_dtype = dtype if augment is None else torch.float32
        self._kernel: Callable[..., None]
        self._kernel, self._constants = _kernel(file.image_shape, dtype, augment, moments)
        batch_bytes = batch_size * file.image_size * self._gathered_dtype.itemsize
        together = max(1, min(MOST_TOGETHER, CALL_BYTES // batch_bytes))
        self._step = together * batch_size
        most = MOST_COPYING_THREADS if augment is None else MOST_THREADS
        self.threads = threads or min(cores_of_this_process(), most)
        if together * batch_bytes < CALL_BYTES // 2:
            self.threads = 1
        self._ahead = 2 * self.threads if self.threads > 1 else 1  # calls, so that no helper runs out of work
        self.lag = self._ahead * self._step
        self.helpers = Helpers(self.threads - 1)
        self._pool = BufferPool(self._step, file.image_shape, self._gathered_dtype, keep=2 * self._ahead)
        self._tensor = tensor_maker(self._gathered_dtype)

    def batches(self, parts: Iterator[Part]) -> Iterator[Batch]:
        """Images (B, C, H, W) channels_last and labels (B,) of all parts, each of whole batches but for the last."""
        if self._gathered_dtype == self._dtype:
            return self._gather_all(parts)
        return ((images.to(self._dtype), labels) for images, labels in self._gather_all(parts))

    def _gather_all(self, parts: Iterator[Part]) -> Iterator[Batch]:
        calls = (call for part in parts for call in part.split(self._step))
        coming: deque[tuple[Part, np.ndarray, Task]] = deque()
        size, tensor, labels_tensor = self._batch_size, self._tensor, torch.from_numpy
        try:
            while True:
                while len(coming) < self._ahead and (call := next(calls, None)) is not None:
                    memory, images = self._pool.take(len(call.rows))
                    task = self.helpers.submit(_gather, self._kernel, self._augment, call, self._constants, memory)
                    coming.append((call, images, task))
                if not coming:
                    return
                call, images, task = coming[0]
                while not task.run_if_free() and not task.done():
                    # A helper is at it: to do a later one takes no longer than to wait.
                    if not any(later.run_if_free() for _, _, later in coming):
                        break
                task.result()
                labels, count = self._labels[call.rows], len(call.rows)
                del coming[0]
                for start in range(0, count, size):
                    stop = min(start + size, count)
                    yield tensor(images[start:stop]), labels_tensor(labels[start:stop])
        finally:
            for _, _, task in coming:
                task.cancel()

    def gather_into(self, part: Part, images: np.ndarray, labels: np.ndarray) -> None:
        """Gathers one part into the caller's memory: images (n, values), labels (n,) int64."""
        _gather(self._kernel, self._augment, part, self._constants, images)
        np.take(self._labels, part.rows, out=labels, mode="clip")  # "raise" would copy through a buffer

    def close(self) -> None:
        """Ends the helpers."""
        self.helpers.end()


def _gather(
    kernel: Callable[..., None],
    augment: Augmentation | None,
    part: Part,
    constants: tuple[Any, ...],
    images: np.ndarray,
) -> None:
    if augment is not None and part.draws is not None:
        constants = (augment.matrices(part.draws, constants[:2]), *constants)  # which begin with height and width
    kernel(part.data, part.offsets, part.order, 0, *constants, images)


def _kernel(
    shape: tuple[int, int, int], dtype: torch.dtype, augment: Augmentation | None, moments: Moments | None
) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """The kernel that gathers a batch as `dtype`, and its arguments before `out`."""
    if dtype == torch.uint8:
        return gather, ()
    assert moments is not None
    if augment is not None:
        return gather_warped, (*shape[:2], *scale_and_bias(*moments))
    if dtype == torch.float32:
        mean, std = (np.array(values, np.float32) for values in moments)
        return gather_float32, (mean, std)
    return gather_looked_up, (normalisation_table(*moments, dtype),)
