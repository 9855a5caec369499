"""Batches in host memory: gathered some at a time, by this thread and by helpers that are a little ahead of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from joblib import cpu_count

from fastmnist.beton.reader import Beton
from fastmnist.loader.augment import Augmentation
from fastmnist.loader.buffers import BufferPool, tensor_maker
from fastmnist.loader.helpers import Helpers, Piece
from fastmnist.loader.kernels import gather, gather_float32, gather_looked_up
from fastmnist.loader.normalise import normalisation_table
from fastmnist.loader.warp import gather_warped

# Output of one call of a kernel: less does not pay for calling a helper, more does not stay in its core's cache
# (on 2 cores 0.8 to 2.4 MB did equally well).
CALL_BYTES = 1600 << 10
MOST_TOGETHER = 32  # batches in one call
CALLS_BEFORE_OTHERS = 8  # of an epoch, before helpers are given other work
MOST_COPYING_THREADS, MOST_THREADS = 4, 16  # with threads=0: more do not copy faster; more do not keep up with Python


class Part(NamedTuple):
    """Samples in the order in which they are wanted, and where their images are.

    rows (n,) int64: of the labels. draws (n, 4) float32: `Augmentation.draw`'s, if any. data (bytes,) uint8; image i
    begins at offsets[order[i]], order (n,) int64.
    """

    rows: np.ndarray
    draws: np.ndarray | None
    data: np.ndarray
    offsets: np.ndarray
    order: np.ndarray

    def cut(self, start: int, stop: int) -> Part:
        """Those from `start` to `stop`."""
        chosen = slice(start, stop)
        draws = None if self.draws is None else self.draws[chosen]
        return Part(self.rows[chosen], draws, self.data, self.offsets, self.order[chosen])


class HostGatherer:
    """Makes batches of `dtype` (float32 where images are augmented), each safe to keep.

    A batch that is held keeps those that were gathered with it: about CALL_BYTES, or one batch where that is more.

    Args:
        file: whose images and moments are used.
        batch_size: of all batches but the last.
        dtype: uint8, or a float type for normalised values.
        augment: applied to the images, if given.
        threads: that gather; 0 takes as many as pay.
    """

    def __init__(
        self, file: Beton, batch_size: int, dtype: torch.dtype, augment: Augmentation | None, threads: int
    ) -> None:
        self.batch_size = batch_size
        self.dtype = dtype if augment is None else torch.float32
        self._kernel: Callable[..., None]
        self._constants: tuple[Any, ...]
        if augment is not None:
            self._kernel, self._constants = gather_warped, _warp_constants(file, augment)
        else:
            self._kernel, self._constants = _kernel(file, dtype)
        batch_bytes = batch_size * file.image_size * self.dtype.itemsize
        together = max(1, min(MOST_TOGETHER, CALL_BYTES // batch_bytes))
        self._step = together * batch_size
        self.threads = threads or min(cpu_count(), MOST_COPYING_THREADS if augment is None else MOST_THREADS)
        if together * batch_bytes < CALL_BYTES // 2:
            self.threads = 1
        self._ahead = 2 * self.threads if self.threads > 1 else 1  # calls, so that no helper runs out of work
        self._helpers = Helpers(self.threads - 1)
        self._pool = BufferPool(self._step, file.image_shape, self.dtype, keep=2 * self._ahead)
        self._tensor = tensor_maker(self.dtype)

    @property
    def lag(self) -> int:
        """Samples of the parts before it that may not be gathered yet when `batches` asks for its next part."""
        return self._ahead * self._step

    def batches(
        self, parts: Iterator[Part], labels: np.ndarray, meanwhile: Callable[[Helpers], None]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(images (B, C, H, W) channels_last, labels (B,)) of all parts, which are whole batches but for the last.

        meanwhile: called once in an epoch, to give the helpers something else to do.
        """
        calls = (part.cut(at, at + self._step) for part in parts for at in range(0, len(part.rows), self._step))
        coming: deque[tuple[Part, np.ndarray, Piece]] = deque()
        given, size, tensor, labels_tensor = 0, self.batch_size, self._tensor, torch.from_numpy
        try:
            while True:
                while given >= 0 and len(coming) < self._ahead:
                    part = next(calls, None)
                    given = given + 1 if part is not None else -1
                    if given in (-1, CALLS_BEFORE_OTHERS):
                        meanwhile(self._helpers)
                    if part is not None:
                        memory, images = self._pool.take(len(part.rows))
                        work = self._helpers.submit(_gather, self._kernel, part, self._constants, memory)
                        coming.append((part, images, work))
                if not coming:
                    return
                part, images, work = coming[0]
                while not work.run_if_free() and not work.is_over():
                    # A helper is at it: to do what comes later takes no longer than to wait.
                    if not any(later.run_if_free() for _, _, later in coming):
                        break
                work.wait()
                targets, count = labels[part.rows], len(part.rows)
                del coming[0]
                for start in range(0, count, size):
                    stop = min(start + size, count)
                    yield tensor(images[start:stop]), labels_tensor(targets[start:stop])
        finally:
            for _, _, work in coming:
                work.cancel()

    def into(self, part: Part, images: np.ndarray, labels: np.ndarray, of: np.ndarray) -> None:
        """Gathers one batch into memory of the caller's: images (B, values), labels (B,) from `of`."""
        _gather(self._kernel, part, self._constants, images)
        np.take(of, part.rows, out=labels, mode="clip")  # "raise" would copy through a buffer

    def end(self) -> None:
        """Ends the helpers."""
        self._helpers.end()


def _gather(kernel: Callable[..., None], part: Part, constants: tuple[Any, ...], memory: np.ndarray) -> None:
    moves = () if part.draws is None else (part.draws,)
    kernel(part.data, part.offsets, part.order, 0, *moves, *constants, memory)


def _kernel(file: Beton, dtype: torch.dtype) -> tuple[Callable[..., None], tuple[np.ndarray, ...]]:
    """The function that gathers a batch as `dtype`, and the arrays that it takes before `out`."""
    if dtype == torch.uint8:
        return gather, ()
    if dtype == torch.float32:
        mean, std = (np.array(values, np.float32) for values in file.moments)
        return gather_float32, (mean, std)
    return gather_looked_up, (normalisation_table(*file.moments, dtype),)


def _warp_constants(file: Beton, augment: Augmentation) -> tuple[Any, ...]:
    """What gather_warped takes between the draws and `out`."""
    mean, std = (np.array(values) for values in file.moments)
    scale, bias = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
    height, width, _ = file.image_shape
    return augment.strengths, height, width, scale, bias
