"""Map-style dataset as a stream of images and labels, each item read once, in order."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastmnist.beton.format import MAX_SIDE
from fastmnist.errors import ConfigError, DataError, FastmnistError, whole_number

GREY_MODES = ("1", "L", "LA", "La")  # of PIL; any other mode of 8 bits becomes RGB
DEEP_MODES = ("I", "F")  # and I;16 and so on


def is_dataset(images: Any) -> bool:
    """Whether `images` has items by number and a length, and is no array, tensor, list, text or mapping."""
    has_items = hasattr(images, "__getitem__") and hasattr(images, "__len__") and not hasattr(images, "dtype")
    return has_items and not isinstance(images, (list, tuple, str, bytes, Mapping))


class DatasetStream:
    """A dataset's images as an `ImageStream`; its labels come with them.

    An item is (image, label), or a row of Hugging Face's `datasets` with the columns image and label. An image is
    PIL's, or uint8: an array (H, W[, C]) or a tensor (C, H, W). The first one decides on size and on grey or colour:
    later grey pictures of PIL become colour, as R = G = B.

    Attributes:
        shape: (N, H, W[, C]).
        labels: (N,) int64, filled in while `blocks` runs.
        class_names: the dataset's `classes`, or the names of its ClassLabel; empty without both.

    Args:
        dataset: of N items, with `__len__` and `__getitem__`.
        name: the file to be written, for messages.
        resize: (H, W) of all images, bilinear with anti-aliasing as torchvision's Resize; None keeps their size.
        like: (H, W[, C]) that images must have; by default that of the first one.
        remedy, broken: what to do about images of different sizes, and about one that cannot be read.

    Raises:
        ConfigError: `resize` is no size.
        DataError: an item cannot be used; names it by its number, and by its file where the dataset has `samples`.
    """

    def __init__(
        self,
        dataset: Any,
        name: str | Path,
        *,
        resize: tuple[int, int] | None = None,
        like: tuple[int, ...] | None = None,
        remedy: str = "resize=(H, W) makes them one size",
        broken: str = "mend it, or leave it out",
    ) -> None:
        self._dataset, self._name, self._remedy, self._broken = dataset, name, remedy, broken
        self._size = None if resize is None else checked_size("resize", resize)
        self._shape = like
        self._colour = None if like is None else (*like, 1)[2] == 3
        if not len(dataset):
            raise DataError(f"{name}: the dataset is empty; give one with images")
        self.labels = np.zeros(len(dataset), np.int64)
        pixels, self.labels[0] = self._read(0)
        self._first, self._shape = pixels, pixels.shape
        self.shape = (len(dataset), *pixels.shape)
        features = getattr(dataset, "features", None)
        label = features.get("label") if isinstance(features, Mapping) else None
        names: Sequence[str] = getattr(dataset, "classes", None) or getattr(label, "names", None) or ()
        self.class_names = tuple(str(each) for each in names)

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        for start in range(0, len(self.labels), rows):
            block = np.empty((min(rows, len(self.labels) - start), *self.shape[1:]), np.uint8)
            for place, index in enumerate(range(start, start + len(block))):
                block[place], self.labels[index] = self._read(index) if index else (self._first, self.labels[0])
            yield block

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        """An item's image (H, W[, C]) uint8 and its label."""
        where = self._where(index)
        try:
            item = self._dataset[index]
            if isinstance(item, Mapping):
                if not {"image", "label"} <= item.keys():
                    raise DataError(
                        f"{where} has the columns {', '.join(map(str, item))}; image and label are needed: rename them "
                        "(rename_columns)"
                    )
                image, label = item["image"], item["label"]
            elif isinstance(item, (tuple, list)) and len(item) == 2:
                image, label = item
            else:
                raise DataError(f"{where} is {type(item).__name__}, not (image, label)")
            pixels = self._pixels(image, where)
        except DataError:
            raise
        except FastmnistError as error:  # names the file and says what to do
            raise DataError(f"{error} {self._broken}") from error
        except Exception as error:  # decoders raise all kinds, and so may a dataset
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{where} cannot be read ({type(error).__name__}: {reason}); {self._broken}") from error
        if self._shape is not None and (*pixels.shape, 1)[:3] != (*self._shape, 1)[:3]:
            was, now = (" x ".join(map(str, shape)) for shape in (self._shape, pixels.shape))
            raise DataError(f"{where} is {now}, those before it {was}; {self._remedy}")
        try:
            return pixels.reshape(self._shape or pixels.shape), operator.index(label)
        except TypeError:
            kind = getattr(label, "dtype", type(label).__name__)
            raise DataError(
                f"{where} has a label of {kind}; a whole number is needed (for other targets the item's number, to "
                "look them up by)"
            ) from None

    def _where(self, index: int) -> str:
        try:
            return f"{self._name}: item {index} ({self._dataset.samples[index][0]})"
        except (AttributeError, LookupError, TypeError):  # most datasets have no such list
            return f"{self._name}: item {index}"

    def _pixels(self, image: Any, where: str) -> np.ndarray:
        if isinstance(image, Image.Image):
            return np.asarray(self._resized(self._converted(image, where)))
        pixels = image
        if hasattr(image, "detach"):  # a tensor
            pixels = image.detach().cpu().numpy()
            pixels = pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels
        if not isinstance(pixels, np.ndarray) or pixels.ndim not in (2, 3):
            raise DataError(f"{where} has no image (PIL's, an array (H, W[, C]) or a tensor (C, H, W))")
        if pixels.dtype != np.uint8:
            raise DataError(
                f"{where} is {pixels.dtype}; uint8 is needed: leave ToTensor, ToDtype and Normalize out of the "
                "dataset's transform, since Loader(dtype=torch.float32) makes normalised floats"
            )
        if self._size is None or pixels.shape[:2] == self._size:
            return pixels
        planes = [
            np.asarray(self._resized(Image.fromarray(plane))) for plane in np.atleast_3d(pixels).transpose(2, 0, 1)
        ]
        return planes[0] if pixels.ndim == 2 else np.stack(planes, 2)

    def _converted(self, image: Image.Image, where: str) -> Image.Image:
        if image.mode.startswith(DEEP_MODES):
            raise DataError(f"{where} has more than 8 bits per value (mode {image.mode}); convert it to 8 bits")
        colour = image.mode not in GREY_MODES
        if self._colour is None:
            self._colour = colour
        elif colour and not self._colour:
            raise DataError(
                f"{where} is in colour (mode {image.mode}), those before it are grey; convert all to one of both"
            )
        return image.convert("RGB" if self._colour else "L")

    def _resized(self, image: Image.Image) -> Image.Image:
        if self._size is None or image.size == self._size[::-1]:
            return image
        return image.resize(self._size[::-1], Image.Resampling.BILINEAR)


def checked_size(name: str, size: Any) -> tuple[int, int]:
    """(height, width) in pixels; raises ConfigError naming the setting when it is none."""
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ConfigError(f"{name} {size!r} must be two whole numbers, height and width")
    height, width = (whole_number(name, side, 1, MAX_SIDE) for side in size)
    return height, width
