"""Straggler of a job: the process whose step takes longest, for which the others wait at each exchange of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from fastmnist.measure.diagnosis import Evidence
from fastmnist.system.numbers import milliseconds, rough_percent

LEAST = 0.1  # of a step; two equal processes on two cores of a shared machine differed by up to 0.06


@dataclass(frozen=True)
class Step:
    """Seconds of a process's step without the exchange: loading, copying, computing; low: of the whole, at least."""

    loading: float
    copying: float
    computing: float
    low: float

    @classmethod
    def of(cls, evidence: Evidence) -> Step:
        seconds = evidence.step_seconds
        return cls(**{name: share * seconds.median for name, share in evidence.shares.items()}, low=seconds.low)

    @property
    def parts(self) -> dict[str, float]:
        return {"loading": self.loading, "copying": self.copying, "computing": self.computing}

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Comparison:
    """The steps of all processes, in the order of their numbers; at least two."""

    steps: Sequence[Step]

    @property
    def slowest(self) -> int:
        """The process whose step takes longest."""
        return max(range(len(self.steps)), key=lambda number: self.steps[number].seconds)

    @property
    def _others(self) -> list[Step]:
        return [step for number, step in enumerate(self.steps) if number != self.slowest]

    @property
    def usual(self) -> float:
        """Seconds of the other processes' steps, their median."""
        return median(step.seconds for step in self._others)

    @property
    def straggler(self) -> int | None:
        """The slowest process, if the others wait for it by more than the noise."""
        return self.slowest if self.steps[self.slowest].low > self.usual * (1 + LEAST) else None

    @property
    def part(self) -> str:
        """Part of the step with the largest excess in the slowest process: "loading", "copying" or "computing"."""
        return max(self._excess, key=lambda name: self._excess[name])

    @property
    def _excess(self) -> dict[str, float]:
        own = self.steps[self.slowest].parts
        return {name: own[name] - median(step.parts[name] for step in self._others) for name in own}

    def verdict(self) -> str:
        """One sentence."""
        slowest, usual = self.steps[self.slowest], self.usual
        if self.straggler is None:
            more = max(0.0, slowest.seconds / usual - 1)
            return f"No process holds up the others: the slowest step takes {rough_percent(more)} longer than usual."
        return (
            f"Process {self.slowest} of {len(self.steps)} holds up the others: its step takes "
            f"{milliseconds(slowest.seconds)}, theirs {milliseconds(usual)}, so they wait for "
            f"{rough_percent(1 - usual / slowest.seconds)} of each step; {self.part} takes "
            f"{milliseconds(self._excess[self.part])} longer there."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "processes": [asdict(step) for step in self.steps],
            "straggler": self.straggler,
            "part": None if self.straggler is None else self.part,
            "comparison": self.verdict(),
        }
