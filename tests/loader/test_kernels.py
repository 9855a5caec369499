"""The inner loops, against numpy's indexing and torchvision's transforms, bit for bit."""

from __future__ import annotations

import numba
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import Compose, Normalize, ToTensor

from fastmnist.loader.kernels import gather, gather_float32, gather_looked_up, jit
from fastmnist.loader.normalise import Normaliser, normalisation_table

TWO_BYTES = [torch.float16, torch.bfloat16]
MOMENTS = {1: ((0.1307,), (0.3081,)), 3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
IMAGES = {
    "count": st.integers(1, 20),
    "side": st.integers(1, 9),
    "channels": st.sampled_from([1, 3]),
    "seed": st.integers(0, 9),
}


def scattered(count: int, size: int, seed: int):
    """Images that lie in a larger array in any order, with gaps: (images, data, offsets, some indices)."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, size), np.uint8)
    offsets = random.permutation(count) * (size + 3) + 5
    data = random.integers(0, 256, count * (size + 3) + 9, np.uint8)
    for image, offset in zip(images, offsets, strict=True):
        data[offset : offset + size] = image
    data.flags.writeable = False
    return images, data, offsets, random.integers(0, count, 2 * count)


def with_torchvision(images: np.ndarray, mean, std) -> torch.Tensor:
    """(n, H, W, C) uint8 through ToTensor and Normalize, one by one, and back to (n, H, W, C)."""
    transform = Compose([ToTensor(), Normalize(mean, std)])
    return torch.stack([transform(image) for image in images]).permute(0, 2, 3, 1)


def assert_same_bits(found: np.ndarray, expected: torch.Tensor) -> None:
    integer = {2: np.int16, 4: np.int32}[found.dtype.itemsize]
    as_integer = expected.contiguous().view(torch.int16 if integer is np.int16 else torch.int32)
    np.testing.assert_array_equal(found.view(integer), as_integer.numpy().reshape(found.shape))


@given(count=st.integers(1, 30), size=st.integers(1, 100), seed=st.integers(0, 9))
def test_gather_is_numpys_fancy_indexing(count, size, seed):
    images, data, offsets, indices = scattered(count, size, seed)
    out = np.empty((len(indices), size), np.uint8)
    gather(data, offsets, indices, 0, out)
    np.testing.assert_array_equal(out, images[indices])


@given(**IMAGES)
def test_gather_float32_has_the_bits_of_totensor_and_normalize(count, side, channels, seed):
    images, data, offsets, indices = scattered(count, side * side * channels, seed)
    mean, std = MOMENTS[channels]
    out = np.empty((len(indices), images.shape[1]), np.float32)
    gather_float32(data, offsets, indices, 0, np.array(mean, np.float32), np.array(std, np.float32), out)
    assert_same_bits(out, with_torchvision(images[indices].reshape(-1, side, side, channels), mean, std))


@pytest.mark.parametrize("dtype", TWO_BYTES)
@given(**IMAGES)
def test_gather_looked_up_has_the_bits_of_torchvisions_result_cast(dtype, count, side, channels, seed):
    images, data, offsets, indices = scattered(count, side * side * channels, seed)
    mean, std = MOMENTS[channels]
    out = np.empty((len(indices), images.shape[1]), np.int16)
    gather_looked_up(data, offsets, indices, 0, normalisation_table(mean, std, dtype), out)
    assert_same_bits(out, with_torchvision(images[indices].reshape(-1, side, side, channels), mean, std).to(dtype))


def test_functions_compile_where_no_cache_can_be_written(monkeypatch):
    real = numba.njit

    def without_a_cache(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(numba, "njit", without_a_cache)

    @jit
    def twice(value):
        return 2 * value

    assert twice(4) == 8


EVERY_BYTE = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)


@given(mean=st.floats(0, 1), std=st.floats(1e-3, 1))
def test_every_byte_is_normalised_to_the_bits_of_torchvision_for_any_moments(mean, std):
    expected = with_torchvision(EVERY_BYTE, (mean,), (std,))
    out = np.empty((1, 256), np.float32)
    moments = np.array([mean], np.float32), np.array([std], np.float32)
    gather_float32(EVERY_BYTE.ravel(), np.zeros(1, np.int64), np.zeros(1, np.int64), 0, *moments, out)
    assert_same_bits(out, expected)
    for dtype in TWO_BYTES:
        assert_same_bits(normalisation_table((mean,), (std,), dtype), expected.to(dtype))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, *TWO_BYTES])
@pytest.mark.parametrize("channels", [1, 3])
def test_normalise_has_the_bits_of_torchvision(channels, dtype, device):
    images = EVERY_BYTE.repeat(channels, axis=3)
    mean, std = MOMENTS[channels]
    found = Normaliser(mean, std, device)(torch.from_numpy(images).permute(0, 3, 1, 2).to(device), dtype)
    assert found.dtype == dtype
    expected = with_torchvision(images, mean, std).to(dtype)
    assert torch.equal(found.cpu().permute(0, 2, 3, 1), expected)
