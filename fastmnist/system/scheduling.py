"""Scheduling: cores wanted and got by this process and its workers, and how often a CPU limit throttled it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from joblib import cpu_count

from fastmnist.system.machine import physical_cores
from fastmnist.system.statistics import Summary

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]  # a module elsewhere

PROCESSES = Path("/proc")
NANOSECONDS = 1e-9
ThreadTimes = dict[tuple[int, int], tuple[int, int]]

# Two threads on two cores waited for a core in 0.002 to 0.007 of their steps (medians of runs) when alone, in up to
# 0.15 beside half a busy core, in 0.28 to 0.55 beside a whole one.
LOST_LEAST = 0.2
STOPPED_LEAST = 0.25  # of the periods of a CPU limit; chosen, not measured
# Loops that compute without a pause got 0.9 to 1.0 of their cores when alone, 0.5 beside two busy processes.
ALL_CORES = 0.85  # of the cores: other processes take little of them
BUSY_LEAST = 0.7  # cores per thread: they compute nearly all the time


@dataclass(frozen=True)
class CoreUse:
    """CPU time and run-queue wait of threads over `seconds` of wall-clock time; all in seconds.

    ran, waited: of this process's threads: on a core, and ready to run without one.
    workers: number of descendant processes that wanted a core at all. workers_ran, workers_waited: of their threads.
    """

    seconds: float
    ran: float
    waited: float
    workers: int = 0
    workers_ran: float = 0.0
    workers_waited: float = 0.0

    def __add__(self, other: CoreUse) -> CoreUse:
        return CoreUse(
            self.seconds + other.seconds,
            self.ran + other.ran,
            self.waited + other.waited,
            max(self.workers, other.workers),
            self.workers_ran + other.workers_ran,
            self.workers_waited + other.workers_waited,
        )

    @property
    def cores_got(self) -> float:
        return (self.ran + self.workers_ran) / self.seconds

    @property
    def cores_wanted(self) -> float:
        return self.cores_got + (self.waited + self.workers_waited) / self.seconds

    @property
    def unmet(self) -> float:
        """The share of the wanted core time that was not got: waited / (ran + waited), 0 to 1."""
        return 1 - self.cores_got / self.cores_wanted if self.cores_wanted else 0.0

    def lost(self, waiting: float) -> float:
        """An estimate of the wall-clock share lost to threads waiting for a core, 0 to 1.

        A single thread loses its own wait. Parallel threads wait in parallel: their wait is divided by the number of
        threads that want a core on average. Workers cost at most the time spent waiting for their batches.

        Args:
            waiting: the share of wall-clock time spent waiting for batches.
        """
        own = self.waited / max(self.seconds, self.ran + self.waited)
        workers = self.workers_waited / max(self.seconds, self.workers_ran + self.workers_waited)
        return max(own, min(workers, waiting))


@dataclass(frozen=True)
class Host:
    """Cores of this machine, and their use by a training loop.

    Attributes:
        lost: `CoreUse.lost` over the turns. use: of all real steps together. Both None where the system does not count.
        stopped: the share of periods in which a control group's CPU limit throttled this process; None without a limit.
        threads: of torch.
        cores: available to this process. physical_cores: the same, hyperthreads counted once. machine_cores: in all.
    """

    lost: Summary | None
    use: CoreUse | None
    stopped: float | None
    threads: int
    cores: int
    physical_cores: int
    machine_cores: int

    @classmethod
    def now(cls, lost: Summary | None, use: CoreUse | None, stopped: float | None) -> Host:
        cores = int(cpu_count())
        return cls(lost, use, stopped, torch.get_num_threads(), cores, physical_cores(), os.cpu_count() or cores)

    @property
    def too_few_cores(self) -> float:
        """The share of a step, or of a CPU limit's periods, lost to too few cores; 0 within the noise."""
        lost, stopped = self.lost.median if self.lost else 0.0, self.stopped or 0.0
        return max(lost if lost >= LOST_LEAST else 0.0, stopped if stopped >= STOPPED_LEAST else 0.0)

    @property
    def idle_cores(self) -> bool:
        """Whether torch's threads are busy and fewer than the cores, while other cores are idle."""
        if self.use is None or self.threads >= self.physical_cores:
            return False
        busy = self.use.ran / self.use.seconds >= BUSY_LEAST * self.threads
        return busy and self.use.cores_wanted < ALL_CORES * self.physical_cores

    @property
    def partial(self) -> bool:
        """Whether the machine has more cores than this process may use."""
        return self.cores < self.machine_cores

    def line(self) -> str:
        """Cores available, wanted and got, as a sentence."""
        of_machine = f" of the machine's {self.machine_cores}" if self.partial else ""
        there = f"{self.cores}{of_machine} cores may be used, torch has {self.threads} threads"
        if self.use is None:
            return f"{there}; only Linux counts how long threads wait for a core."
        stopped = (
            "" if self.stopped is None else f"; a CPU limit stopped it in {100 * self.stopped:.0f} % of its periods"
        )
        return (
            f"{there}; {self.use.cores_wanted:.1f} cores were wanted and {self.use.cores_got:.1f} got"
            f"{f', with {self.use.workers} worker processes' if self.use.workers else ''}{stopped}."
        )

    def sentence(self) -> str:
        """The problem and its remedy if there are `too_few_cores`, without a full stop."""
        of_cores = "1 core" if self.cores == 1 else f"{self.cores} cores"
        if self.stopped and self.stopped >= STOPPED_LEAST:
            return (
                f"A CPU limit stopped this process in {100 * self.stopped:.0f} % of its periods: raise the limit of "
                f"its control group, or use fewer threads and workers, for {of_cores}"
            )
        assert self.use is not None
        assert self.lost is not None
        remedies = []
        if self.threads > self.cores:
            remedies.append(f"say torch.set_num_threads({self.cores}) instead of {self.threads}")
        if self.use.cores_got < ALL_CORES * self.cores:
            remedies.append("stop the other programs on them, or get more cores")
        elif self.use.workers:
            remedies.append(
                f"take fewer worker processes than {self.use.workers}, or a loader that computes less (fastmnist tune)"
            )
        remedy = ", and ".join(remedies) or "use fewer threads, or get more cores"
        return (
            f"Threads wait for a core in about {100 * self.lost.median:.0f} % of each step: they want "
            f"{self.use.cores_wanted:.1f} cores and get {self.use.cores_got:.1f} of {self.cores}; {remedy}"
        )


class ResourceUse(NamedTuple):
    """Resources used by all threads of a process.

    Attributes:
        ran, in_system: seconds on a core, and of these in the kernel.
        minor_faults, major_faults: pages of memory that were new to the process, and that were read from a disk.
        switches: times that a thread had to leave its core to another one.
    """

    ran: float = 0.0
    in_system: float = 0.0
    minor_faults: float = 0
    major_faults: float = 0
    switches: float = 0

    def since(self, before: ResourceUse) -> list[float]:
        return [now - then for now, then in zip(self, before, strict=True)]


def resources() -> ResourceUse:
    """Resources used by this process so far; zeros on Windows, which has no such counters."""
    if resource is None:
        return ResourceUse()
    used = resource.getrusage(resource.RUSAGE_SELF)
    return ResourceUse(used.ru_utime + used.ru_stime, used.ru_stime, used.ru_minflt, used.ru_majflt, used.ru_nivcsw)


def thread_times() -> ThreadTimes | None:
    """(process, thread) to (ran, waited for a core), in nanoseconds, of this process and its descendants.

    Source: Linux's /proc/<process>/task/<thread>/schedstat (Documentation/scheduler/sched-stats.rst). Threads that have
    ended are missing. Time that a hypervisor takes from a virtual machine's core counts as neither.

    Returns:
        None where the system does not count it.
    """
    times: ThreadTimes = {}
    processes = [os.getpid()]
    for process in processes:  # grows by its children
        with suppress(OSError):  # it has ended
            for task in (PROCESSES / str(process) / "task").iterdir():
                with suppress(OSError, ValueError):
                    ran, waited, _ = map(int, (task / "schedstat").read_text().split())
                    times[process, int(task.name)] = ran, waited
                    processes += map(int, (task / "children").read_text().split())
    own = times.get((os.getpid(), os.getpid()), (0, 0))
    return times if own[0] else None  # a kernel that does not count says 0


def core_use(before: ThreadTimes, after: ThreadTimes, seconds: float) -> CoreUse:
    """The use of cores between two calls of `thread_times`, `seconds` apart; a new thread counts in full."""
    here, own, workers, awake = os.getpid(), [0.0, 0.0], [0.0, 0.0], set()
    for (process, thread), times in after.items():
        for kind, (now, then) in enumerate(zip(times, before.get((process, thread), (0, 0)), strict=True)):
            wanted = max(0, now - then) * NANOSECONDS
            (own if process == here else workers)[kind] += wanted
            if wanted and process != here:
                awake.add(process)
    return CoreUse(seconds, own[0], own[1], len(awake), workers[0], workers[1])


def stopped_share(before: Sequence[tuple[int, int]], after: Sequence[tuple[int, int]]) -> float | None:
    """The largest share of throttled periods of a control group between two calls of `limit_periods`.

    Returns:
        None without a limit.
    """
    shares = []
    for (stopped_before, all_before), (stopped, periods) in zip(before, after, strict=False):
        if periods > all_before:
            shares.append((stopped - stopped_before) / (periods - all_before))
    return max(shares, default=None)
