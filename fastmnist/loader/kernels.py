"""The inner loops of the loader: one call gathers a batch, as bytes or normalised.

Shared arguments: data (bytes,) uint8, what holds the images; offsets (N,) int64, where each begins; order (n,) int64,
the samples of an epoch; start, the place in `order` of the batch's first sample. Nothing is checked here.
"""

from __future__ import annotations

import numpy as np

from fastmnist.loader.jit import jit, prefetch

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
