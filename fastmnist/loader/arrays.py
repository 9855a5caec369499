"""Samples in memory: arrays of the caller's, or several files read into one, for loaders as a `Beton` is."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmnist.beton.moments import Moments
from fastmnist.beton.reader import Beton, Verify
from fastmnist.beton.writer import ArrayStream, checked_labels
from fastmnist.errors import ConfigError, DataError
from fastmnist.loader.kernels import gather, mend_array_types
from fastmnist.system.machine import available_memory

MOMENTS_ROWS = 4096  # images added up at a time


def on_host(values: Any) -> Any:
    """A tensor as an array, over the same memory if that is the host's; anything else as it is."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values


class Arrays:
    """N images of one shape and their labels in memory, with what loaders use of a `Beton`.

    Images that are C-contiguous are not copied: later changes of the caller's array show.

    Args:
        images: (N, H, W) or (N, H, W, C) uint8, of numpy or torch. labels: (N,) integers from 0.
        class_names: one per class. split: as of `write_beton`.
        path: what messages call it.
        parts: samples of each file that they come from.

    Attributes:
        data: (bytes,) uint8, all images, read-only. offsets: (N,) int64, where each begins.
        image_shape: (H, W, C). image_size: bytes of an image.

    Raises:
        DataError: as of `write_beton`.

    >>> arrays = Arrays(np.zeros((3, 28, 28), np.uint8), torch.tensor([2, 0, 1]))
    >>> len(arrays), arrays.image_shape, arrays.class_names
    (3, (28, 28, 1), ('0', '1', '2'))
    """

    def __init__(
        self,
        images: np.ndarray | torch.Tensor,
        labels: np.ndarray | torch.Tensor | Sequence[int],
        class_names: Sequence[str] = (),
        split: str = "",
        path: str = "arrays",
        parts: Sequence[int] = (),
    ) -> None:
        self.path, self.split, self.closed = Path(path), split, False
        images = on_host(images)
        if not isinstance(images, np.ndarray):
            raise DataError(f"{path}: images come as {type(images).__name__}; an array or a tensor is needed")
        self.labels = checked_labels(ArrayStream(images), on_host(labels), class_names, self.path).copy()
        self._class_names, self.parts = tuple(class_names), tuple(parts) or (len(images),)
        self.image_shape = (*images.shape[1:3], images.shape[3] if images.ndim == 4 else 1)
        self.image_size = int(np.prod(self.image_shape))
        self.data = np.ascontiguousarray(images).reshape(-1).view()
        self.data.flags.writeable = False  # as a file's map, so that one compiled kernel serves both
        self.offsets = np.arange(len(images), dtype=np.int64) * self.image_size

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class; without any, the numbers from 0 to the highest label."""
        return self._class_names or tuple(str(n) for n in range(int(self.labels.max()) + 1))

    @cached_property
    def moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std), each one float per channel, of pixel values scaled to [0, 1]; takes one pass."""
        sums = Moments(self.image_shape[2])
        for start in range(0, len(self), MOMENTS_ROWS):
            sums.add(self._images[start : start + MOMENTS_ROWS])
        return sums.result()

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the content."""
        shape = "x".join(map(str, self._images.shape))
        return f"{shape}-{zlib.crc32(self.labels.data, zlib.crc32(self.data.data)):08x}"

    @property
    def _images(self) -> np.ndarray:
        return self.data.reshape(-1, *self.image_shape)

    def images(self, indices: np.ndarray) -> np.ndarray:
        """Copies of the images at `indices` (n,) int: (n, H, W, C) uint8."""
        self.check_open()
        return self._images[indices]

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple[Any, ...]:
        self.check_open()
        return Arrays, (self._images, self.labels, self._class_names, self.split, str(self.path), self.parts)

    def check_open(self) -> None:
        """Raises RuntimeError once closed."""
        if self.closed:
            raise RuntimeError(f"{self.path}: closed; make the loader anew")

    check_unchanged = check_open

    def close(self) -> None:
        """Releases the images, which others may still hold."""
        self.closed, self.data = True, np.empty(0, np.uint8)


Samples = Beton | Arrays  # what loaders take their images from


def read_together(files: Sequence[str | os.PathLike[str] | Beton], verify: Verify) -> Arrays:
    """Several files in memory, as one: the samples of each after those of the one before.

    Raises:
        ConfigError: images of another shape or other class names, named with their files; or too little memory.
        DataError: a file cannot be used.
    """
    with ExitStack() as opened:
        betons = []
        for file in files:
            if not isinstance(file, (str, os.PathLike, Beton)):
                raise ConfigError(f"a list of files has paths and open Betons, no {type(file).__name__}")
            betons.append(file if isinstance(file, Beton) else opened.enter_context(Beton(file, verify)))
        if not betons:
            raise ConfigError("an empty list names no file")
        first = betons[0]
        for other in betons[1:]:
            for name in ("image_shape", "class_names"):
                here, there = getattr(first, name), getattr(other, name)
                if here != there:
                    raise ConfigError(f"{first.path} and {other.path} differ in {name}: {here} and {there}")
        ends = np.cumsum([len(file) for file in betons])
        needed, free = int(ends[-1]) * first.image_size, available_memory()
        if needed > free:
            raise ConfigError(
                f"several files are read into memory: these need {needed // 10**6:,} MB, {free // 10**6:,} MB are "
                "available; write one file of them, which is streamed"
            )
        mend_array_types()
        images = np.empty((ends[-1], first.image_size), np.uint8)
        for file, end in zip(betons, ends.tolist(), strict=True):
            file.check_unchanged()
            gather(file.data, file.offsets, np.arange(len(file)), 0, images[end - len(file) : end])
        splits = {file.split for file in betons}
        return Arrays(
            images.reshape(-1, *first.image_shape),
            np.concatenate([file.labels for file in betons]),
            first.class_names,
            splits.pop() if len(splits) == 1 else "",
            ", ".join(str(file.path) for file in betons),
            [len(file) for file in betons],
        )
