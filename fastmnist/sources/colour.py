"""CIFAR-10, CIFAR-100 and SVHN, read by torchvision's classes, which check their files against known checksums."""

from __future__ import annotations

import string
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastmnist.beton.writer import ArrayStream
from fastmnist.errors import DataError
from fastmnist.sources.idx import checksum
from fastmnist.sources.source import Content, Source

DIGITS = tuple(string.digits)


@dataclass(frozen=True)
class ColourSet:
    """reader: torchvision's class. options: the arguments with which it reads a split."""

    reader: str
    options: dict[str, dict[str, Any]]

    @property
    def torchvision(self) -> Any:
        from torchvision import datasets

        return getattr(datasets, self.reader)

    def files(self, split: str) -> list[str]:
        """Names of the split's files, within a data folder."""
        reader = self.torchvision
        if self.reader == "SVHN":
            return [reader.split_list[split][1]]
        names = [name for name, _ in getattr(reader, f"{split}_list")]
        return [f"{reader.base_folder}/{name}" for name in (*names, reader.meta["filename"])]


_CIFAR = {split: {"train": split == "train"} for split in ("train", "test")}
COLOUR = {
    "cifar10": ColourSet("CIFAR10", _CIFAR),
    "cifar100": ColourSet("CIFAR100", _CIFAR),
    "svhn": ColourSet("SVHN", {split: {"split": split} for split in ("train", "test")}),
}
FLIPPED = ("cifar10", "cifar100")  # a mirrored image shows the same thing; a mirrored digit does not


def missing_files(name: str, folder: Path) -> list[str]:
    """Names of the dataset's files that `folder` lacks."""
    found = COLOUR[name]
    return [file for split in found.options for file in found.files(split) if not (folder / file).is_file()]


def colour_source(name: str, split: str, folder: Path) -> Source:
    """The split of `name` from torchvision's files in `folder`; raises DataError where one is missing."""
    files = COLOUR[name].files(split)
    for file in files:
        if not (folder / file).is_file():
            raise DataError(f"{folder}: {file} is not there; --data-dir names a folder that holds the files of {name}")
    checksums = ", ".join(checksum(folder / file) for file in files)
    return Source(name, split, f"{name} {split}: {checksums}", partial(_read, name, split, folder))


def _read(name: str, split: str, folder: Path) -> Content:
    found = COLOUR[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of the age of CIFAR's pickles
            data = found.torchvision(str(folder), **found.options[split])
    except RuntimeError as error:
        raise DataError(
            f"{folder}: the files of {name} differ from torchvision's checksums: fetch them again ({error})"
        ) from error
    if found.reader == "SVHN":
        images, labels, names = data.data.transpose(0, 2, 3, 1), data.labels, DIGITS
    else:
        images, labels, names = data.data, data.targets, tuple(data.classes)
    return Content(ArrayStream(images), np.asarray(labels, np.int64), names)
