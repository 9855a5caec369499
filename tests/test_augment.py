"""Augmentation against scipy's warp and against hand-made cases."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import affine_transform

from fastmnist.training.augment import draw_transforms, warp

OFF = {"shift": 0.0, "rotation": 0.0, "scale": 0.0}


def draw(count: int = 5, seed: int = 0, epoch: int = 0, size: tuple[int, int] = (28, 28), **strength: float):
    return draw_transforms(np.arange(count), count, seed, epoch, image_size=size, **(OFF | strength))


def to_pixels(matrix: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A matrix of affine_grid, (x, y) in -1..1, as scipy's matrix and offset, (row, column) in pixels."""
    height, width = size
    # x = (2 c + 1) / W - 1, and the same for rows.
    scale_in, scale_out = np.array([height, width]) / 2, 2 / np.array([height, width])
    linear = matrix[::-1, 1::-1]  # rows first
    shift = matrix[::-1, 2]
    pixels = scale_in[:, None] * linear * scale_out[None, :]
    start = 1 / np.array([height, width]) - 1  # coordinate of pixel 0
    return pixels, scale_in * (linear @ start + shift + 1) - 0.5


@given(st.integers(0, 1000), st.sampled_from([(28, 28), (16, 31), (33, 20)]))
def test_warp_agrees_with_scipy(seed: int, size: tuple[int, int]) -> None:
    transforms = draw(3, seed=seed, size=size, shift=3.0, rotation=25.0, scale=0.2)
    images = np.random.default_rng(seed).uniform(0, 255, (3, 1, *size)).astype(np.float32)
    warped = warp(torch.from_numpy(images), transforms).numpy()
    for image, matrix, result in zip(images[:, 0], transforms.numpy(), warped[:, 0], strict=True):
        linear, offset = to_pixels(matrix.astype(np.float64), size)
        padded = np.pad(image, 1)  # scipy's constant mode does not blend across the border, a zero margin does
        shifted = offset + 1 - linear @ np.ones(2)
        expected = affine_transform(padded, linear, shifted, order=1, mode="constant", output_shape=padded.shape)
        assert np.abs(expected[1:-1, 1:-1] - result).max() < 0.05  # of 255


def test_without_strength_nothing_changes() -> None:
    images = torch.rand(5, 1, 28, 28) * 255
    assert torch.allclose(warp(images, draw()), images, atol=1e-3)


def test_whole_pixel_shift_moves_and_fills_with_background() -> None:
    image = torch.full((1, 1, 8, 8), 9.0)
    # x_in = x_out - 2 pixels of 8, in units of half the width
    matrix = torch.tensor([[[1.0, 0.0, -0.5], [0.0, 1.0, 0.0]]])
    moved = warp(image, matrix)[0, 0]
    assert torch.allclose(moved[:, 2:], torch.tensor(9.0))
    assert torch.allclose(moved[:, :2], torch.tensor(0.0))


def test_rotation_keeps_lengths_on_oblong_images() -> None:
    matrix = draw(1, rotation=90.0, size=(20, 40))[0].double().numpy()
    pixels, _ = to_pixels(matrix, (20, 40))
    assert np.allclose(pixels @ pixels.T, np.eye(2), atol=1e-6)


@pytest.mark.parametrize("strength", [{"shift": 2.0}, {"rotation": 8.0}, {"scale": 0.1}])
def test_parameters_stay_within_their_limits_and_reach_them(strength: dict[str, float]) -> None:
    matrices = draw(20_000, **strength).double().numpy()
    shifts = np.abs(matrices[:, :, 2]) * 14  # pixels
    sizes = 1 / np.sqrt(np.abs(np.linalg.det(matrices[:, :, :2])))
    angles = np.rad2deg(np.arctan2(matrices[:, 0, 1], matrices[:, 0, 0]))
    limits = {"shift": 0.0, "rotation": 0.0, "scale": 0.0} | strength
    for values, limit in (
        (shifts, limits["shift"]),
        (np.abs(angles), limits["rotation"]),
        (np.abs(sizes - 1), limits["scale"]),
    ):
        assert values.max() <= limit + 1e-4
        assert values.max() >= limit * 0.99


@given(st.integers(0, 2**40), st.integers(0, 100), st.integers(1, 40), st.integers(0, 60))
def test_a_sample_draws_the_same_in_any_company(seed: int, epoch: int, count: int, more: int) -> None:
    some = {"shift": 2.0, "rotation": 8.0, "scale": 0.1, "image_size": (28, 28)}
    all_of_them = draw_transforms(np.arange(count), count + more, seed, epoch, **some)
    chosen = np.random.default_rng(seed).permutation(count)[: max(1, count // 2)]
    assert torch.equal(draw_transforms(chosen, count + more, seed, epoch, **some), all_of_them[chosen])
    assert torch.equal(draw_transforms(np.arange(count), count, seed, epoch, **some), all_of_them)


def test_epochs_and_seeds_draw_differently() -> None:
    first = draw(100, shift=2.0)
    assert not torch.equal(first, draw(100, epoch=1, shift=2.0))
    assert not torch.equal(first, draw(100, seed=1, shift=2.0))
