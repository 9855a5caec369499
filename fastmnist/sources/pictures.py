"""Pictures on disk: one file decoded, and a folder with a folder per class as a dataset."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastmnist.beton.dataset_stream import DatasetStream
from fastmnist.errors import ConfigError, DataError, FastmnistError
from fastmnist.sources.source import Content, Source

MAX_PIXELS = 50_000_000  # a phone's photo has as many; checked before anything is decoded
PREFIX = "folder:"
TEST_FOLDERS = ("test", "val", "valid", "validation")
TEST_SHARE, TEST_SEED = 0.2, 0
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
MOST_NAMED = 5  # broken pictures

Pictures = list[tuple[Path, int]]  # files and their labels


def open_picture(file: Path | BinaryIO, name: str) -> Image.Image:
    """Decodes an image and turns it upright by its EXIF orientation.

    Args:
        file: in any format that Pillow reads; of several frames the first is used.
        name: of the image, in error messages.

    Raises:
        FastmnistError: the file is missing, no image, damaged, or has more than MAX_PIXELS pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata that does not matter here
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as picture:  # reads the header alone
                if picture.width * picture.height > MAX_PIXELS:
                    raise _too_large(name)
                picture.load()
                return upright(picture)
    except FastmnistError:
        raise
    except FileNotFoundError:
        raise FastmnistError(f"There is no file {name}. Check the name and the folder.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name) from None
    except UnidentifiedImageError:
        raise FastmnistError(f"{name} is not an image that can be read. Save it as PNG or JPEG.") from None
    except PermissionError:
        raise FastmnistError(f"{name} cannot be read. Change its permissions or copy it.") from None
    except Exception as error:  # Pillow's decoders raise all kinds, and nothing else runs here
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FastmnistError(f"{name} is damaged or cut short ({reason}). Save or copy it again.") from error


def upright(picture: Image.Image) -> Image.Image:
    """Turned by its EXIF orientation; damaged EXIF counts as none."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # Pillow's parser raises all kinds
        return picture.copy()


def _too_large(name: str) -> FastmnistError:
    return FastmnistError(
        f"{name} has too many pixels (over {MAX_PIXELS:,}). Make it smaller or crop it to the character."
    )


class _Opened:
    """Pictures as a map-style dataset."""

    def __init__(self, pictures: Pictures) -> None:
        self.samples = pictures

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return open_picture(path, str(path)), label


class PictureFolder:
    """Pictures of a folder's class folders, in two splits: the layout of torchvision's ImageFolder.

    Either <root>/train/<class>/ and <root>/test/<class>/ (or val, valid, validation); or class folders alone, of each
    of which a fifth, drawn by a fixed seed, is the test split. Pictures may be in folders within a class's. Classes are
    numbered in the order of their names.

    Attributes:
        dataset: "folder:" and the absolute path. name: the folder's, for the names of compiled files.

    Args:
        dataset: "folder:" and a path.
        size: (H, W) of all images, bilinear with anti-aliasing; None where all have one size.
        skip_broken: leave out pictures that cannot be decoded, which takes another pass over all of them.

    Raises:
        DataError: there is no such folder, or no class folder in it; a class has no picture; or train and test have
            different classes. While `content` is read: a picture cannot be decoded, or has another size or colours.
    """

    def __init__(self, dataset: str, size: tuple[int, int] | None = None, *, skip_broken: bool = False) -> None:
        path = dataset.removeprefix(PREFIX)
        if not path:
            raise ConfigError(f"--dataset {dataset} names no folder; put its path behind the colon")
        self.root, self._size, self._skip_broken = Path(path).expanduser().resolve(), size, skip_broken
        self.dataset, self.name = f"{PREFIX}{self.root}", self.root.name or "pictures"
        if not self.root.is_dir():
            raise DataError(f"{self.root}: no such folder; --dataset folder:PATH names one with a folder per class")
        self.note = ""
        try:
            self._pictures, self.class_names = self._find()
        except OSError as error:
            raise DataError(f"{self.root}: cannot be read: {error.strerror or error}") from error

    def sources(self) -> Iterator[Source]:
        """Both splits, train first."""
        size = "x".join(map(str, self._size)) if self._size else "their own size"
        for split, pictures in self._pictures.items():
            lines = [f"{path.relative_to(self.root).as_posix()} {_size_and_time(path)}" for path, _ in pictures]
            lines += self.class_names
            digest = hashlib.blake2b("\n".join(lines).encode(errors="surrogateescape"), digest_size=8).hexdigest()
            fingerprint = f"folder {self.name} {split}: {len(pictures):,} pictures, {digest}, {size}"
            note = self.note if split == "test" else ""
            yield Source(self.name, split, fingerprint, partial(self._read, split), note)

    def _find(self) -> tuple[dict[str, Pictures], tuple[str, ...]]:
        """The pictures of both splits, and the classes."""
        train = self.root / "train"
        if not _folders(train):  # a folder "train" may also be a class
            train = self.root
        test = next((self.root / name for name in TEST_FOLDERS if _folders(self.root / name)), None)
        names = _folders(train)
        if train == self.root and test is not None:
            raise DataError(f"{self.root}: has {test.name} and no train, of class folders each; name both so")
        if not names:
            raise DataError(
                f"{train}: there are no class folders in it; PATH/train/<class>/ and PATH/test/<class>/ hold the "
                "pictures, or PATH/<class>/"
            )
        if test is None:
            return self._split(train, names), tuple(names)
        differing = sorted(set(names) ^ set(_folders(test)))
        if differing:
            raise DataError(
                f"{train} and {test} have different classes: only one of them has {', '.join(differing[:MOST_NAMED])}"
            )
        return {"train": _pictures(train, names), "test": _pictures(test, names)}, tuple(names)

    def _split(self, folder: Path, names: list[str]) -> dict[str, Pictures]:
        """A fifth of each class, but at least one picture, is for testing."""
        from sklearn.model_selection import train_test_split

        pictures = _pictures(folder, names)
        labels = [label for _, label in pictures]
        try:
            train, test = train_test_split(
                pictures,
                test_size=max(len(names), round(TEST_SHARE * len(pictures))),
                stratify=labels,
                random_state=TEST_SEED,
            )
        except ValueError as error:
            raise DataError(
                f"{folder}: a fifth of each class cannot be taken for testing ({error}); add pictures, or make the "
                "folders train and test"
            ) from error
        self.note = (
            f"{self.name} has no test folder: {len(test):,} of its {len(pictures):,} pictures, from each "
            "class in proportion, are the test set."
        )
        return {"train": sorted(train), "test": sorted(test)}

    def _read(self, split: str) -> Content:
        pictures, broken = self._decodable[split] if self._skip_broken else (self._pictures[split], [])
        labels = np.array([label for _, label in pictures], np.int64)
        note = ""
        if broken:
            more = f" and {len(broken) - MOST_NAMED} more" if len(broken) > MOST_NAMED else ""
            note = f"Left out, as they cannot be decoded: {', '.join(map(str, broken[:MOST_NAMED]))}{more}."
        like = None if split == "train" else self._stream("train").shape[1:]
        return Content(self._stream(split, like), labels, self.class_names, note)

    def _stream(self, split: str, like: tuple[int, ...] | None = None) -> DatasetStream:
        pictures = self._decodable[split][0] if self._skip_broken else self._pictures[split]
        return DatasetStream(
            _Opened(pictures),
            self.root,
            resize=self._size,
            like=like,
            remedy="--image-size N or HxW makes them one size",
            broken=f"Or leave it out: fastmnist compile --dataset {self.dataset} --skip-broken",
        )

    @cached_property
    def _decodable(self) -> dict[str, tuple[Pictures, list[Path]]]:
        """Of each split, the pictures that can be decoded, and the files of the others."""
        found: dict[str, tuple[Pictures, list[Path]]] = {}
        for split, pictures in self._pictures.items():
            good, broken = found.setdefault(split, ([], []))
            for path, label in pictures:
                try:
                    open_picture(path, str(path))
                    good.append((path, label))
                except FastmnistError:
                    broken.append(path)
        return found


def _size_and_time(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:  # decoding will name it
        return "unreadable"
    return f"{found.st_size} {found.st_mtime_ns}"


def _folders(folder: Path) -> list[str]:
    """Names of the folders in `folder` that are not hidden, sorted; none where it is no folder."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _pictures(folder: Path, names: list[str]) -> Pictures:
    """The files below each class folder, sorted within it."""
    found: Pictures = []
    for label, name in enumerate(names):
        files = [
            Path(place) / file
            for place, _, files in os.walk(folder / name, followlinks=True)
            for file in files
            if file.lower().endswith(EXTENSIONS)
        ]
        if not files:
            raise DataError(
                f"{folder / name}: the class has no pictures ({', '.join(EXTENSIONS)}); add some, or remove the folder"
            )
        found += [(file, label) for file in sorted(files)]
    return found
