"""How a figure is made: sides measured in turn, and a median with its interval."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from scipy.stats import binom

Name = TypeVar("Name", bound=Hashable)

CONFIDENCE = 0.95
LEAST_FOR_INTERVAL = 6  # fewer values cannot bound their median with that confidence: 1 - 2 ** (1 - 5) is 0.9375


@dataclass(frozen=True)
class Summary:
    """n values of one quantity.

    low to high holds the median with a confidence of at least 95 %, whatever the distribution, as long as n is at
    least 6; below, it is the whole range, which holds it with a confidence of 1 - 2 ** (1 - n).
    """

    n: int
    median: float
    low: float
    high: float
    min: float
    max: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def overlaps(self, other: Summary) -> bool:
        """Whether the two intervals have a value in common."""
        return self.low <= other.high and other.low <= self.high


def summarise(values: Sequence[float]) -> Summary:
    """Median, interval and range of at least one value.

    The interval's ends are order statistics: k of n independent values fall below their median as often as a coin
    shows heads (W. J. Conover, "Practical Nonparametric Statistics", 3rd edition, 3.2).

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("there is no value to summarise")
    ordered = np.sort(np.asarray(values, np.float64))
    n = len(ordered)
    left_out = 0  # on each side
    while n >= LEAST_FOR_INTERVAL and binom.cdf(left_out + 1, n, 0.5) <= (1 - CONFIDENCE) / 2:
        left_out += 1
    low, high = float(ordered[left_out]), float(ordered[n - 1 - left_out])
    return Summary(n, float(np.median(ordered)), low, high, float(ordered[0]), float(ordered[-1]))


def in_turns(
    sides: Mapping[Name, Callable[[], float]],
    turns: int,
    *,
    until: float = float("inf"),
    least: int = 1,
    on_turn: Callable[[int], None] = lambda turn: None,
) -> dict[Name, list[float]]:
    """The values of every side, one after the other, turn by turn: what changes on the machine meets them all.

    Each turn has an order of its own (the same ones each time), or what a side leaves behind (memory to be freed, a
    warm or a cold cache) would always meet the same next one.

    Args:
        sides: by name, what measures one value.
        turns: how many values of each.
        until: time.perf_counter() after which no turn is begun, once there have been `least`.
        on_turn: called with 1, 2, ... after each turn.
    """
    values: dict[Name, list[float]] = {name: [] for name in sides}
    for turn in range(turns):
        if turn >= least and time.perf_counter() > until:
            break
        for name in random.Random(turn).sample(list(sides), len(sides)):
            values[name].append(sides[name]())
        on_turn(turn + 1)
    return values


def ratios(values: Sequence[float], to: Sequence[float]) -> Summary:
    """What `values` are of `to`, turn by turn."""
    return summarise([a / b for a, b in zip(values, to, strict=True)])


def row(
    group: str,
    name: str,
    values: Sequence[float],
    unit: str,
    origin: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One line of a result: what was measured, how often, with which outcome, on what.

    Args:
        group, name: what belongs together, and which of it this is.
        values: one per turn. unit: of them, e.g. "images/s"; "seconds" are better when they are fewer.
        origin: `environment.origin`.
        settings: that it ran with.
    """
    return {
        "group": group,
        "name": name,
        "unit": unit,
        **summarise(values).to_dict(),
        "values": [float(value) for value in values],
        "settings": dict(settings or {}),
        **more,
        **origin,
    }
