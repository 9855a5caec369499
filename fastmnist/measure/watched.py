"""Report of a watched training run: its figures, its stalled steps, and one verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from scipy.stats import theilslopes

from fastmnist.system.numbers import duration, mebibytes, milliseconds, rough_percent
from fastmnist.system.scheduling import CoreUse, Host, ResourceUse
from fastmnist.system.statistics import Summary

Kind = Literal["memory", "stalls", "host", "loader", "model"]

# Chosen without a measurement:
WAITING_LEAST = 0.05  # of the steps' time, as the doctor's
STALLED_LEAST, LEAST_STALLS = 0.05, 3  # of the steps' time
MOST_OF_IT = 0.5  # a cause explains a stall if it took half of what the step took too long
SWITCH_SECONDS = 0.01  # a process that must share its cores is switched at least every so often
GROWTH_LEAST = 0.02  # of the memory, after the first quarter of the run
GROWTH_LEAST_BYTES = 16 << 20
LEAST_BINS = 8  # for a trend


@dataclass
class Bin:
    """Consecutive steps of the timeline.

    memory: bytes at its end, of this process and its children, without what they share with others or a file holds.
    stopped: the share of periods in which a CPU limit throttled it.
    """

    seconds: float = 0.0
    steps: int = 0
    waiting: float = 0.0
    computing: float = 0.0
    memory: int = 0
    use: CoreUse | None = None
    stopped: float | None = None

    def __add__(self, other: Bin) -> Bin:
        stopped = [share for share in (self.stopped, other.stopped) if share is not None]
        return Bin(
            self.seconds + other.seconds,
            self.steps + other.steps,
            self.waiting + other.waiting,
            self.computing + other.computing,
            other.memory,
            self.use + other.use if self.use and other.use else self.use or other.use,
            sum(stopped) / len(stopped) if stopped else None,
        )

    @property
    def waiting_share(self) -> float:
        return self.waiting / max(self.waiting + self.computing, 1e-9)

    @property
    def step_seconds(self) -> float:
        return (self.waiting + self.computing) / self.steps

    @property
    def lost(self) -> float | None:
        """`CoreUse.lost` of its steps."""
        return self.use.lost(self.waiting_share) if self.use else None


@dataclass(frozen=True)
class Stall:
    """One step that took far longer than most, by `excess` seconds, and what the system counted meanwhile.

    Attributes:
        in_loader: the excess was spent waiting for the batch.
        first_of_epoch: it was an epoch's first step.
        marks: what the loop said of it.
        collecting: seconds of Python's garbage collection.
        stopped: a CPU limit stopped the process.
        used: by all of the process's threads; an estimate, for it is read at some steps only.
    """

    step: int
    epoch: int
    seconds: float
    waiting: float
    excess: float
    in_loader: bool
    first_of_epoch: bool
    marks: tuple[str, ...]
    collecting: float
    stopped: bool
    used: ResourceUse

    @property
    def cause(self) -> str:
        """The likeliest cause: a mark, what the system counted, else the part of the step."""
        used, most = self.used, MOST_OF_IT * self.excess
        idle = used.ran < most
        if self.marks and not self.in_loader:
            return self.marks[0]
        if self.first_of_epoch and self.in_loader:
            return "start of an epoch"
        if self.stopped:
            return "CPU limit"
        if self.collecting >= most:
            return "garbage collection"
        if idle and used.major_faults >= 1:
            return "pages read from disk"
        if used.in_system >= most and used.minor_faults >= 1:
            return "new memory"
        if idle and used.switches > 1 and used.switches * SWITCH_SECONDS >= most:
            return "other processes"
        return "loader" if self.in_loader else "step"


@dataclass(frozen=True)
class Trend:
    """Memory over the run, without its first quarter.

    per_second: bytes, the Theil-Sen slope with its 95 % interval (low, high).
    full_in: seconds until the machine's memory or the control group's is full; None if it does not creep.
    """

    first: int
    last: int
    per_second: float
    low: float
    high: float
    full_in: float | None

    @classmethod
    def of(cls, timeline: Sequence[Bin], available: int) -> Trend | None:
        """None where the timeline is too short. H. Theil 1950, P. K. Sen 1968; scipy.stats.theilslopes."""
        times, now = [], 0.0
        for found in timeline:
            now += found.seconds
            times.append(now)
        begin = len(timeline) // 4
        memory = [found.memory for found in timeline[begin:]]
        if len(timeline) < LEAST_BINS:
            return None
        slope, _, low, high = map(float, theilslopes(memory, times[begin:]))
        growth, middle = memory[-1] - memory[0], memory[len(memory) // 2]
        # It grows in both halves: what is allocated once does not.
        steady = min(middle - memory[0], memory[-1] - middle) >= growth / 4
        creeps = low > 0 and steady and growth >= max(GROWTH_LEAST_BYTES, GROWTH_LEAST * memory[0])
        return cls(memory[0], memory[-1], slope, low, high, available / slope if creeps else None)


@dataclass(frozen=True)
class Stalls:
    """All stalled steps.

    Attributes:
        seconds: beyond what most steps take, in all. in_loader: of these, waiting for batches.
        causes: cause to (number, seconds). worst: the longest ones, the longest first.
        every: steps from one to the next, if most are as far apart.
    """

    count: int
    seconds: float
    in_loader: float
    causes: dict[str, tuple[int, float]]
    worst: tuple[Stall, ...]
    every: int | None


@dataclass(frozen=True)
class Report:
    """A watched run. The first step, which compiles and starts workers, is in no other figure.

    Summaries are over the bins of the timeline: each value is a mean over consecutive steps.

    Attributes:
        seconds: from the end of the first step on. between: of these, outside the steps: validation, for example.
        first_batch_seconds, first_step_seconds: of the first step.
        step_seconds, waiting: of a step; the share of it spent waiting for its batch.
        quantiles: "p50", "p90" and "p99" of a step's seconds.
        device_waiting: on a GPU, the share of a step in which its queue waits for batches and their copies, from some
            steps; waiting that the queue hides is not in it. None on a CPU.
        memory: None for a run that is too short.
        watching: the share of the time that watching took.
    """

    steps: int
    epochs: int
    seconds: float
    between: float
    first_batch_seconds: float
    first_step_seconds: float
    step_seconds: Summary
    waiting: Summary
    quantiles: dict[str, float]
    device_waiting: float | None
    stalls: Stalls
    memory: Trend | None
    host: Host
    watching: float
    timeline: tuple[Bin, ...]

    @property
    def computing_and_waiting(self) -> float:
        """Seconds of all steps."""
        return sum(found.waiting + found.computing for found in self.timeline)

    @property
    def waiting_share(self) -> float:
        """The share of all steps' time spent waiting for batches: the GPU's, where there is one."""
        if self.device_waiting is not None:
            return self.device_waiting
        return sum(found.waiting for found in self.timeline) / max(self.computing_and_waiting, 1e-9)

    @property
    def jitter(self) -> float:
        """p90 over p50 of a step's seconds; 1 if all steps are alike."""
        return self.quantiles["p90"] / self.quantiles["p50"] if self.quantiles["p50"] else 1.0

    @property
    def judged(self) -> tuple[Kind, str]:
        """(kind, verdict): memory that will be full first, then what takes the largest share of the steps' time."""
        stalls, whole, memory = self.stalls, max(self.computing_and_waiting, 1e-9), self.memory
        if memory is not None and memory.full_in is not None:
            return "memory", (
                f"Memory grows by {mebibytes(60 * memory.per_second)} a minute, from {mebibytes(memory.first)} to "
                f"{mebibytes(memory.last)}: it is full in about {duration(memory.full_in)}; look for tensors and "
                "lists that are kept from step to step, such as losses without .item()."
            )
        enough = stalls.count >= LEAST_STALLS and stalls.seconds >= STALLED_LEAST * whole
        waiting = max(0.0, self.waiting_share - (stalls.in_loader / whole if self.device_waiting is None else 0.0))
        shares: dict[Kind, float] = {
            "stalls": stalls.seconds / whole if enough else 0.0,
            "host": self.host.too_few_cores * (1 - waiting),
            "loader": waiting if waiting >= WAITING_LEAST else 0.0,
            "model": 1e-9,
        }
        kind = max(shares, key=lambda name: shares[name])
        if kind == "stalls":
            cause = max(stalls.causes, key=lambda name: stalls.causes[name][1])
            every = f", one every {stalls.every:,} steps" if stalls.every else ""
            return kind, (
                f"Stalls take {rough_percent(shares[kind])} of the steps' time: {stalls.count:,} of {self.steps:,} "
                f"steps{every}, up to {milliseconds(stalls.worst[0].seconds)} where half take at most "
                f"{milliseconds(self.quantiles['p50'])}; chief cause: {cause}."
            )
        if kind == "host":
            return kind, f"{self.host.sentence()}."
        share = rough_percent(self.waiting_share)
        if kind == "loader":
            return kind, (
                f"The loop waits for data in {share} of its steps' time; fastmnist.doctor measures what a faster "
                "loader would gain."
            )
        return kind, f"The step is the limit: the loop waits for data in {share} of its steps' time."

    @property
    def kind(self) -> Kind:
        return self.judged[0]

    @property
    def verdict(self) -> str:
        return self.judged[1]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and `report.watch_chart`."""
        kind, verdict = self.judged
        found = asdict(replace(self, timeline=()))
        causes = {name: {"count": n, "seconds": s} for name, (n, s) in self.stalls.causes.items()}
        worst = [asdict(stall) | {"used": stall.used._asdict(), "cause": stall.cause} for stall in self.stalls.worst]
        timeline = [
            {name: getattr(one, name) for name in ("seconds", "steps", "waiting", "computing", "memory", "lost")}
            for one in self.timeline
        ]
        return {
            "kind": kind,
            "verdict": verdict,
            **found,
            "jitter": self.jitter,
            "waiting_share": self.waiting_share,
            "stalls": found["stalls"] | {"causes": causes, "worst": worst},
            "timeline": timeline,
        }

    def lines(self) -> list[str]:
        """The figures as sentences."""
        step, stalls, p = self.step_seconds, self.stalls, self.quantiles
        lines = [
            f"{self.steps:,} steps in {self.epochs:,} epochs and {duration(self.seconds)}; the first batch took "
            f"{self.first_batch_seconds:.2g} s, the first step {self.first_step_seconds:.2g} s.",
            f"A step takes {milliseconds(step.median)} ({milliseconds(step.low)} to {milliseconds(step.high)}), of "
            f"which the loop waits {rough_percent(self.waiting.median)}; half take at most {milliseconds(p['p50'])}, "
            f"90 % {milliseconds(p['p90'])} ({self.jitter:.2f} times that), 99 % {milliseconds(p['p99'])}.",
        ]
        if self.device_waiting is not None:
            lines.append(f"The GPU waits for batches and copies in {rough_percent(self.device_waiting)} of a step.")
        if stalls.count:
            causes = sorted(stalls.causes.items(), key=lambda item: -item[1][1])
            told = ", ".join(f"{name} {count:,} ({duration(seconds)})" for name, (count, seconds) in causes)
            lines.append(f"{stalls.count:,} steps stalled, for {duration(stalls.seconds)} in all: {told}.")
        else:
            lines.append("No step stalled.")
        if self.memory:
            lines.append(f"Memory: {mebibytes(self.memory.first)} to {mebibytes(self.memory.last)}.")
        return [*lines, self.host.line(), f"Watching took {rough_percent(self.watching)} of the time."]
