"""One small file for the baselines' tests."""

import pytest

from tests.loader.batches import COUNT, SHAPE


@pytest.fixture(scope="module")
def samples(scratch, write_small_beton):
    """(path, images, labels) of one file of two pages for all tests that need no other."""
    path = scratch() / "samples.beton"
    return path, *write_small_beton(path, COUNT, SHAPE, page_size=2048)
