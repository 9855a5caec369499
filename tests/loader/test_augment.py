"""Augmentation: what is drawn, and the warps of host and device, against scipy's and against hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import affine_transform
from torchvision.transforms.functional import hflip

from fastmnist.errors import ConfigError
from fastmnist.loader.augment import Augmentation, warp_on_device, warp_on_host
from fastmnist.loader.loader import Loader
from fastmnist.loader.normalise import Normaliser
from fastmnist.loader.warp import gather_warped
from tests.loader.batches import joined

STRONG = Augmentation(shift=4.0, rotation=40.0, scale=0.3, flip=True)
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))
CLOSE = 0.02  # grey levels of 255: coordinates are float32


def draw(count: int, size: tuple[int, int] = (28, 28), seed: int = 0, epoch: int = 0, **strength: float) -> np.ndarray:
    augmentation = Augmentation(**strength)
    return augmentation.matrices(augmentation.draw(count, seed, epoch), size)


def on_host(images: np.ndarray, augmentation: Augmentation, draws: np.ndarray) -> np.ndarray:
    """(n, H, W, C) uint8 through the host's kernel: (n, H, W, C) float32, 0 to 255."""
    count, height, width, channels = images.shape
    data = images.reshape(-1).copy()
    data.flags.writeable = False
    out = np.empty((count, height * width * channels), np.float32)
    offsets = np.arange(count) * out.shape[1]
    one, nought = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    matrices = augmentation.matrices(draws, (height, width))
    gather_warped(data, offsets, np.arange(count), 0, matrices, height, width, one, nought, out)
    return out.reshape(images.shape)


def on_device(images: np.ndarray, augmentation: Augmentation, draws: np.ndarray) -> np.ndarray:
    matrices = augmentation.matrices(draws, images.shape[1:3])
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32)
    return warp_on_device(tensor, torch.from_numpy(matrices)).permute(0, 2, 3, 1).numpy()


def of_a_batch(images: np.ndarray, augmentation: Augmentation, draws: np.ndarray) -> np.ndarray:
    """As a trainer on a CPU warps the batches that any loader gives it."""
    matrices = torch.from_numpy(augmentation.matrices(draws, images.shape[1:3]))
    one, nought = np.ones(images.shape[3], np.float32), np.zeros(images.shape[3], np.float32)
    return warp_on_host(torch.from_numpy(images).permute(0, 3, 1, 2), matrices, one, nought).permute(0, 2, 3, 1).numpy()


def with_scipy(images: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """In float64; scipy's axes are row and column, ours x and y."""
    found = np.empty(images.shape)
    for image, matrix, result in zip(images.astype(np.float64), matrices.astype(np.float64), found, strict=True):
        for channel in range(image.shape[2]):
            linear, offset = matrix[::-1, 1::-1], matrix[::-1, 2]
            result[..., channel] = affine_transform(image[..., channel], linear, offset, order=1, mode="grid-constant")
    return found


@pytest.mark.parametrize("warp", [on_host, of_a_batch, on_device])
@given(seed=st.integers(0, 10_000), size=SIZES, channels=st.sampled_from([1, 3]))
def test_a_warp_agrees_with_scipys(warp, seed, size, channels):
    images = np.random.default_rng(seed).integers(0, 256, (3, *size, channels), np.uint8)
    draws = STRONG.draw(3, seed, 0)
    matrices = STRONG.matrices(draws, size)
    # Right at the border of the background float32 may fall on either side: there a step of the image is the error.
    wrong = np.abs(warp(images, STRONG, draws) - with_scipy(images, matrices)) > CLOSE
    assert wrong.mean() <= 0.001


@pytest.mark.parametrize("warp", [on_host, of_a_batch, on_device])
def test_without_strength_nothing_changes(warp):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), np.uint8)
    still = Augmentation()
    np.testing.assert_allclose(warp(images, still, still.draw(5, 0, 0)), images, atol=1e-3)


@pytest.mark.parametrize("warp", [on_host, of_a_batch, on_device])
@pytest.mark.parametrize("right", [-9, -2, 0, 3, 8, 200])
def test_a_shift_by_whole_pixels_moves_and_fills_with_background(warp, right):
    images = np.random.default_rng(1).integers(1, 256, (1, 8, 8, 1), np.uint8)
    moves, draws = Augmentation(shift=float(abs(right))), np.array([[np.sign(right), 0, 0, 0]], np.float32)
    expected = np.zeros_like(images)
    if abs(right) < 8:
        expected[:, :, max(right, 0) : 8 + min(right, 0)] = images[:, :, max(-right, 0) : 8 - max(right, 0)]
    np.testing.assert_allclose(warp(images, moves, draws), expected, atol=1e-2)


@pytest.mark.parametrize("warp", [on_host, of_a_batch])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_flip_alone_is_torchvisions_to_the_bit(warp, channels):
    """Half of the images, and the same ones on host and device."""
    images = np.random.default_rng(2).integers(0, 256, (200, 7, 10, channels), np.uint8)
    mirror = Augmentation(flip=True)
    draws = mirror.draw(200, seed=3, epoch=1)
    found = torch.from_numpy(warp(images, mirror, draws)).permute(0, 3, 1, 2)
    plain = torch.from_numpy(images).permute(0, 3, 1, 2)
    flipped = torch.tensor([torch.equal(one, hflip(two).float()) for one, two in zip(found, plain, strict=True)])
    assert 70 < int(flipped.sum()) < 130
    assert torch.equal(found[~flipped], plain[~flipped].float())
    matrices = torch.from_numpy(mirror.matrices(draws, (7, 10)))
    assert torch.equal(mirror.on_device(plain.float(), matrices), found)


@given(seed=st.integers(0, 10_000), size=SIZES)
def test_a_flip_mirrors_what_the_other_strengths_give_and_leaves_their_draws(seed, size):
    strong = {"shift": 4.0, "rotation": 40.0, "scale": 0.3}
    plain, mirror = Augmentation(**strong), Augmentation(**strong, flip=True)
    images = np.random.default_rng(seed).integers(0, 256, (4, *size, 1), np.uint8)
    draws = mirror.draw(4, seed, 0)
    np.testing.assert_array_equal(draws[:, :4], plain.draw(4, seed, 0))
    draws[:, 4] = [-1, 0.5, -0.1, 0]  # below 0 flips
    expected, found = on_host(images, plain, draws[:, :4].copy()), on_host(images, mirror, draws)
    np.testing.assert_array_equal(found[1::2], expected[1::2])
    wrong = np.abs(found[::2] - expected[::2, :, ::-1]) > CLOSE
    assert wrong.mean() <= 0.001 or wrong.sum() <= 2


@pytest.mark.parametrize("strength", [{"shift": 2.0}, {"rotation": 8.0}, {"scale": 0.1}])
def test_parameters_stay_within_their_limits_and_reach_them(strength):
    matrices = draw(20_000, **strength).astype(np.float64)
    inverse = np.linalg.inv(matrices[:, :, :2])  # from the image to where its parts go
    centre = np.array([13.5, 13.5])
    goes_to = np.einsum("nij,nj->ni", inverse, centre - matrices[:, :, 2])
    sizes = np.sqrt(np.abs(np.linalg.det(inverse)))
    angles = np.rad2deg(np.arctan2(inverse[:, 1, 0], inverse[:, 0, 0]))
    limits = {"shift": 0.0, "rotation": 0.0, "scale": 0.0} | strength
    for values, limit in (
        (goes_to - centre, limits["shift"]),
        (angles, limits["rotation"]),
        (sizes - 1, limits["scale"]),
    ):
        assert np.abs(values).max() <= limit + 1e-4
        assert values.max() >= limit * 0.99
        assert values.min() <= -limit * 0.99


@given(st.integers(0, 2**40), st.integers(0, 100), st.integers(1, 40), st.integers(0, 60))
def test_a_sample_draws_the_same_in_any_company(seed, epoch, count, more):
    few, many = (STRONG.draw(n, seed, epoch) for n in (count, count + more))
    np.testing.assert_array_equal(few, many[:count])
    chosen = np.random.default_rng(seed).permutation(count)[: max(1, count // 2)]
    np.testing.assert_array_equal(STRONG.matrices(many[chosen], (28, 28)), STRONG.matrices(few, (28, 28))[chosen])


def test_epochs_and_seeds_draw_differently():
    first = draw(100, shift=2.0)
    assert not np.array_equal(first, draw(100, epoch=1, shift=2.0))
    assert not np.array_equal(first, draw(100, seed=1, shift=2.0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"shift": -1},
        {"shift": np.inf},
        {"shift": np.nan},
        {"rotation": 181},
        {"scale": 1},
        {"scale": -0.1},
        {"flip": 0.5},
    ],
)
def test_a_strength_that_cannot_be_is_a_config_error(wrong):
    with pytest.raises(ConfigError, match=r"shift \(pixels\)"):
        Augmentation(**wrong)


# In the loader


@pytest.fixture(scope="module", params=[(12, 9), (7, 8, 3)], ids=["grey", "colour"])
def samples(request, scratch, write_small_beton):
    path = scratch() / "a.beton"
    write_small_beton(path, 150, request.param)
    return path


@given(
    threads=st.integers(1, 3),
    batch_size=st.sampled_from([7, 32, 150]),
    placement=st.sampled_from(["stream", "resident"]),
    epoch=st.integers(0, 3),
)
def test_the_loader_gives_each_sample_its_own_transform_of_the_epoch(samples, threads, batch_size, placement, epoch):
    subset = np.arange(149, 9, -1)
    options = {"indices": subset, "device": "cpu", "seed": 3, "placement": placement, "threads": threads}
    with Loader(samples, batch_size, dtype=torch.float32, augment=STRONG, **options) as loader:
        loader.set_epoch(epoch)
        file = loader.file
        found, _, rows = joined(loader.chunks())
        plain = torch.from_numpy(file.images(rows.numpy())).permute(0, 3, 1, 2).to(torch.float32)
        matrices = STRONG.matrices(STRONG.draw(len(file), 3, epoch)[rows], file.image_shape[:2])
        expected = Normaliser(*file.moments)(warp_on_device(plain, torch.from_numpy(matrices)))
    wrong = (found - expected).abs() > CLOSE / 255 / 0.28
    assert wrong.float().mean() <= 0.001


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_floats_are_the_float32_rounded(samples, dtype):
    def batches(dtype):
        with Loader(samples, 40, device="cpu", dtype=dtype, augment=STRONG) as loader:
            return torch.cat([images.clone() for images, _ in loader])

    assert torch.equal(batches(dtype), batches(torch.float32).to(dtype))


def test_a_resumed_epoch_keeps_its_transforms(samples):
    def make():
        return Loader(samples, 40, device="cpu", dtype=torch.float32, augment=STRONG)

    with make() as one, make() as other:
        one.set_epoch(2)
        batches = iter(one)
        next(batches)
        other.load_state_dict(one.state_dict())
        for (found, _), (expected, _) in zip(other, batches, strict=True):
            assert torch.equal(found, expected)


def test_bytes_cannot_be_augmented(samples):
    with pytest.raises(ConfigError, match="float dtype"):
        Loader(samples, 10, device="cpu", augment=STRONG)


@pytest.mark.gpu
@pytest.mark.parametrize("placement", ["resident", "stream"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gpu_gets_the_same_augmented_images(samples, placement, dtype):
    options = {"dtype": dtype, "augment": STRONG, "seed": 5}
    with (
        Loader(samples, 40, device="cpu", **options) as here,
        Loader(samples, 40, device="cuda", placement=placement, **options) as there,
    ):
        for (expected, labels), (found, found_labels) in zip(here, there, strict=True):
            assert found.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(found_labels.cpu(), labels)
            wrong = (found.float().cpu() - expected.float()).abs() > 0.02
            assert wrong.float().mean() <= 0.005
