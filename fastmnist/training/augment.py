"""Shift, rotation and scale of whole batches, on the device, inside the compiled step."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from fastmnist.data.order import sample_uniforms

DRAWS = 4


def draw_transforms(
    indices: np.ndarray,
    samples: int,
    seed: int,
    epoch: int,
    *,
    shift: float,
    rotation: float,
    scale: float,
    image_size: tuple[int, int],
) -> torch.Tensor:
    """One random similarity transform per sample, a pure function of (seed, epoch, sample index).

    Args:
        indices: (n,) the samples, each 0 to `samples` - 1.
        shift: largest shift in pixels, along each axis. rotation: largest angle in degrees. scale: largest change of
            size; 0.1 draws from 0.9 to 1.1. All are uniform.
        image_size: (H, W).

    Returns:
        (n, 2, 3) float32 on the CPU: the matrices that `torch.nn.functional.affine_grid` takes, which map output
        coordinates to input coordinates, both -1 to 1.
    """
    uniforms = sample_uniforms(samples, seed, epoch, DRAWS)[indices] * 2 - 1
    height, width = image_size
    right, down = uniforms[:, 0] * shift, uniforms[:, 1] * shift
    angle = np.deg2rad(uniforms[:, 2] * rotation)
    size = 1 + uniforms[:, 3] * scale
    cos, sin = np.cos(angle) / size, np.sin(angle) / size
    # p_in = R(-angle) / size * (p_out - shift), in pixels from the centre, then in halves of the image's sides.
    matrix = np.empty((len(indices), 2, 3))
    matrix[:, 0] = np.stack([cos, sin * height / width, -(cos * right + sin * down) * 2 / width], 1)
    matrix[:, 1] = np.stack([-sin * width / height, cos, (sin * right - cos * down) * 2 / height], 1)
    return torch.from_numpy(matrix.astype(np.float32))


def warp(images: torch.Tensor, transforms: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) float, resampled bilinearly after `transforms` (B, 2, 3); the outside is 0, background."""
    grid = functional.affine_grid(transforms, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
