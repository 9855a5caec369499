"""The order of samples: a permutation, fair, reproducible, and the same in every version."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fastmnist.loader import order
from fastmnist.loader.order import (
    AUGMENT_STREAM,
    ORDER_STREAM,
    epoch_order,
    quasi_random_order,
    random_bits,
    sample_uniforms,
)

SEEDS = st.integers(0, 2**64)
EPOCHS = st.integers(0, 10_000)
GOLDEN_10 = [2, 3, 5, 8, 4, 7, 6, 1, 9, 0]  # seed 0, epoch 0
GOLDEN_60000 = {(0, 0): 0x519D9B2C, (7, 3): 0x45A47B0F}  # (seed, epoch): CRC-32 of the order as <i8
GOLDEN_QUASI_RANDOM = {(0, 0): 0x6B731B24, (7, 3): 0x441C75C7}  # the same for 60,000 samples, 100 on each page
GOLDEN_UNIFORMS = {(0, 0): 0xF4B09A09, (7, 3): 0x653FB4FB}  # of four draws for each of 1,000 samples, as <f4


def shuffled(count: int, bits: list[int]) -> list[int]:
    """Durstenfeld's shuffle in plain Python: item k changes places with one of the items 0 to k."""
    items = list(range(count))
    for last in reversed(range(1, count)):
        other = int((bits[last] >> 11) / 2**53 * (last + 1))
        items[last], items[other] = items[other], items[last]
    return items


@given(count=st.integers(0, 500), seed=SEEDS, epoch=EPOCHS)
def test_order_is_a_permutation_and_a_new_array(count, seed, epoch):
    indices = np.arange(count) * 3 + 7
    before = indices.copy()
    order = epoch_order(indices, seed, epoch)
    np.testing.assert_array_equal(np.sort(order), indices)
    np.testing.assert_array_equal(indices, before)
    assert order.dtype == np.int64


@given(count=st.integers(1, 300), seed=SEEDS, epoch=EPOCHS)
def test_order_is_what_plain_python_shuffles_with_the_same_bits(count, seed, epoch):
    bits = random_bits(count, seed, epoch, ORDER_STREAM)
    assert epoch_order(np.arange(count), seed, epoch).tolist() == shuffled(count, bits.tolist())


@given(count=st.integers(20, 300), seed=SEEDS, epoch=EPOCHS)
def test_order_is_equal_for_equal_arguments_and_differs_between_epochs_and_seeds(count, seed, epoch):
    orders = [
        epoch_order(np.arange(count), s, e).tolist() for s, e in ((seed, epoch), (seed, epoch + 1), (seed + 1, epoch))
    ]
    assert orders[0] == epoch_order(np.arange(count), seed, epoch).tolist()
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]
    assert orders[1] != orders[2]


def test_seed_and_epoch_do_not_stand_in_for_each_other():
    seen = {tuple(epoch_order(np.arange(50), seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(seen) == 400


@given(count=st.integers(1, 200), seed=SEEDS, epoch=EPOCHS)
def test_order_of_a_subset_permutes_its_places_as_that_of_the_first_numbers(count, seed, epoch):
    subset = np.random.default_rng(count).permutation(1000)[:count]
    np.testing.assert_array_equal(epoch_order(subset, seed, epoch), subset[epoch_order(np.arange(count), seed, epoch)])


def test_order_is_that_of_every_version():
    """Pinned: a change here would give every run and every saved position another meaning."""
    assert epoch_order(np.arange(10), 0, 0).tolist() == GOLDEN_10
    for (seed, epoch), checksum in GOLDEN_60000.items():
        assert zlib.crc32(epoch_order(np.arange(60000), seed, epoch).astype("<i8").tobytes()) == checksum
    for (seed, epoch), checksum in GOLDEN_QUASI_RANDOM.items():
        found, _ = quasi_random_order(np.arange(60_000) // 100, seed, epoch)
        assert zlib.crc32(found.astype("<i8").tobytes()) == checksum
    for (seed, epoch), checksum in GOLDEN_UNIFORMS.items():
        assert zlib.crc32(sample_uniforms(1000, seed, epoch, 4).astype("<f4").tobytes()) == checksum


def test_bits_are_philoxs_with_numpys_seed_sequence():
    expected = np.random.Philox(np.random.SeedSequence([3, 4, 1])).random_raw(100)
    np.testing.assert_array_equal(random_bits(100, 3, 4, 1), expected)
    assert ORDER_STREAM != AUGMENT_STREAM


@given(count=st.integers(0, 100), more=st.integers(0, 100), draws=st.integers(1, 5), seed=SEEDS, epoch=EPOCHS)
def test_uniforms_of_a_sample_do_not_depend_on_how_many_samples_there_are(count, more, draws, seed, epoch):
    few, many = (sample_uniforms(n, seed, epoch, draws) for n in (count, count + more))
    assert many.shape == (count + more, draws)
    np.testing.assert_array_equal(few, many[:count])


def test_uniforms_are_the_upper_24_bits_in_zero_to_one(monkeypatch):
    monkeypatch.setattr(order, "BLOCK", 7777)
    uniforms = sample_uniforms(20_000, 1, 2, 3)
    expected = [(int(bits) >> 40) / 2**24 for bits in random_bits(60_000, 1, 2, AUGMENT_STREAM)]
    np.testing.assert_array_equal(uniforms.ravel(), expected)
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    assert stats.kstest(uniforms.ravel(), "uniform").pvalue > 1e-4


@pytest.mark.parametrize("count", [5, 12])
def test_each_sample_comes_equally_often_at_each_place(count):
    """Chi-square over (place, sample); the seed is fixed, so this passes always or never."""
    epochs = 4000
    seen = np.zeros((count, count))
    for epoch in range(epochs):
        seen[np.arange(count), epoch_order(np.arange(count), 0, epoch)] += 1
    expected = epochs / count
    statistic = ((seen - expected) ** 2 / expected).sum()
    assert stats.chi2.sf(statistic, (count - 1) ** 2) > 1e-4


def test_every_order_of_four_comes_equally_often():
    orders, seen = np.unique([epoch_order(np.arange(4), 5, epoch) for epoch in range(6000)], axis=0, return_counts=True)
    assert len(orders) == 24
    assert stats.chisquare(seen).pvalue > 1e-4
