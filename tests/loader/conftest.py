"""One small file for the loader's tests, and loaders of it."""

from __future__ import annotations

import contextlib

import pytest

from fastmnist.loader import host
from fastmnist.loader.loader import Loader
from tests.loader.batches import COUNT, SHAPE


@pytest.fixture(scope="module")
def work_is_shared_among_threads():
    """Otherwise one thread gathers batches this small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "CALL_BYTES", 300)
        yield


@pytest.fixture(scope="module")
def samples(scratch, write_small_beton):
    """(path, images, labels) of one file for all tests that need no other."""
    path = scratch() / "samples.beton"
    return path, *write_small_beton(path, COUNT, SHAPE)


@pytest.fixture
def open_loader(samples):
    """Makes loaders of that file on the CPU, closed when the test ends."""
    with contextlib.ExitStack() as stack:

        def make(batch_size: int = 10, **options) -> Loader:
            return stack.enter_context(Loader(samples[0], batch_size, **{"device": "cpu"} | options))

        yield make
