"""The inner loops of the loader: one call gathers a batch, as bytes or normalised.

Shared arguments: data (bytes,) uint8, what holds the images; offsets (N,) int64, where each begins; order (n,) int64,
the samples of an epoch; start, the place in `order` of the batch's first sample. Nothing is checked here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastmnist.data.jit import jit, prefetch

LINE = 64  # bytes of a cache line
BYTES_AHEAD = 6 << 10  # of images that are on their way to the cache: hides a miss, and leaves most of a 32 KB cache
MOST_ROWS = 16
MOST_LINES = 64  # of one image: the processor itself notices a longer run


@jit
def rows_ahead(size):  # type: ignore[no-untyped-def]
    """Images of `size` bytes to ask for before they are needed: their places are random, foreseen by no processor."""
    return max(1, min(MOST_ROWS, BYTES_AHEAD // size))


@jit
def lines_of(size):  # type: ignore[no-untyped-def]
    """Cache lines to ask for, of an image of `size` bytes."""
    return min(MOST_LINES, size // LINE + 1)


@jit
def gather(data, offsets, order, start, out):  # type: ignore[no-untyped-def]
    """out[i] = the image at offsets[order[start + i]]; out (n, bytes) uint8."""
    size = out.shape[1]
    ahead, lines, last = rows_ahead(size), lines_of(size), len(order) - 1
    for i in range(len(out)):
        coming = offsets[order[min(start + i + ahead, last)]]
        for line in range(lines):
            prefetch(data, coming + line * LINE)
        at = offsets[order[start + i]]
        image = data[at : at + size]
        for j in range(size):  # vectorises; assigning the slice does not
            out[i, j] = image[j]


@jit
def gather_float32(data, offsets, order, start, mean, std, out):  # type: ignore[no-untyped-def]
    """out[i, j] = (byte j of image i / 255 - mean) / std of j's channel; mean, std (C,), out (n, values) float32."""
    channels, size = len(mean), out.shape[1]
    ahead, lines, last = rows_ahead(size), lines_of(size), len(order) - 1
    byte = np.float32(255)
    for i in range(len(out)):
        coming = offsets[order[min(start + i + ahead, last)]]
        for line in range(lines):
            prefetch(data, coming + line * LINE)
        at = offsets[order[start + i]]
        image = data[at : at + size]
        for channel in range(channels):
            offset, scale = mean[channel], std[channel]
            if channels == 1:  # a step that is known to be 1 vectorises
                for j in range(size):
                    out[i, j] = (np.float32(image[j]) / byte - offset) / scale
            else:
                for j in range(channel, size, channels):
                    out[i, j] = (np.float32(image[j]) / byte - offset) / scale


@jit
def gather_looked_up(data, offsets, order, start, table, out):  # type: ignore[no-untyped-def]
    """out[i, j] = table[channel of j, byte j of image i]; table (C, 256) and out (n, values) int16.

    For the floats of two bytes, which numba does not compute with.
    """
    channels, size = table.shape[0], out.shape[1]
    ahead, lines, last = rows_ahead(size), lines_of(size), len(order) - 1
    for i in range(len(out)):
        coming = offsets[order[min(start + i + ahead, last)]]
        for line in range(lines):
            prefetch(data, coming + line * LINE)
        at = offsets[order[start + i]]
        image = data[at : at + size]
        for channel in range(channels):
            values = table[channel]
            for j in range(channel, size, channels):
                out[i, j] = values[image[j]]


class Normaliser:
    """(B, C, H, W) pixel values 0 to 255 to (value / 255 - mean) / std, computed in float32.

    The same operations in the same order as torchvision's ToTensor and Normalize, so the same bits. The constants are
    tensors on the device because a GPU multiplies by the reciprocal of a Python number instead of dividing by it.

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
    """(C, 256) int16 that carry the bits of a Normaliser for every byte; dtype is float16 or bfloat16."""
    every_byte = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).expand(1, len(mean), 1, 256)
    values = Normaliser(mean, std)(every_byte, dtype)
    table: np.ndarray = values.reshape(len(mean), 256).contiguous().view(torch.int16).numpy()
    return table
