"""The process that the others wait for: planted, and absent."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmnist.measure.straggler import LEAST, Comparison, Step

PARTS = ("loading", "copying", "computing")


def step(loading: float, copying: float, computing: float, noise: float = 0.02) -> Step:
    return Step(loading, copying, computing, low=(loading + copying + computing) * (1 - noise))


@given(
    usual=st.tuples(*(st.floats(1e-4, 0.1),) * 3),
    processes=st.integers(2, 9),
    where=st.integers(0, 8),
    part=st.sampled_from(PARTS),
    slower=st.floats(0.2, 20.0),
)
def test_a_planted_one_is_named_with_its_part(
    usual: tuple[float, float, float], processes: int, where: int, part: str, slower: float
) -> None:
    where %= processes
    late = dict(zip(PARTS, usual, strict=True))
    late[part] += slower * sum(usual)
    found = Comparison([step(**late) if number == where else step(*usual) for number in range(processes)])
    assert (found.straggler, found.part) == (where, part)
    waiting = slower / (1 + slower)
    assert found.usual == pytest.approx(sum(usual))
    assert 1 - found.usual / found.steps[where].seconds == pytest.approx(waiting)
    assert f"Process {where} of {processes}" in found.verdict()
    assert part in found.verdict()
    assert found.to_dict()["straggler"] == where


@given(seed=st.integers(0, 99), processes=st.integers(2, 9))
def test_noise_names_none(seed: int, processes: int) -> None:
    factors = 1 + np.random.default_rng(seed).uniform(0, LEAST, processes)
    found = Comparison([step(0.001 * f, 0.0, 0.01 * f) for f in factors.tolist()])
    assert found.straggler is None
    assert found.to_dict()["part"] is None
    assert "No process" in found.verdict()
