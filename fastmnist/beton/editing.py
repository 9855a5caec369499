"""Edits of a compiled file: images appended, labels replaced. The old file stays until the new one is whole."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fastmnist.beton.dataset_stream import DatasetStream
from fastmnist.beton.reader import Beton, open_again
from fastmnist.beton.writer import ImageStream, Progress, checked_labels, open_images, write_beton
from fastmnist.errors import DataError

ROWS = 4096  # images copied at a time


def append_beton(
    path: str | os.PathLike[str],
    images: Any,
    labels: np.ndarray | Sequence[int] | None = None,
    *,
    resize: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Adds images at the end of a `.beton`, whose mean and std become those of all its images.

    The file is verified, then written anew beside the old one and renamed to its place: a crash leaves the old one, and
    the disk needs room for both. Loaders that have the old file open refuse it in their next epoch.

    >>> import fastmnist
    >>> path = fastmnist.write_beton("few.beton", np.zeros((2, 28, 28), np.uint8), [0, 1])
    >>> file = fastmnist.Beton(fastmnist.append_beton(path, np.ones((1, 28, 28), np.uint8), [7]))
    >>> file.labels
    array([0, 1, 7])

    Args:
        path: the file.
        images, labels, resize: as for `write_beton`; of the size of the file's images.
        progress: called with (samples written, samples in all) after each page.

    Raises:
        DataError: the file is missing or damaged; the images do not fit it; a label is out of range of its classes; or
            as `write_beton` does.
        FastmnistError: the file cannot be written.
    """
    path = Path(path)
    with Beton(path, verify="full") as old:
        stream, labels = open_images(images, labels, resize, path, old.stored_shape)
        names = old.integrity.class_names if old.integrity else ()
        labels = checked_labels(stream, labels, names, path)
        new_shape = (*stream.shape[1:], 1)[:3]
        if new_shape != old.image_shape:
            raise DataError(f"{path}: has images of {old.image_shape}, the new ones are {new_shape}; resize them")
        together = np.concatenate([old.labels, labels])
        if isinstance(stream, DatasetStream):
            stream.labels = together[len(old) :]  # which it fills in
        return _rewrite(old, together, stream, names, f"{len(labels)} images appended to {old.fingerprint}", progress)


def relabel_beton(
    path: str | os.PathLike[str],
    labels: np.ndarray | Sequence[int],
    *,
    class_names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Replaces the labels of a `.beton`, as safely as `append_beton` adds to one.

    Args:
        path: the file.
        labels: (N,) integers from 0, one per image, in the file's order.
        class_names: one name per class; None keeps the file's.
        progress: called with (samples written, N) after each page.

    Raises:
        DataError: the file is missing or damaged, or the labels do not fit it or the class names.
        FastmnistError: the file cannot be written.
    """
    with Beton(path, verify="full") as old:
        if class_names is None:
            class_names = old.integrity.class_names if old.integrity else ()
        return _rewrite(old, labels, None, class_names, f"labels of {old.fingerprint} replaced", progress)


def _rewrite(
    old: Beton,
    labels: np.ndarray | Sequence[int],
    more: ImageStream | None,
    class_names: Sequence[str],
    source: str,
    progress: Progress | None,
) -> Path:
    """Writes the images of `old`, which it closes, and of `more` over the file of `old`."""
    kept, images = old.integrity, _Copied(old, more)
    old.close()  # Windows renames no file to an open one
    return write_beton(
        old.path,
        images,
        labels,
        class_names=class_names,
        dataset=kept.dataset if kept else "",
        split=kept.split if kept else "",
        source=source,
        page_size=old.page_size,
        progress=progress,
    )


class _Copied:
    """A file's images, then those of another stream."""

    def __init__(self, file: Beton, more: ImageStream | None) -> None:
        self._identity, self._more = file.identity(), more
        self.shape = (len(file) + (more.shape[0] if more else 0), *file.stored_shape)

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        left = np.empty((0, *self.shape[1:]), np.uint8)
        for block in chain(self._of_the_file(), self._more.blocks(rows) if self._more else ()):
            left = np.concatenate([left, block.reshape(-1, *self.shape[1:])])
            while len(left) >= rows:
                yield left[:rows]
                left = left[rows:]
        if len(left):
            yield left

    def _of_the_file(self) -> Iterator[np.ndarray]:
        with open_again(*self._identity) as file:
            for start in range(0, len(file), ROWS):
                yield file.images(np.arange(start, min(start + ROWS, len(file))))
