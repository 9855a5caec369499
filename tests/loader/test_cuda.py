"""The way to a GPU, its order and its arithmetic, on a machine without one: streams and events are stood in for."""

from __future__ import annotations

import contextlib

import pytest
import torch

from fastmnist.loader import cuda as transfer
from fastmnist.loader.augment import Augmentation
from fastmnist.loader.cuda import copied_batches
from fastmnist.loader.loader import Loader
from fastmnist.loader.normalise import Normaliser

COUNT, BATCH = 101, 8
CPU = torch.device("cpu")


class Event:
    """Tells whether what was recorded was waited for."""

    def __init__(self) -> None:
        self.pending = False

    def record(self, stream: object) -> None:
        self.pending = True

    def synchronize(self) -> None:
        self.pending = False


@pytest.fixture
def without_a_gpu(monkeypatch):
    class Slot:
        def __init__(self, batch_size: int, image_size: int) -> None:
            self.images = torch.empty((batch_size, image_size), dtype=torch.uint8)
            self.labels = torch.empty(batch_size, dtype=torch.int64)
            self.copied = Event()

    def hand_over(images, labels, copied, device):
        assert copied.pending  # recorded behind this batch's copy, and its slot not filled again since
        return images.clone(), labels.clone()

    monkeypatch.setattr(transfer, "_PinnedSlot", Slot)
    monkeypatch.setattr(transfer, "_hand_over", hand_over)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "a stream")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


@pytest.fixture
def path(tmp_path, write_small_beton):
    write_small_beton(tmp_path / "a.beton", COUNT, (9, 7))
    return tmp_path / "a.beton"


def by_way_of_slots(loader: Loader, prefetch: int, first: int = 0):
    parts = (p.cut(a, a + BATCH) for p in loader._parts(0, first) for a in range(0, len(p.rows), BATCH))
    size = (BATCH, loader.file.image_size)
    return list(copied_batches(parts, loader._fill, loader._finish, size, CPU, prefetch))


def assert_same(found, expected, tolerance: float = 0.0) -> None:
    for (images, labels), (expected_images, expected_labels) in zip(found, expected, strict=True):
        assert torch.equal(labels, expected_labels)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert images.dtype == expected_images.dtype
        assert ((images - expected_images).abs() > tolerance).float().mean() <= 0.001


@pytest.mark.parametrize("prefetch", [0, 1, 3, 50])
@pytest.mark.parametrize("first", [0, 5])
def test_bytes_arrive_in_order_and_whole(without_a_gpu, path, prefetch, first):
    with Loader(path, BATCH, device="cpu", seed=2) as loader:
        found = by_way_of_slots(loader, prefetch, first)
        assert_same(found, [(images.clone(), labels) for images, labels in loader][first:])


@pytest.mark.parametrize("augment", [None, Augmentation(2.0, 20.0, 0.2)])
def test_floats_are_made_on_the_other_side(without_a_gpu, path, augment):
    with (
        Loader(path, BATCH, device="cpu", seed=2) as loader,
        Loader(path, BATCH, device="cpu", seed=2, dtype=torch.float32, augment=augment) as host,
    ):
        # As the constructor does for a device that is not the host: bytes are gathered, the rest is done over there.
        loader.dtype, loader.augment = torch.float32, augment
        loader._normalise = Normaliser(*loader.file.moments)
        expected = [(images.clone(), labels) for images, labels in host]
        assert_same(by_way_of_slots(loader, 2), expected, tolerance=1e-3)
