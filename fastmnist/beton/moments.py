"""Mean and standard deviation per channel, added up exactly in integers."""

from __future__ import annotations

import numpy as np


class Moments:
    """Sums over pixels, per channel.

    Attributes:
        count: pixels added.
        total, squares: (C,) int64, sums of their values (0 to 255) and of the values' squares.

    >>> moments = Moments(channels=1)
    >>> moments.add(np.array([[[0, 255], [0, 255]]], np.uint8))  # (1, 2, 2)
    >>> moments.result()
    ((0.5,), (0.5,))
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.total = np.zeros(channels, np.int64)
        self.squares = np.zeros(channels, np.int64)

    def add(self, images: np.ndarray) -> None:
        """Adds images (n, H, W[, C]) uint8."""
        values = images.reshape(-1, len(self.total))
        self.count += len(values)
        for start in range(0, len(values), 1 << 16):  # parts that stay in the cache
            part = values[start : start + (1 << 16)]
            self.total += part.sum(axis=0, dtype=np.int64)
            wide = part.astype(np.uint16)  # 255 squared fits
            self.squares += (wide * wide).sum(axis=0, dtype=np.int64)

    def merge(self, other: Moments) -> None:
        """Adds the sums of `other`."""
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    def result(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std), each one float per channel, of values scaled to [0, 1]; a constant channel has std 1."""
        mean = self.total / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - mean**2, 0.0)) / 255
        return tuple((mean / 255).tolist()), tuple(np.where(std > 0, std, 1.0).tolist())
