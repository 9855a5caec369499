"""Shift, rotation and scale at random: drawn once for host and device, applied to whole batches.

On the host `warp.gather_warped` applies them in the pass that gathers and normalises; on a device `warp_on_device`
does, inside the compiled step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from fastmnist.errors import ConfigError
from fastmnist.loader.order import sample_uniforms
from fastmnist.loader.warp import similarities

DRAWS = 4


@dataclass(frozen=True)
class Augmentation:
    """How far images are moved; each strength is the largest, and all are drawn uniformly.

    shift: pixels, along each axis. rotation: degrees. scale: change of size; 0.1 draws from 0.9 to 1.1.

    Raises:
        ConfigError: a strength that cannot be.
    """

    shift: float = 0.0
    rotation: float = 0.0
    scale: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.shift < math.inf and 0 <= self.rotation <= 180 and 0 <= self.scale < 1):
            raise ConfigError(
                f"{self}: shift (pixels) must be at least 0, rotation 0 to 180 (degrees), scale at least 0 and below 1"
            )

    @property
    def strengths(self) -> np.ndarray:
        """(3,) float64: shift in pixels, rotation in radians, change of size."""
        return np.array([self.shift, math.radians(self.rotation), self.scale])

    def draw(self, samples: int, seed: int, epoch: int) -> np.ndarray:
        """(samples, 4) float32 in [-1, 1): for `matrices`; row i is that of sample i, for any number of samples."""
        return sample_uniforms(samples, seed, epoch, DRAWS) * 2 - 1

    def matrices(self, draws: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
        """The transforms of some rows of `draw`, which the host's kernel computes in the same way.

        Args:
            draws: (n, 4) float32.
            image_size: (H, W).

        Returns:
            (n, 2, 3) float32, in pixels; see `warp` for what they mean.
        """
        matrices = np.empty((len(draws), 2, 3), np.float32)
        similarities(draws, self.strengths, *image_size, matrices)
        return matrices


def warp_on_device(images: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) float, resampled bilinearly after `matrices` (B, 2, 3) in pixels; the outside is 0."""
    height, width = images.shape[-2:]
    # affine_grid's coordinates run from -1 to 1, from edge to edge: u = (2 x + 1) / W - 1.
    rows = []
    for row, size in ((matrices[:, 0], width), (matrices[:, 1], height)):
        a, b, c = row.unbind(1)
        shift = (a * (width - 1) + b * (height - 1) + 2 * c + 1) / size - 1
        rows.append(torch.stack([a * (width / size), b * (height / size), shift], 1))
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
