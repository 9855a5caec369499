"""Watch over a whole training run, in any loop: waiting, computing, memory, and the steps that stalled."""

from __future__ import annotations

import gc
import heapq
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sized
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import torch

from fastmnist.errors import ConfigError
from fastmnist.files import write_json
from fastmnist.measure.watched import Bin, Report, Stall, Stalls, Trend
from fastmnist.report.watch_chart import plot_watch
from fastmnist.system.environment import origin
from fastmnist.system.machine import available_memory, limit_periods
from fastmnist.system.scheduling import Host, ResourceUse, ThreadTimes, core_use, resources, stopped_share, thread_times
from fastmnist.system.statistics import LogHistogram, summarise

# A look at the system (memory, threads, control groups) takes 0.2 to 1 ms, more with worker processes. The next one
# comes after so many times its cost.
COST_FACTOR = 1000
FIRST_PERIOD = 0.1  # seconds of a bin of the timeline
MOST_BINS = 256  # then neighbours are merged, and the period doubles
LEAST_STEPS = 16  # before any step can have stalled
MOST_WORST, MOST_CAUSES, MOST_GAPS = 20, 32, 64  # stalled steps, causes and distances that are kept


class Watch:
    """Measures each step of a training loop over any loader, for a whole run, in constant memory.

    Iterate over it instead of the loader: each `for` loop is an epoch. A step is the time to get a batch (waiting) and
    until the next one is asked for (computing). `with` prints the verdict and its figures at the end.

    >>> watched = Watch([1, 2, 3])
    >>> for batch in watched:
    ...     pass  # a training step
    >>> watched.report().steps
    3

    Nothing waits for a GPU: there, computing is the time until the step has been handed over. How long the GPU itself
    waits for batches and their copies is measured by events, at some steps.

    Attributes:
        loader: the one watched.
        epochs: begun so far. steps: made, as of the last look at the system.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.steps = self.epochs = 0
        self._totals, self._waits = LogHistogram(), LogHistogram()
        self._first = (0.0, 0.0)  # seconds of the first batch and step
        # (waiting, waiting and computing) of each batch since the last look, and the steps made with each.
        self._recent: list[tuple[float, float]] = []
        self._each = 1
        self._bins: list[Bin] = []
        self._period, self._cost, self._watching = FIRST_PERIOD, 0.0, 0.0
        self._bound, self._median, self._median_wait = -math.inf, 0.0, 0.0
        self._stalled = self._stalled_in_loader = 0.0
        self._causes: dict[str, tuple[int, float]] = {}
        self._worst: list[tuple[float, int, Stall]] = []
        self._gaps: Counter[int] = Counter()
        self._last_stall = 0
        self._marks: tuple[int, list[str]] = (0, [])  # of that number of recent batches
        self._collected: tuple[int, float] = (0, 0.0)  # likewise, seconds
        self._queue = _DeviceQueue()
        self._looked = self._next_look = self._collection_begun = 0.0
        self._threads: ThreadTimes | None = None
        self._periods: list[tuple[int, int]] = []
        self._limited = True  # until the first look finds no CPU limit: reading the control groups takes half of a look
        self._used, self._used_at, self._rate = resources(), 0.0, [0.0] * len(ResourceUse._fields)

    def __len__(self) -> int:
        return len(cast(Sized, self.loader))

    def __iter__(self) -> Iterator[Any]:
        return self.over(self.loader)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        if self.counted:
            found = self.report()
            print("\n".join([found.verdict, *found.lines()]))

    @property
    def counted(self) -> bool:
        """Whether there is something to report: the first step does not count."""
        return bool(self._bins or self._recent)

    def mark(self, what: str) -> None:
        """Names what the current step does besides training, such as "checkpoint": the cause, should it stall."""
        at, names = self._marks
        self._marks = len(self._recent), [*(names if at == len(self._recent) else ()), what]

    def over(self, batches: Iterable[Any], steps: int = 1) -> Iterator[Any]:
        """Watches an epoch of these batches; `steps` is the number of steps that the loop makes with one."""
        clock, end, recent = time.perf_counter, object(), self._recent
        queue = self._queue if torch.cuda.is_initialized() else None
        if steps != self._each:
            self._keep_recent()
            self._each = steps
        self.epochs += 1
        first_of_epoch = True
        gc.callbacks.append(self._on_collection)
        try:
            asked = clock()
            iterator = iter(batches)
            while True:
                if queue is not None:
                    queue.begin()
                batch = next(iterator, end)
                if batch is end:
                    break
                if queue is not None:
                    queue.end()
                got = clock()
                try:
                    yield batch
                finally:  # also where the loop is left in the middle of an epoch
                    done = clock()
                    # Most steps do little here: after a real step, nothing of this is in the processor's caches.
                    if done - asked > self._bound or done > self._next_look:
                        self._examine(got - asked, done - asked, first_of_epoch, done)
                    else:
                        recent.append((got - asked, done - asked))
                first_of_epoch = False
                asked = clock()
                self._watching += asked - done
            if recent and asked > self._looked + COST_FACTOR * self._cost:
                self._look(clock())  # so that this bin has nothing of what comes between two epochs
        finally:
            gc.callbacks.remove(self._on_collection)

    def _on_collection(self, phase: str, info: dict[str, int]) -> None:
        if info["generation"] < 2:  # these are short
            return
        if phase == "start":
            self._collection_begun = time.perf_counter()
        else:
            at, seconds = self._collected
            seconds = seconds if at == len(self._recent) else 0.0
            self._collected = len(self._recent), seconds + time.perf_counter() - self._collection_begun

    def _examine(self, waiting: float, total: float, first_of_epoch: bool, now: float) -> None:
        """A step that stalled, or after which it is time to look at the system, or the very first."""
        if self._bound < 0:  # it compiles, allocates and starts workers
            self._first, self._bound = (waiting, total - waiting), math.inf
            self.steps = self._each
            self._look(now)
            self._limited = any(periods for _, periods in self._periods)
            return
        if total > self._bound:
            at = len(self._recent)
            excess, waited = total - self._median, max(0.0, waiting - self._median_wait)
            stopped = False
            if self._limited and excess > COST_FACTOR * self._cost:
                periods = limit_periods()
                stopped, self._periods = bool(stopped_share(self._periods, periods)), periods
            # What the steps since the last reading used, at the usual rate, was not used by this one.
            used, before = resources(), max(0.0, now - total - self._used_at)
            spent = [value - before * rate for value, rate in zip(used.since(self._used), self._rate, strict=True)]
            self._used, self._used_at = used, now
            stall = Stall(
                step=self.steps + (at + 1) * self._each,
                epoch=self.epochs,
                seconds=total,
                waiting=waiting,
                excess=excess,
                in_loader=waited > excess / 2,
                first_of_epoch=first_of_epoch,
                marks=tuple(self._marks[1]) if self._marks[0] == at else (),
                collecting=self._collected[1] if self._collected[0] == at else 0.0,
                stopped=stopped,
                used=ResourceUse(*(max(0.0, value) for value in spent)),
            )
            self._stall(stall, min(waited, excess))
        self._recent.append((waiting, total))
        if now > self._next_look:
            self._look(now)

    def _stall(self, stall: Stall, in_loader: float) -> None:
        self._stalled += stall.excess
        self._stalled_in_loader += in_loader
        cause = stall.cause
        if cause not in self._causes and len(self._causes) >= MOST_CAUSES:
            cause = "others"
        count, seconds = self._causes.get(cause, (0, 0.0))
        self._causes[cause] = count + 1, seconds + stall.excess
        keep = heapq.heappush if len(self._worst) < MOST_WORST else heapq.heappushpop
        keep(self._worst, (stall.excess, stall.step, stall))
        gap, self._last_stall = stall.step - self._last_stall, stall.step
        if gap in self._gaps or len(self._gaps) < MOST_GAPS:
            self._gaps[gap] += 1

    def _keep_recent(self) -> Bin:
        """Counts the recent steps, and forgets each one; returns the open bin of the timeline with them in it."""
        each, found = self._each, Bin()
        if self._recent:
            waits, totals = np.array(self._recent).T
            self._totals.add(totals / each, each)
            self._waits.add(waits / each, each)
            self.steps += each * len(waits)
            found = Bin(steps=each * len(waits), waiting=float(waits.sum()), computing=float((totals - waits).sum()))
            self._recent.clear()
            self._marks, self._collected = (0, []), (0, 0.0)
        return found

    def _look(self, now: float) -> None:
        """Ends a bin of the timeline with what the system counts, and finds from when on a step has stalled."""
        begun = time.thread_time()
        threads, used, found = thread_times(), resources(), self._keep_recent()
        periods = limit_periods() if self._limited else []
        if found.steps:
            found.seconds = now - self._looked
            if threads is not None and self._threads is not None:
                found.use = core_use(self._threads, threads, found.seconds)
            found.stopped = stopped_share(self._periods, periods)
            found.memory = _private_memory(threads)
            if self._bins and self._bins[-1].seconds + found.seconds / 2 < self._period:
                self._bins[-1] += found
            else:
                self._bins.append(found)
            self._rate = [value / max(now - self._used_at, 1e-9) for value in used.since(self._used)]
        self._looked, self._threads, self._periods = now, threads, periods
        self._used, self._used_at = used, now
        if len(self._bins) == MOST_BINS:
            self._bins = [one + other for one, other in zip(self._bins[::2], self._bins[1::2], strict=True)]
            self._period *= 2
        if self.steps > LEAST_STEPS * self._each:
            low, median, high = self._totals.quantiles(0.25, 0.5, 0.75)
            # Tukey's "far out", or twice the median where all steps are alike.
            self._bound = self._each * max(2 * median, high + 3 * (high - low))
            self._median, self._median_wait = self._each * median, self._each * self._waits.quantiles(0.5)[0]
        self._cost = time.thread_time() - begun  # not by the clock: an interrupted look would put off the next one
        self._next_look = now + max(FIRST_PERIOD, COST_FACTOR * self._cost)

    def report(self) -> Report:
        """The figures so far, and their verdict.

        Raises:
            ConfigError: fewer than two steps were made.
        """
        if not self.counted:
            raise ConfigError(f"steps watched: {self.steps}; a report needs two, for the first one does not count")
        if self._recent:
            self._look(time.perf_counter())
        bins = self._bins
        lost = [found.lost for found in bins if found.lost is not None]
        uses = [found.use for found in bins if found.use is not None]
        stopped = [found.stopped for found in bins if found.stopped is not None]
        host = Host.now(
            summarise(lost) if lost else None,
            sum(uses[1:], uses[0]) if uses else None,
            sum(stopped) / len(stopped) if stopped else None,
        )
        seconds = sum(found.seconds for found in bins)
        in_steps = sum(found.waiting + found.computing for found in bins)
        ((gap, most),) = self._gaps.most_common(1) or [(0, 0)]
        count = sum(number for number, _ in self._causes.values())
        shares = ("p50", "p90", "p99")
        return Report(
            steps=self.steps,
            epochs=self.epochs,
            seconds=seconds,
            between=max(0.0, seconds - in_steps - self._watching),
            first_batch_seconds=self._first[0],
            first_step_seconds=self._first[1],
            step_seconds=summarise([found.step_seconds for found in bins]),
            waiting=summarise([found.waiting_share for found in bins]),
            quantiles=dict(zip(shares, self._totals.quantiles(0.5, 0.9, 0.99), strict=True)),
            device_waiting=self._queue.share(in_steps / (self.steps or 1)),
            stalls=Stalls(
                count=count,
                seconds=self._stalled,
                in_loader=self._stalled_in_loader,
                causes=self._causes,
                worst=tuple(stall for *_, stall in sorted(self._worst, reverse=True)),
                every=gap if 2 * most > count > 2 else None,
            ),
            memory=Trend.of(bins, available_memory()),
            host=host,
            watching=self._watching / seconds if seconds else 0.0,
            timeline=tuple(bins),
        )

    @property
    def verdict(self) -> str:
        """The limit of this run, in one sentence."""
        return self.report().verdict

    def lines(self) -> list[str]:
        """The figures as sentences."""
        return self.report().lines()

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the report, with hardware, versions and date."""
        device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
        return self.report().to_dict() | origin(device)

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON, or as a picture where the path ends in .png or .svg.

        Raises:
            FastmnistError: the file cannot be written.
        """
        if Path(path).suffix in (".png", ".svg"):
            plot_watch(self.to_dict(), Path(path))
        else:
            write_json(path, self.to_dict())


watch = Watch


class _DeviceQueue:
    """How long a GPU's queue waits for a batch and its copies, at some steps, without the host waiting for it.

    Two events lie in the queue, where a batch is asked for and where it is there. The time from one to the other is
    that of copies, and of an empty queue. The next pair follows when the GPU has reached this one.
    """

    def __init__(self) -> None:
        self._pair: list[Any] = []
        self._seconds, self._count = 0.0, 0

    def begin(self) -> None:
        if not torch.cuda.is_initialized() or (self._pair and not self._pair[-1].query()):
            return
        if len(self._pair) == 2:
            self._seconds += self._pair[0].elapsed_time(self._pair[1]) / 1e3
            self._count += 1
        self._pair = [_recorded()]

    def end(self) -> None:
        if len(self._pair) == 1:
            self._pair.append(_recorded())

    def share(self, step_seconds: float) -> float | None:
        """Of a step, 0 to 1; None without a GPU."""
        return min(1.0, self._seconds / self._count / step_seconds) if self._count else None


def _recorded() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _private_memory(threads: ThreadTimes | None) -> int:
    """Bytes of this process and its workers that no file holds and no other process shares, as far as is told.

    A file that is mapped would grow with each page that an epoch reads for the first time.
    """
    this, total = psutil.Process(), 0
    for process in {this.pid, *(number for number, _ in threads or ())}:
        with suppress(psutil.Error):  # it has ended
            memory = (this if process == this.pid else psutil.Process(process)).memory_info()
            total += memory.rss - getattr(memory, "shared", 0)
    return total
