"""Mean and standard deviation of many images."""

from __future__ import annotations

import numpy as np


class Moments:
    """Mean and standard deviation per channel, added up exactly in integers."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.total = np.zeros(channels, np.int64)
        self.squares = np.zeros(channels, np.int64)

    def add(self, images: np.ndarray) -> None:
        """Takes in (n, H, W[, C]) uint8."""
        values = images.reshape(-1, len(self.total))
        self.count += len(values)
        for start in range(0, len(values), 1 << 16):  # parts that stay in the cache
            part = values[start : start + (1 << 16)]
            self.total += part.sum(axis=0, dtype=np.int64)
            wide = part.astype(np.uint16)  # 255 squared fits
            self.squares += (wide * wide).sum(axis=0, dtype=np.int64)

    def result(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) of values scaled to [0, 1]; a constant channel has std 1, so that it can be divided by."""
        mean = self.total / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - mean**2, 0.0)) / 255
        return tuple((mean / 255).tolist()), tuple(np.where(std > 0, std, 1.0).tolist())
