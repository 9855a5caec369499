"""Other projects' loaders: what was written comes back, every epoch in another order."""

from __future__ import annotations

import gc
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from fastmnist.baselines.peers import PEERS, missing
from tests.conftest import skip_or_fail

pytestmark = pytest.mark.peers
COUNT, BATCH, SHAPE = 203, 32, (28, 28, 1)
SIZES = [BATCH] * (COUNT // BATCH) + [COUNT % BATCH]
# Their workers share out the shards, and each ends with a batch of its own.
BY_SHARD = ("hf-datasets", "webdataset")


# WebDataset closes no tar file: each is closed when it is forgotten.
LEAVES_OPEN = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
EACH = [pytest.param(name, marks=LEAVES_OPEN if name == "webdataset" else ()) for name in PEERS]


@pytest.fixture(autouse=True)
def what_was_left_is_collected_here(request):
    """Under the filter of the test that left it."""
    yield
    if "webdataset" in request.node.name:
        gc.collect()


@pytest.fixture(scope="module", params=EACH)
def written(request, scratch, random_samples):
    """A peer's class, the folder that it wrote, and the samples as pairs of bytes and label."""
    peer = PEERS[request.param]
    if lacking := missing(peer):
        skip_or_fail(peer.extra, lacking)
    images, labels = random_samples(COUNT, SHAPE)
    folder = scratch()
    peer().write(images, labels, folder)
    return peer, folder, list(zip([image.tobytes() for image in images], labels.tolist(), strict=True))


def pairs(batches):
    """The samples of those batches, in their order."""
    return [
        (image.numpy().tobytes(), int(label))
        for images, labels in batches
        for image, label in zip(images, labels, strict=True)
    ]


def test_an_epoch_is_every_sample_once(written):
    peer, folder, samples = written
    batches = list(peer().epoch(folder, BATCH, epoch=0, seed=0, workers=0))  # all are held until they are looked at
    assert [len(labels) for _, labels in batches] == SIZES
    assert [len(images) for images, _ in batches] == SIZES
    for images, labels in batches:
        assert (images.dtype, labels.dtype, labels.ndim) == (torch.uint8, torch.int64, 1)
        assert images.numel() == len(labels) * np.prod(SHAPE)
    assert Counter(pairs(batches)) == Counter(samples)


def test_epochs_differ_and_repeat(written):
    peer, folder, samples = written
    going_on, anew = peer(), peer()
    first, second = (pairs(going_on.epoch(folder, BATCH, epoch, seed=3, workers=0)) for epoch in range(2))
    assert samples != first != second
    assert Counter(second) == Counter(samples)
    assert pairs(anew.epoch(folder, BATCH, epoch=1, seed=3, workers=0)) == second
    assert pairs(anew.epoch(folder, BATCH, epoch=0, seed=3, workers=0)) == first
    assert pairs(anew.epoch(folder, BATCH, epoch=0, seed=4, workers=0)) != first


def test_an_epoch_that_was_left_early_changes_no_other(written):
    peer, folder, _ = written
    left, whole = peer(), peer()
    expected = [pairs(whole.epoch(folder, BATCH, epoch, seed=0, workers=0)) for epoch in range(2)]
    assert pairs(islice(left.epoch(folder, BATCH, 0, seed=0, workers=0), 2)) == expected[0][: 2 * BATCH]
    assert pairs(left.epoch(folder, BATCH, epoch=1, seed=0, workers=0)) == expected[1]


def test_workers(written):
    peer, folder, samples = written
    going_on, anew = peer(), peer()
    epochs = [list(going_on.epoch(folder, BATCH, epoch, seed=0, workers=2)) for epoch in range(2)]
    for batches in epochs:
        assert Counter(pairs(batches)) == Counter(samples)
        if peer.name not in BY_SHARD:
            assert [len(labels) for _, labels in batches] == SIZES
    assert pairs(epochs[0]) != pairs(epochs[1])
    for epoch in (1, 0):  # begun with any
        assert pairs(anew.epoch(folder, BATCH, epoch, seed=0, workers=2)) == pairs(epochs[epoch])


def test_several_channels(written, scratch, random_samples):
    peer, _, _ = written
    images, labels = random_samples(7, (5, 4, 3), classes=1000)
    images.setflags(write=False)
    folder = scratch()
    peer().write(images, labels, folder)
    found = pairs(peer().epoch(folder, BATCH, epoch=0, seed=0, workers=0))
    assert Counter(found) == Counter(zip([image.tobytes() for image in images], labels.tolist(), strict=True))


@pytest.mark.parametrize("name", PEERS)
def test_what_is_not_installed_is_named(name, monkeypatch):
    peer = PEERS[name]
    monkeypatch.setattr(peer, "package", "no-such-package-anywhere")
    lacking = missing(peer)
    assert "no-such-package-anywhere" in lacking
    assert f"pip install '.[{peer.extra}]'" in lacking


def test_names():
    assert all(peer.name == name for name, peer in PEERS.items())
    assert len({peer.package for peer in PEERS.values()}) == len(PEERS)
