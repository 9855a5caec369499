"""Source: one split of a dataset, ready to be written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from fastmnist.beton.writer import ImageStream


class Content(NamedTuple):
    """labels: (N,) int64. note: one sentence on what was left out, or empty."""

    images: ImageStream
    labels: np.ndarray
    class_names: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Source:
    """Images and labels of one split, which are read when they are first used.

    dataset: its name in the names of its files. fingerprint: identifies the bytes that `read` reads. note: one sentence
    on how the split was made, or empty.
    """

    dataset: str
    split: str
    fingerprint: str
    read: Callable[[], Content]
    note: str = ""

    @cached_property
    def content(self) -> Content:
        return self.read()

    @property
    def images(self) -> ImageStream:
        return self.content.images

    @property
    def labels(self) -> np.ndarray:
        return self.content.labels

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.content.class_names
