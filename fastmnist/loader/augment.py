"""Augmentation: random shift, rotation, scale and flip, drawn once for host and device and applied to whole batches.

On the host `warp.gather_warped` applies them while it gathers and normalises; on a GPU `warp_on_device` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError
from fastmnist.loader.order import AUGMENT_STREAM, FLIP_STREAM, VIEW_STREAMS, sample_uniforms
from fastmnist.loader.warp import gather_warped, similarities

DRAWS = 4


@dataclass(frozen=True)
class Augmentation:
    """Strengths of a random shift, rotation and scale, drawn uniformly up to these maxima, and a random flip.

    A draw is a pure function of (seed, epoch, view, sample). With and without the flip, the others draw the same.

    Attributes:
        shift: pixels, along each axis. rotation: degrees. scale: relative change of size; 0.1 draws from 0.9 to 1.1.
        flip: left and right change sides with probability 0.5.

    Raises:
        ConfigError: a strength out of range.

    >>> from fastmnist import Augmentation
    >>> augmentation = Augmentation(shift=2.0, rotation=8.0, scale=0.1)
    >>> draws = augmentation.draw(60_000, seed=0, epoch=0)
    >>> draws.shape, draws.dtype
    ((60000, 4), dtype('float32'))
    >>> matrices = augmentation.matrices(draws[:5], image_size=(28, 28))
    >>> matrices.shape
    (5, 2, 3)
    >>> images = torch.rand(5, 1, 28, 28)
    >>> warp_on_device(images, torch.from_numpy(matrices)).shape
    torch.Size([5, 1, 28, 28])
    """

    shift: float = 0.0
    rotation: float = 0.0
    scale: float = 0.0
    flip: bool = False

    @classmethod
    def of(cls, config: TrainConfig) -> Augmentation | None:
        """Augmentation of a run with these settings; None without any."""
        return cls(config.shift, config.rotation, config.scale, bool(config.flip)) if config.augment else None

    def __post_init__(self) -> None:
        strengths = 0 <= self.shift < math.inf and 0 <= self.rotation <= 180 and 0 <= self.scale < 1
        if not strengths or not isinstance(self.flip, bool):
            raise ConfigError(
                f"{self}: shift (pixels) must be at least 0, rotation 0 to 180 (degrees), scale at least 0 and below "
                "1, flip True or False"
            )

    @property
    def strengths(self) -> np.ndarray:
        """(3,) float64: shift in pixels, rotation in radians, change of size."""
        return np.array([self.shift, math.radians(self.rotation), self.scale])

    def draw(self, samples: int, seed: int, epoch: int, view: int = 0) -> np.ndarray:
        """(samples, 4) float32 in [-1, 1), or (samples, 5) with the flip's, for `matrices`.

        Row i belongs to sample i, whatever `samples` is. Each view of an image has draws of its own.
        """
        first = VIEW_STREAMS * view
        draws = sample_uniforms(samples, seed, epoch, DRAWS, first + AUGMENT_STREAM)
        if self.flip:
            draws = np.concatenate([draws, sample_uniforms(samples, seed, epoch, 1, first + FLIP_STREAM)], axis=1)
        return draws * 2 - 1

    def draw_views(self, samples: int, seed: int, epoch: int, views: int) -> np.ndarray:
        """`draw` of one view, or (samples, views, 4 or 5) of several."""
        if views == 1:
            return self.draw(samples, seed, epoch)
        return np.stack([self.draw(samples, seed, epoch, view) for view in range(views)], axis=1)

    def matrices(self, draws: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
        """Affine transforms of output to input pixels, as the host's kernel computes them; see `warp`.

        Args:
            draws: (n, 4) or (n, 5) float32, rows of `draw`.
            image_size: (H, W).

        Returns:
            (n, 2, 3) float32, in pixels.
        """
        matrices = np.empty((len(draws), 2, 3), np.float32)
        similarities(draws, self.strengths, *image_size, matrices)
        if self.flip:  # first x becomes W - 1 - x
            flipped = draws[:, DRAWS] < 0
            matrices[flipped, :, 2] += matrices[flipped, :, 0] * np.float32(image_size[1] - 1)
            matrices[flipped, :, 0] *= -1
        return matrices

    def on_device(self, images: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        """`warp_on_device`; a flip alone moves pixels exactly, where interpolation would round."""
        if self.flip and not self.strengths.any():
            return torch.where(matrices[:, 0, 0].view(-1, 1, 1, 1) < 0, images.flip(3), images)
        return warp_on_device(images, matrices)


def warp_on_host(images: torch.Tensor, matrices: torch.Tensor, scale: np.ndarray, bias: np.ndarray) -> torch.Tensor:
    """`warp_on_device` by the host's kernel, a tenth of its time; the values times `scale` plus `bias` (C,).

    Args:
        images: (B, C, H, W) uint8 on the CPU.
        matrices: (B, 2, 3) float32, in pixels.

    Returns:
        (B, C, H, W) float32 in channels_last.
    """
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    count, height, width, _ = pixels.shape
    data, order = pixels.reshape(-1), np.arange(count)
    data.flags.writeable = False  # as a file's map, so that one compiled kernel serves both
    out = np.empty(pixels.shape, np.float32)
    offsets = order * (data.size // count)
    gather_warped(data, offsets, order, 0, matrices.numpy(), height, width, scale, bias, out.reshape(count, -1))
    return torch.from_numpy(out).permute(0, 3, 1, 2)


def warp_on_device(images: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) float, resampled bilinearly by `matrices` (B, 2, 3) in pixels; the outside is 0."""
    height, width = images.shape[-2:]
    # affine_grid's coordinates run from -1 to 1, edge to edge: u = (2 x + 1) / W - 1.
    rows = []
    for row, size in ((matrices[:, 0], width), (matrices[:, 1], height)):
        a, b, c = row.unbind(1)
        shift = (a * (width - 1) + b * (height - 1) + 2 * c + 1) / size - 1
        rows.append(torch.stack([a * (width / size), b * (height / size), shift], 1))
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
