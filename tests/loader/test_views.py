"""Several views of an image: each as a loader of its own would draw it, in one gather."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmnist.errors import ConfigError
from fastmnist.loader import loader as loader_module
from fastmnist.loader import order as order_module
from fastmnist.loader.augment import Augmentation
from fastmnist.loader.device import DeviceGatherer, Finish, PlainCopier
from fastmnist.loader.host import HostGatherer, SampleCopy
from fastmnist.loader.loader import Loader
from tests.loader.batches import COUNT, MOVES, SHAPE, assert_same_batches

pytestmark = pytest.mark.usefixtures("work_is_shared_among_threads")
CPU = torch.device("cpu")


class View(Augmentation):
    """An augmentation whose only view is number `number` of MOVES."""

    number = 0

    def draw(self, samples: int, seed: int, epoch: int, view: int = 0) -> np.ndarray:
        return MOVES.draw(samples, seed, epoch, self.number)


def alone(number: int) -> Augmentation:
    return type("View", (View,), {"number": number})(MOVES.shift, MOVES.rotation, MOVES.scale)


def assert_views(loader: Loader, singles: list[Loader], chunks: int = 1) -> None:
    """The loader's next epoch is that of a plain loader for each view."""
    for together, *each in zip(loader.chunks(chunks), *(single.chunks(chunks) for single in singles), strict=True):
        assert together.images.shape == (len(singles), *each[0].images.shape)
        for view, single in zip(together.images, each, strict=True):
            assert view.is_contiguous(memory_format=torch.channels_last)
            assert_same_batches([(view, together.labels, together.rows)], [single])


@settings(max_examples=12)
@given(
    views=st.integers(2, 3),
    batch_size=st.sampled_from([4, 10, COUNT]),
    placement=st.sampled_from(["stream", "resident"]),
    threads=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    order=st.sampled_from(["random", "quasi_random"]),
    drop_last=st.booleans(),
    chunks=st.integers(1, 3),
)
def test_each_view_is_that_of_a_loader_of_its_own(paged, views, batch_size, chunks, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "WINDOW_PAGES", 2)
        patch.setattr(loader_module, "PART_SAMPLES", 30)
        options |= {"device": "cpu", "seed": 3, "rank": 1, "world_size": 2}
        singles = [Loader(paged, batch_size, augment=alone(number), **options) for number in range(views)]
        loader = Loader(paged, batch_size, augment=MOVES, views=views, **options)
        assert len(loader) == len(singles[0])
        for _ in range(2):
            assert_views(loader, singles, chunks)


@pytest.fixture(scope="module")
def paged(scratch, write_small_beton):
    path = scratch() / "paged.beton"
    write_small_beton(path, COUNT, SHAPE, page_size=512)
    return path


@pytest.mark.parametrize("kind", [DeviceGatherer, PlainCopier])
def test_a_device_augments_each_view(samples, monkeypatch, kind):
    """The CPU in the place of another device."""

    def make_memory(self):
        finish, batch_size = Finish(self.file.image_shape, self.dtype, self.augment, CPU, self.moments), 10 * self.views
        if kind is DeviceGatherer:
            self._data, self._offsets = np.empty(0, np.uint8), np.empty(0, np.int64)
            return DeviceGatherer(SampleCopy(self.file, self.indices), finish, CPU, batch_size)
        return PlainCopier(HostGatherer(self.file, batch_size, torch.uint8, None, 2), finish, CPU)

    monkeypatch.setattr(Loader, "_make_memory", make_memory)
    options = {"device": "cpu", "dtype": torch.float32}
    for chunks in (1, 3):
        singles = [Loader(samples[0], 10, augment=alone(number), **options) for number in range(2)]
        assert_views(Loader(samples[0], 10, augment=MOVES, views=2, **options), singles, chunks)


@pytest.mark.gpu
@pytest.mark.parametrize("placement", ["resident", "stream"])
def test_a_gpu_augments_each_view(samples, placement):
    options = {"dtype": torch.float16, "device": "cuda", "placement": placement}
    singles = [Loader(samples[0], 10, augment=alone(number), **options) for number in range(2)]
    assert_views(Loader(samples[0], 10, augment=MOVES, views=2, **options), singles)


def test_views_differ_from_each_other_and_from_each_epochs(open_loader):
    loader = open_loader(COUNT, dtype=torch.float32, augment=MOVES, views=2, shuffle=False)
    images = [view for batch, _ in itertools.chain(loader, loader) for view in batch]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(images, 2))


def test_positions_copies_and_single_samples_of_views(open_loader):
    options = {"dtype": torch.float32, "augment": MOVES}
    loader, plain = open_loader(views=2, **options), open_loader(**options)
    for each in (loader, plain):
        each.seek(1, 4)
    assert loader.state_dict() == plain.state_dict()
    with pickle.loads(pickle.dumps(loader)) as copy:
        assert torch.equal(next(iter(copy))[0][0], next(iter(plain))[0])
    images, labels = loader.get(range(30), epoch=2)
    assert images.shape == (2, 30, 1, *SHAPE)
    assert_same_batches([(images[0], labels)], [plain.get(range(30), epoch=2)])
    with pytest.raises(ConfigError, match="views"):
        loader.dataset[0]


@pytest.mark.parametrize("options", [{"views": 0}, {"views": 2}, {"views": 1.5}, {"views": 2, "dtype": torch.float32}])
def test_views_that_cannot_be_are_refused(samples, options):
    with pytest.raises(ConfigError, match="views"):
        Loader(samples[0], device="cpu", **options)
