"""Writer of `.beton` files: page by page, in constant memory."""

from __future__ import annotations

import errno
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from fastmnist.beton.dataset_stream import DatasetStream, is_dataset
from fastmnist.beton.format import MAX_SIDE
from fastmnist.beton.layout import PAGE_SIZE, Layout, page_size_for
from fastmnist.beton.moments import Moments
from fastmnist.errors import ConfigError, DataError
from fastmnist.files import replacing

# An array with at most so many rows and at least so many columns and channels has its channels first.
MOST_PLANES, LEAST_SIDE = 4, 12
STREAMED = 1 << 28  # bytes; a larger file is written to the disk while its later pages are made

Progress = Callable[[int, int], None]  # (samples written, samples in all)


class ImageStream(Protocol):
    """Images in order, block by block: a source that need not fit in memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W) or (N, H, W, C)."""

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """Arrays (n, H, W[, C]) uint8, N images in all; n is `rows`, less in the last one."""


class ArrayStream:
    """An array (N, H, W[, C]) uint8, or a memory map of one, as an ImageStream."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        self.shape = tuple(images.shape)

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        for start in range(0, len(self.images), rows):
            yield self.images[start : start + rows]


class Page(NamedTuple):
    """A page's bytes (page_size,) uint8, their CRC-32, and the moments of its images."""

    content: np.ndarray
    checksum: int
    moments: Moments


def write_beton(
    path: str | os.PathLike[str],
    images: Any,
    labels: np.ndarray | Sequence[int] | None = None,
    *,
    class_names: Sequence[str] = (),
    resize: tuple[int, int] | None = None,
    dataset: str = "",
    split: str = "",
    source: str = "",
    page_size: int = PAGE_SIZE,
    progress: Progress | None = None,
) -> Path:
    """Writes a `.beton` that fastmnist and FFCV read; `path` appears whole or not at all.

    >>> import fastmnist
    >>> images = np.zeros((100, 28, 28), np.uint8)  # (N, H, W)
    >>> path = fastmnist.write_beton("digits.beton", images, np.arange(100) % 10, class_names="0123456789")
    >>> file = fastmnist.Beton(path)
    >>> len(file), file.image_shape, file.class_names[7]
    (100, (28, 28, 1), '7')

    Args:
        path: the file to write; a missing folder is made, an older file is replaced.
        images: (N, H, W) or (N, H, W, C) uint8: an array, a memory map, or a stream of blocks; or a map-style dataset
            of (image, label), torch's or Hugging Face's, read item by item (see `DatasetStream`). docs/your-data.md has
            the way from tensors and folders.
        labels: (N,) integers, from 0; a dataset brings its own.
        class_names: one name per class; labels must then be below their number. By default those of a dataset.
        resize: (H, W) of a dataset's images, bilinear with anti-aliasing; None for a dataset of one size.
        dataset, split, source: texts kept in the file. A float `Loader` of the split "train" normalises by the file's
            own moments, one of any other takes `moments`. `source` identifies the bytes that the file was made from.
        page_size: bytes, a power of 2; doubled until a sample fits. Samples never straddle a page.
        progress: called with (samples written, N) after each page.

    Raises:
        DataError: images are no array of that kind, (N, C, H, W) included; images and labels do not fit together; a
            label is out of range; a stream yields other blocks than it announced; or an item of a dataset cannot be
            used.
        ConfigError: `resize` is no size, or comes without a dataset.
        FastmnistError: the file cannot be written.
    """
    path = Path(path)
    stream, labels = open_images(images, labels, resize, path)
    class_names = class_names or getattr(stream, "class_names", ())
    labels = checked_labels(stream, labels, class_names, path)
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
    write_pages(path, layout, labels, _pages(stream, labels, layout, path), progress)
    return path


def write_pages(
    path: Path, layout: Layout, labels: np.ndarray, pages: Iterable[Page], progress: Progress | None
) -> None:
    """Writes the layout's file from its pages, in order; each page is used up before the next one is taken.

    labels: (n,) int64, repeated until there are `layout.count`.

    Raises:
        FastmnistError: the disk is too small or fails; nothing is left of the file, and an older one stays.
    """
    needed = f"{-(-layout.file_size // 10**6):,} MB are needed there"
    with replacing(path, hint=f"{needed}: make room or name another folder") as file:
        free = shutil.disk_usage(path.parent).free
        if free < layout.file_size:  # better now than after gigabytes
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({free // 10**6:,} MB are free)")
        file.seek(layout.data_start)
        moments, checksums = Moments(layout.channels), []
        for number, page in enumerate(pages, start=1):
            file.write(page.content.data)
            if layout.file_size > STREAMED:
                _start_writeback(file)
            checksums.append(page.checksum)
            moments.merge(page.moments)
            if progress is not None:
                progress(min(number * layout.per_page, layout.count), layout.count)
        layout.write_around(file, labels, checksums, moments)


def _start_writeback(file: BinaryIO) -> None:
    """Has the disk begin with what was written, and the page cache drop what the disk has.

    2 GB took 0.7 s instead of 3 to 5 s on a virtual machine, whose host must first find memory for a growing cache.
    """
    file.flush()
    with suppress(AttributeError, OSError):  # macOS and Windows lack the call, some file systems refuse it
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _pages(stream: ImageStream, labels: np.ndarray, layout: Layout, path: Path) -> Iterator[Page]:
    content, done = np.zeros(layout.page_size, np.uint8), 0
    for block in _checked_blocks(stream, layout.per_page, path):
        content[: block.size] = block.reshape(-1)
        content[block.size :] = 0
        moments = Moments(layout.channels)
        moments.add(block)
        _check_range(labels, slice(done, done + len(block)), layout.class_names, path)  # a dataset's are here only now
        done += len(block)
        yield Page(content, zlib.crc32(content.data), moments)


def open_images(
    images: Any,
    labels: np.ndarray | Sequence[int] | None,
    resize: tuple[int, int] | None,
    path: Path,
    like: tuple[int, ...] | None = None,
) -> tuple[ImageStream, np.ndarray | Sequence[int] | None]:
    """The images as a stream, and their labels as they came; arguments as of `write_beton` and `DatasetStream`."""
    if is_dataset(images) and not callable(getattr(images, "blocks", None)):
        if labels is not None:
            raise DataError(f"{path}: a dataset brings its labels; leave the argument labels out")
        stream = DatasetStream(images, path, resize=resize, like=like)
        return stream, stream.labels
    if resize is not None:
        raise ConfigError("resize is for a dataset's images; an array or a stream has one size already")
    return ArrayStream(images) if isinstance(images, np.ndarray) else _checked_stream(images, path), labels


def _checked_stream(images: Any, path: Path) -> ImageStream:
    """`images` if they are a stream; DataError for tensors, lists, datasets and anything else, with what to call."""
    if callable(getattr(images, "blocks", None)):
        stream: ImageStream = images
        return stream
    if hasattr(images, "detach"):
        way = "give tensor.cpu().numpy(), or .permute(0, 2, 3, 1) of it first if it is (N, C, H, W)"
    elif isinstance(images, (list, tuple)):
        way = "give np.stack(images)"
    else:
        way = "give an array, a dataset with items by number, or a stream with `shape` and `blocks(rows)`"
    raise DataError(f"{path}: images come as {type(images).__name__}, not as an array; {way} (docs/your-data.md)")


def checked_labels(
    stream: ImageStream, labels: np.ndarray | Sequence[int] | None, class_names: Sequence[str], path: Path
) -> np.ndarray:
    """The labels (N,) int64; raises DataError where they do not fit the stream, or the stream's shape cannot be."""
    if labels is None:
        raise DataError(f"{path}: the images come without labels; give one integer per image")
    labels = np.asarray(labels)
    if len(stream.shape) not in (3, 4) or not all(stream.shape) or max(stream.shape[1:]) > MAX_SIDE:
        raise DataError(
            f"{path}: images have shape {stream.shape}; (N, H, W) or (N, H, W, C) is needed, none 0, the last ones at "
            f"most {MAX_SIDE}"
        )
    if len(stream.shape) == 4 and stream.shape[1] <= MOST_PLANES < LEAST_SIDE <= min(stream.shape[2:]):
        raise DataError(
            f"{path}: images have shape {stream.shape}: (N, C, H, W), it seems; give images.transpose(0, 2, 3, 1)"
        )
    if isinstance(stream, ArrayStream) and stream.images.dtype != np.uint8:
        raise DataError(
            f"{path}: images are {stream.images.dtype}; uint8 is needed: np.round(images * 255).astype(np.uint8) for "
            "values of 0 to 1"
        )
    if labels.shape != stream.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{path}: {stream.shape[0]} images come with labels of shape {labels.shape}, {labels.dtype}; "
            "one integer per image is needed (for other targets its row, np.arange(N), to look them up by)"
        )
    _check_range(labels, slice(None), class_names, path)
    return labels.astype(np.int64, copy=False)


def _check_range(labels: np.ndarray, some: slice, class_names: Sequence[str], path: Path) -> None:
    upper = len(class_names) or np.iinfo(np.int64).max
    wrong = np.flatnonzero((labels[some] < 0) | (labels[some] >= upper))
    if len(wrong):
        at = int(wrong[0]) + (some.start or 0)
        allowed = f"0 to {upper - 1}" if class_names else "0 or more"
        raise DataError(f"{path}: label {labels[at]} of sample {at} is out of range; {allowed} is needed")


def _checked_blocks(stream: ImageStream, rows: int, path: Path) -> Iterator[np.ndarray]:
    """The stream's blocks; raises DataError where one is not as announced."""
    count, done = stream.shape[0], 0
    blocks = iter(stream.blocks(rows))
    while True:
        try:
            block = next(blocks, None)
        except OSError as error:  # the source's; further out it would read as an error in writing
            raise DataError(f"{path}: its source cannot be read: {error.strerror or error}") from error
        expected = (min(rows, count - done), *stream.shape[1:])
        if block is None and done == count:
            return
        if block is None or block.dtype != np.uint8 or block.shape != expected:
            got = "nothing" if block is None else f"{block.shape} {block.dtype}"
            raise DataError(f"{path}: after {done} images its source gave {got} instead of {expected} uint8")
        done += len(block)
        yield block
