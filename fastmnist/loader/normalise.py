"""Normalisation of pixel values, bit for bit torchvision's: on a device, and as a table for the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


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


def normalisation_table(mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> np.ndarray:
    """(C, 256) int16, the bits of a Normaliser's value of each byte; dtype is float16 or bfloat16."""
    every_byte = torch.arange(256, dtype=torch.uint8, device="cpu").view(1, 1, 1, 256).expand(1, len(mean), 1, 256)
    values = Normaliser(mean, std)(every_byte, dtype)
    table: np.ndarray = values.reshape(len(mean), 256).contiguous().view(torch.int16).numpy()
    return table
