"""Normalisation of pixel values, bit for bit torchvision's: by which moments, on a device, as a table for the host."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch

from fastmnist.beton.reader import Beton
from fastmnist.errors import ConfigError
from fastmnist.loader.arrays import Arrays, Samples

Moments = tuple[tuple[float, ...], tuple[float, ...]]  # (mean, std), one of each per channel, of values in [0, 1]
AnyMoments = str | os.PathLike[str] | Samples | Sequence[Sequence[float] | float]  # what `moments=` takes


class Normaliser:
    """(B, C, H, W) pixel values 0 to 255 to (value / 255 - mean) / std, computed in float32.

    The operations of torchvision's ToTensor and Normalize in their order, and so their bits. The constants are tensors
    on the device, because a GPU multiplies by the reciprocal of a Python number instead of dividing by it.

    Args:
        mean, std: per channel, of pixel values scaled to [0, 1].
        device: of the images.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu") -> None:
        self.byte, self.mean, self.std = (
            torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)
            for values in ([255.0], mean, std)
        )

    def __call__(self, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return ((images.to(torch.float32) / self.byte - self.mean) / self.std).to(dtype)


def scale_and_bias(mean: Sequence[float], std: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(C,) float32 each: value times scale plus bias is a Normaliser's value, but for rounding."""
    spread = np.array(std)
    return (1 / (255 * spread)).astype(np.float32), (-np.array(mean) / spread).astype(np.float32)


def normalisation_table(mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> np.ndarray:
    """(C, 256) int16, the bits of a Normaliser's value of each byte; dtype is float16 or bfloat16."""
    every_byte = torch.arange(256, dtype=torch.uint8, device="cpu").view(1, 1, 1, 256).expand(1, len(mean), 1, 256)
    values = Normaliser(mean, std)(every_byte, dtype)
    table: np.ndarray = values.reshape(len(mean), 256).contiguous().view(torch.int16).numpy()
    return table


def choose_moments(file: Samples, moments: AnyMoments | None) -> Moments:
    """The moments that images of `file` are normalised with.

    Args:
        moments: a file, whose own are taken; or (mean, std), each one number per channel, of pixel values scaled to
            [0, 1]. None takes those of `file`, if that is a training split.

    Raises:
        ConfigError: no moments are given for another file than a training split, or they do not fit its channels.
        DataError: the file that `moments` names cannot be used.
    """
    if moments is None:
        if not file.split.startswith("train"):
            split = f"the split {file.split!r}" if file.split else "no split"
            raise ConfigError(
                f"{file.path} names {split}, not 'train': give moments=, the file of the training images or "
                "(mean, std), so that training and test images are normalised alike"
            )
        return file.moments
    if isinstance(moments, (str, os.PathLike)):
        with Beton(moments) as other:
            return choose_moments(file, other.moments)
    if isinstance(moments, (Beton, Arrays)):
        return choose_moments(file, moments.moments)
    channels = file.image_shape[2]
    try:
        mean, std = (tuple(np.atleast_1d(np.asarray(values, float)).tolist()) for values in moments)
    except (TypeError, ValueError):
        raise ConfigError(
            f"moments {moments!r} are neither a file nor a pair (mean, std) of numbers per channel"
        ) from None
    if not len(mean) == len(std) == channels or not np.isfinite([*mean, *std]).all() or min(std) <= 0:
        raise ConfigError(
            f"moments {mean}, {std} do not fit {file.path}: it has {channels} channels, each needs a finite mean and "
            "a standard deviation above 0"
        )
    return mean, std
