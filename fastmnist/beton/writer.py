"""Writes the compiled file, page by page, in constant memory; `layout` has the bytes around the pages."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from fastmnist.beton.format import LONGEST_SIDE
from fastmnist.beton.layout import PAGE_SIZE, Layout, page_size_for
from fastmnist.beton.moments import Moments
from fastmnist.errors import DataError
from fastmnist.files import replacing

Progress = Callable[[int, int], None]


class ImageStream(Protocol):
    """Images that come in order, some at a time: what a source needs to be compiled without being held in memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W) or (N, H, W, C)."""

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """Arrays (n, H, W[, C]) uint8 with n = `rows`, the last one less; N images in all."""


class ArrayStream:
    """An array (N, H, W[, C]) uint8, or a memory map of one, as an ImageStream."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        self.shape = tuple(images.shape)

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        for start in range(0, len(self.images), rows):
            yield self.images[start : start + rows]


def write_beton(
    path: str | os.PathLike[str],
    images: np.ndarray | ImageStream,
    labels: np.ndarray,
    *,
    class_names: Sequence[str] = (),
    dataset: str = "",
    split: str = "",
    source: str = "",
    page_size: int = PAGE_SIZE,
    progress: Progress | None = None,
) -> Path:
    """Writes a `.beton` that fastmnist and FFCV read; `path` appears whole or not at all.

    Args:
        path: the file to write; its folder is made where it is missing, an older file is replaced.
        images: (N, H, W) or (N, H, W, C) uint8: an array, a memory map, or a stream of blocks.
        labels: (N,) integers, from 0.
        class_names: one name per class; labels are then checked against their number.
        dataset, split, source: texts kept in the file; `source` identifies what was compiled.
        page_size: bytes, a power of 2; doubled until a sample fits. Samples never straddle a page.
        progress: called with (samples written, N) after each page.

    Raises:
        DataError: images and labels do not fit together, a label is out of range, or a stream breaks its promise.
        FastmnistError: the file cannot be written.
    """
    path = Path(path)
    stream = ArrayStream(images) if isinstance(images, np.ndarray) else images
    labels = _checked_labels(stream, labels, class_names, path)
    image_shape = stream.shape[1:]
    layout = Layout(
        count=stream.shape[0],
        image_shape=image_shape,
        page_size=page_size_for(image_shape, page_size),
        dataset=dataset,
        split=split,
        class_names=tuple(class_names),
        source=source,
    )
    hint = f"{layout.file_size / 1e6:,.0f} MB are needed there; make room or name another folder"
    with replacing(path, hint=hint) as file:
        file.seek(layout.data_start)
        sums, checksums = Moments(layout.channels), []
        page = np.zeros(layout.page_size, np.uint8)
        done = 0
        for block in _checked_blocks(stream, layout.per_page, path):
            used = block.size
            page[:used] = block.reshape(-1)
            page[used:] = 0
            checksums.append(zlib.crc32(page.data))
            sums.add(block)
            file.write(page.data)
            done += len(block)
            if progress is not None:
                progress(done, layout.count)
        layout.write_around(file, labels, checksums, sums)
    return path


def _checked_labels(stream: ImageStream, labels: np.ndarray, class_names: Sequence[str], path: Path) -> np.ndarray:
    labels = np.asarray(labels)
    if len(stream.shape) not in (3, 4) or not all(stream.shape) or max(stream.shape[1:]) > LONGEST_SIDE:
        raise DataError(
            f"{path}: images have shape {stream.shape}; (N, H, W) or (N, H, W, C) is needed, none 0, the last ones at "
            f"most {LONGEST_SIDE}"
        )
    if isinstance(stream, ArrayStream) and stream.images.dtype != np.uint8:
        raise DataError(f"{path}: images are {stream.images.dtype}; uint8 is needed")
    if labels.shape != stream.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{path}: {stream.shape[0]} images come with labels of shape {labels.shape}, {labels.dtype}; "
            "one integer per image is needed"
        )
    upper = len(class_names) or np.iinfo(np.int64).max
    wrong = np.flatnonzero((labels < 0) | (labels >= upper))
    if len(wrong):
        at = int(wrong[0])
        wanted = f"0 to {upper - 1}" if class_names else "0 or more"
        raise DataError(f"{path}: label {labels[at]} of sample {at} is out of range; {wanted} is needed")
    return labels.astype(np.int64)


def _checked_blocks(stream: ImageStream, rows: int, path: Path) -> Iterator[np.ndarray]:
    """The stream's blocks, each held against what the stream announced."""
    count, done = stream.shape[0], 0
    blocks = iter(stream.blocks(rows))
    while True:
        try:
            block = next(blocks, None)
        except OSError as error:  # here, or it would read as an error in writing
            raise DataError(f"{path}: its source cannot be read: {error.strerror or error}") from error
        expected = (min(rows, count - done), *stream.shape[1:])
        if block is None and done == count:
            return
        if block is None or block.dtype != np.uint8 or block.shape != expected:
            found = "nothing" if block is None else f"{block.shape} {block.dtype}"
            raise DataError(f"{path}: after {done} images its source gave {found} where {expected} uint8 was due")
        done += len(block)
        yield block
