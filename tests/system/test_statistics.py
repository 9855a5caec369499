"""Medians with intervals that hold what they promise, and contenders measured in turn."""

import time
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmnist.system.environment import commit, describe_hardware
from fastmnist.system.statistics import LEAST_FOR_INTERVAL, LogHistogram, in_turns, ratios, row, summarise

VALUES = st.lists(st.floats(1e-9, 1e12), min_size=1, max_size=60)


@given(VALUES)
def test_median_and_range_are_numpys(values):
    found = summarise(values)
    assert found.median == np.median(values)
    assert (found.min, found.max, found.n) == (min(values), max(values), len(values))
    assert found.min <= found.low <= found.median <= found.high <= found.max


@pytest.mark.parametrize("n", [*range(1, 61), 200, 1000])
def test_the_intervals_ends_are_order_statistics_of_the_binomial(n):
    """Conover's definition: as many values are left out on each side as fair coins show so few heads in 2.5 %."""
    tail, left_out = Fraction(1, 2**n), 0
    while n >= LEAST_FOR_INTERVAL and tail + Fraction(comb(n, left_out + 1), 2**n) <= Fraction(25, 1000):
        left_out += 1
        tail += Fraction(comb(n, left_out), 2**n)
    found = summarise(np.random.default_rng(n).permutation(n))
    assert (found.low, found.high) == (left_out, n - 1 - left_out)


def test_the_interval_holds_the_median_as_often_as_it_says():
    random = np.random.default_rng(0)
    held = [s.low <= 1 <= s.high for s in (summarise(random.exponential(1 / np.log(2), 9)) for _ in range(500))]
    assert 0.94 <= np.mean(held) < 0.98  # 1 - 2 P(B <= 1) of Bin(9, 1/2) is 0.961


def test_few_values_have_their_range_as_interval():
    found = summarise([3.0, 1.0, 2.0])
    assert (found.low, found.high) == (1.0, 3.0)


def test_nothing_cannot_be_summarised():
    with pytest.raises(ValueError, match="no value"):
        summarise([])


def test_overlap_is_symmetric_and_counts_a_common_end():
    one, other, far = summarise([1, 2]), summarise([2, 3]), summarise([5, 6])
    assert one.overlaps(other)
    assert other.overlaps(one)
    assert not one.overlaps(far)
    assert not far.overlaps(one)


def test_contenders_are_measured_in_turn():
    calls, turns = [], []
    contenders = {name: lambda name=name: calls.append(name) or float(len(calls)) for name in "abc"}
    values = in_turns(contenders, 30, on_turn=turns.append)
    of_turns = [calls[at : at + 3] for at in range(0, 90, 3)]
    assert all(sorted(of_turn) == ["a", "b", "c"] for of_turn in of_turns)
    assert values == {name: [at + 1.0 for at, called in enumerate(calls) if called == name] for name in "abc"}
    assert {of_turn[0] for of_turn in of_turns} == {"a", "b", "c"}, "none is always the first"
    assert turns == list(range(1, 31))


def test_turns_end_in_time_but_not_before_the_least():
    values = in_turns({"a": lambda: 1.0}, 100, until=time.perf_counter() - 1, least=4)
    assert len(values["a"]) == 4


def test_ratios_are_taken_turn_by_turn():
    assert ratios([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]).median == 3.0
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])


def test_a_row_says_what_it_is():
    found = row("loader", "x", [1.0, 3.0], "images/s", {"date": "2026"}, {"batch_size": 2}, kind="ours")
    assert found["median"] == 2.0
    assert found["values"] == [1.0, 3.0]
    assert (found["group"], found["name"], found["unit"], found["kind"]) == ("loader", "x", "images/s", "ours")
    assert found["settings"] == {"batch_size": 2}
    assert found["date"] == "2026"


def test_hardware_in_one_line():
    assert describe_hardware({"processor": "P", "cores": 1}) == "P, 1 core"
    assert describe_hardware({"processor": "P", "cores": 2, "gpu": "T4"}) == "P, 2 cores, T4"


def test_the_commit_is_that_of_a_checkout_or_unknown():
    found = commit()
    assert found is None or 12 <= len(found) <= 41


@given(st.lists(st.floats(1e-6, 4000), min_size=1, max_size=60), st.floats(0.01, 1), st.integers(1, 5))
def test_a_histograms_quantiles_are_numpys_within_its_buckets(values, share, count):
    found = LogHistogram()
    found.add(np.array(values[:1]), count)
    found.add(np.array(values[1:]), count)
    exact = np.quantile(np.repeat(values, count), share, method="inverted_cdf")
    assert found.quantiles(share) == [pytest.approx(exact, rel=0.012)]


def test_a_histogram_of_nothing_and_of_zeros():
    found = LogHistogram()
    assert found.quantiles(0.5, 0.9) == [0.0, 0.0]
    found.add(np.array([0.0, 1e9]))
    low, high = found.quantiles(0.5, 1)
    assert low < 1e-6
    assert high > 4000
