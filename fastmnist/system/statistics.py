"""Statistics of measurements: contenders in turn, medians with confidence intervals, rows of a result."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from scipy.stats import quantile_test

Name = TypeVar("Name", bound=Hashable)

CONFIDENCE = 0.95
LEAST_FOR_INTERVAL = 6  # the range of n values holds their median with confidence 1 - 2 ** (1 - n): 0.9375 for 5


@dataclass(frozen=True)
class Summary:
    """n values of one quantity.

    low to high is the 95 % confidence interval of the median, whatever the distribution. Below n = 6 it is the range,
    whose confidence is 1 - 2 ** (1 - n).
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
    """Median, its 95 % confidence interval, and range, of at least one value.

    The interval's ends are order statistics (W. J. Conover, "Practical Nonparametric Statistics", 3rd edition, 3.2).

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("there is no value to summarise")
    array = np.asarray(values, np.float64)
    low, high = array.min(), array.max()
    if len(array) >= LEAST_FOR_INTERVAL:
        low, high = quantile_test(array, p=0.5).confidence_interval(CONFIDENCE)
    return Summary(len(array), *map(float, (np.median(array), low, high, array.min(), array.max())))


class LogHistogram:
    """Quantiles of any number of seconds in constant memory, within 1.1 % from 1 µs to an hour.

    A DDSketch with fixed buckets, 32 to an octave (C. Masson et al.: "DDSketch", VLDB 2019).
    """

    PER_OCTAVE, LOWEST, OCTAVES = 32, -20, 32

    def __init__(self) -> None:
        self.counts = np.zeros(self.PER_OCTAVE * self.OCTAVES, np.int64)

    def add(self, values: np.ndarray, count: int = 1) -> None:
        """Counts each of `values` so many times."""
        octaves = np.log2(np.maximum(values, 2.0**self.LOWEST)) - self.LOWEST
        places = np.minimum((octaves * self.PER_OCTAVE).astype(np.int64), len(self.counts) - 1)
        self.counts += count * np.bincount(places, minlength=len(self.counts))

    def quantiles(self, *shares: float) -> list[float]:
        """The values below which these shares lie, each in the middle of its bucket; 0.0 of no values."""
        sums = np.cumsum(self.counts)
        if not sums[-1]:
            return [0.0] * len(shares)
        places = np.searchsorted(sums, np.asarray(shares) * sums[-1])
        return [float(2 ** ((place + 0.5) / self.PER_OCTAVE + self.LOWEST)) for place in places]


def in_turns(
    contenders: Mapping[Name, Callable[[], float]],
    turns: int,
    *,
    until: float = float("inf"),
    least: int = 1,
    on_turn: Callable[[int], object] = lambda turn: None,
) -> dict[Name, list[float]]:
    """The values of all contenders, measured in turn, so that whatever changes on the machine meets them all.

    Each turn shuffles their order (the same way in each call): what a contender leaves behind (memory to free, a cold
    cache) does not always meet the same next one.

    Args:
        contenders: a function that measures one value of each.
        turns: values of each.
        until: time.perf_counter() after which no turn begins, once there have been `least`.
        on_turn: called with 1, 2, ... after each turn; True makes it the last.
    """
    values: dict[Name, list[float]] = {name: [] for name in contenders}
    for turn in range(turns):
        if turn >= least and time.perf_counter() > until:
            break
        for name in random.Random(turn).sample(list(contenders), len(contenders)):
            values[name].append(contenders[name]())
        if on_turn(turn + 1) is True:
            break
    return values


def ratios(values: Sequence[float], to: Sequence[float]) -> Summary:
    """The ratios of `values` to those of `to`, turn by turn."""
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
    """One row of a result: the values of one contender, with their summary and origin.

    Args:
        group: the comparison that it belongs to.
        name: the contender.
        values: one per turn.
        unit: "images/s" or another rate, of which more is better; "seconds" or "bytes", of which less is.
        origin: `environment.origin`.
        settings: of the contender.
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
