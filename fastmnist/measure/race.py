"""Finds the fastest of some settings of a loader: all against the simplest first, the best against each other in turn.

The search is a race (O. Maron, A. Moore: "Hoeffding races", NIPS 1993; M. Birattari et al.: "A racing algorithm for
configuring metaheuristics", GECCO 2002): what is clearly slower is dropped early, and what is left is measured again,
turn by turn, so that whatever else the machine does meets all alike. A library for hyper-parameters (Optuna) measures
one trial after the other: on a shared machine two measurements a few seconds apart differ by more than the settings do,
and a grid of some dozens needs no model of itself.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import psutil
import torch

from fastmnist.errors import ConfigError, FastmnistError
from fastmnist.measure.batches import length_of
from fastmnist.system.statistics import LEAST_FOR_INTERVAL, Summary, ratios, summarise

Settings = dict[str, Any]
Status = Literal["best", "tie", "slower", "dropped", "failed", "too much memory", "not measured"]
Progress = Callable[[str, float], None]

SCREENING_TURNS = 2  # of each candidate and of the simplest, in turn
SCREENING_SHARE, LATE_SHARE = 0.6, 0.9  # of the budget, at most; what is left is for the finalists, if there are some
OPENING_SHARE = 0.8  # of the budget, after which no third finalist is opened
LOST = 0.9  # of the least that the best reached in the screening: what never came near is dropped
FINALISTS = 5
MOST_ROUNDS = 15
SAME = 0.95  # of the best median: a tie is no slower than that, however wide the intervals are
NARROW = 0.05  # of the median: finalists whose intervals are narrower are known well enough
TURN_SECONDS = 0.25
WARM_UP_SECONDS = 1.0  # at most, to bring what a loader has ready ahead to its level in the loop


@dataclass
class Candidate:
    """One combination of settings.

    settings: all that were searched. place: how far each is from the simplest, the first of its values.
    number: among all, the simplest first.
    rounds: values (images/s) of the screening, then of each round. memory: bytes beyond those before it was opened.
    """

    name: str
    settings: Settings
    place: tuple[int, ...]
    number: int = 0
    rounds: list[list[float]] = field(default_factory=list)
    relative: list[float] = field(default_factory=list)
    memory: int | None = None
    status: Status = "not measured"
    reason: str = ""

    @property
    def complexity(self) -> tuple[int, int]:
        """How many settings are not the simplest, and by how much."""
        return sum(at > 0 for at in self.place), sum(self.place)

    @property
    def changes(self) -> list[tuple[int, int]]:
        """(which setting, which of its values) that are not the simplest."""
        return [(at, place) for at, place in enumerate(self.place) if place]

    @property
    def values(self) -> list[float]:
        return [value for values in self.rounds for value in values]

    @property
    def final(self) -> list[float]:
        """The values that were measured in turn with the other finalists."""
        return [value for values in self.rounds[1:] for value in values]

    def summary(self) -> Summary:
        return summarise(self.final or self.values)


@dataclass(frozen=True)
class Race:
    """candidates: from the fastest to those that were not measured. chosen: the simplest that ties with the best."""

    candidates: list[Candidate]
    chosen: Candidate
    seconds: float


def combinations(
    space: Mapping[str, Sequence[Any]],
    same_as: Callable[[Settings], Settings] = lambda settings: settings,
    name: Callable[[Settings], str] | None = None,
) -> list[Candidate]:
    """All combinations, the simplest first.

    Args:
        space: the values of each setting, the simplest first.
        same_as: the combination that does the same in a simpler way, so that it is measured once.
        name: of a combination; by default what differs from the simplest.
    """
    keys = list(space)
    simplest = {key: values[0] for key, values in space.items()}
    found: dict[str, Candidate] = {}
    for values in itertools.product(*space.values()):
        settings = same_as(dict(zip(keys, values, strict=True)))
        place = tuple(_position(space[key], settings[key]) for key in keys)
        label = name(settings) if name else describe(settings, simplest)
        found.setdefault(repr(sorted(settings.items(), key=lambda item: item[0])), Candidate(label, settings, place))
    return sorted(found.values(), key=lambda candidate: candidate.complexity)


def _position(values: Sequence[Any], value: Any) -> int:
    """Without taking False for 0."""
    return next(at for at, known in enumerate(values) if known == value and type(known) is type(value))


def describe(settings: Settings, simplest: Settings) -> str:
    """ "workers 2, os_cache off"; "defaults" when nothing differs."""
    parts = [
        f"{key} {'on' if value is True else 'off' if value is False else value}"
        for key, value in settings.items()
        if value != simplest[key]
    ]
    return ", ".join(parts) or "defaults"


class Running:
    """A loader that is open, measured in turns.

    A turn counts batches that follow each other within an epoch; what it costs to begin an epoch is measured apart and
    spread over the batches that an epoch has.
    """

    def __init__(self, loader: Iterable[Any], step: Callable[[Any], Any] | None, ahead: int) -> None:
        self.loader, self.step, self.ahead = loader, step, ahead
        self.beginnings: list[float] = []
        self.per_epoch = len(loader) if hasattr(loader, "__len__") else 0  # type: ignore[arg-type]
        self._batches: Iterator[Any] | None = None

    def _next(self) -> tuple[Any, float]:
        """A batch, and the seconds that an epoch's beginning took."""
        if self._batches is not None:
            with suppress(StopIteration):
                return next(self._batches), 0.0
        _synchronize()
        begun = time.perf_counter()
        self._batches = None  # ends the workers of the epoch before
        self._batches = iter(self.loader)
        try:
            batch = next(self._batches)
        except StopIteration:
            raise ConfigError(
                "the loader yields no batch: the dataset is smaller than one, or the loader is used up"
            ) from None
        taken = time.perf_counter() - begun
        self.beginnings.append(taken)
        return batch, taken

    def begin_again(self) -> None:
        """The first epoch also pays for what is made once: a second beginning tells what each costs."""
        self._next()
        self.beginnings.clear()
        self._batches = None
        self._next()

    def turn(self) -> float:
        """Images/s (batches/s when a batch does not tell its length)."""
        self._run(self.ahead, 0.0, WARM_UP_SECONDS)
        images, batches, taken = self._run(1, TURN_SECONDS, float("inf"))
        beginning = sorted(self.beginnings)[len(self.beginnings) // 2]
        per_batch = taken / batches + (beginning / self.per_epoch if self.per_epoch else 0.0)
        return images / batches / per_batch

    def _run(self, least: int, seconds: float, most: float) -> tuple[int, int, float]:
        """Images, batches and seconds of at least so many batches and seconds."""
        images = batches = 0
        _synchronize()
        begun = time.perf_counter()
        while True:
            taken = time.perf_counter() - begun
            if (batches >= least and taken >= seconds) or taken > most:
                break
            batch, beginning = self._next()
            begun += beginning
            if self.step is not None:
                self.step(batch)
            images += length_of(batch) or 1
            batches += 1
        _synchronize()
        return images, batches, time.perf_counter() - begun

    def close(self) -> None:
        self._batches = None
        close = getattr(self.loader, "close", None)
        if close is not None:
            close()
        del self.loader


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def memory_in_use() -> int:
    """Bytes of this process and of those that it has begun; what they share is counted once."""
    total = 0
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with suppress(psutil.Error):
            found = process.memory_full_info()
            total += getattr(found, "pss", found.rss)
    return total


class Racing:
    """One search; `race` runs it.

    Args:
        candidates: the simplest first.
        make: a loader for settings; closed by its `close`, if it has one.
        step: what is done with a batch; None measures the loader alone.
        budget: seconds in all, from `begun` on.
        max_memory: bytes that the loaders that are open together may take; None for no limit.
        ahead: batches that a loader of these settings may have ready.
    """

    def __init__(
        self,
        candidates: list[Candidate],
        make: Callable[[Settings], Iterable[Any]],
        step: Callable[[Any], Any] | None,
        budget: float,
        *,
        max_memory: int | None = None,
        ahead: Callable[[Settings], int] = lambda settings: 1,
        progress: Progress = lambda text, share: None,
        begun: float | None = None,
    ) -> None:
        self.candidates, self.make, self.step, self.budget = candidates, make, step, budget
        for number, candidate in enumerate(candidates):
            candidate.number = number
        self.max_memory, self.ahead, self.progress = max_memory, ahead, progress
        self.begun = time.perf_counter() if begun is None else begun
        self.taken: list[float] = []  # seconds that screening each took

    def elapsed(self) -> float:
        return time.perf_counter() - self.begun

    def say(self, text: str) -> None:
        self.progress(text, min(1.0, self.elapsed() / self.budget))

    def race(self) -> Race:
        """Screens, then measures the finalists in turn.

        Raises:
            FastmnistError: no settings work; the simplest one's error is the cause.
        """
        first, running = self._open_first()
        try:
            self._screen(first, running, SCREENING_SHARE)
            if len(self._near_the_best()) == 1:
                self._screen(first, running, LATE_SHARE)  # there is no final to keep time for
        finally:
            running.close()
        self._final()
        for candidate in self.candidates:
            if candidate.status == "not measured" and not candidate.values:
                candidate.reason = candidate.reason or "out of budget"
        return Race(self._ranked(), self._choose(), self.elapsed())

    def _open_first(self) -> tuple[Candidate, Running]:
        """The simplest settings that work, which the others are held against."""
        cause: Exception | None = None
        for candidate in self.candidates:
            running = self._open(candidate)
            if isinstance(running, Running):
                running.turn()  # the step's first calls are slow
                return candidate, running
            cause = cause or running
        raise FastmnistError(f"none of {len(self.candidates)} settings works: {self.candidates[0].reason}") from cause

    def _open(self, candidate: Candidate) -> Running | Exception:
        """The loader, after its first two epochs have begun; or what went wrong, which the candidate then says too."""
        self.say(candidate.name)
        before = memory_in_use()
        running: Running | None = None
        try:
            running = Running(self.make(candidate.settings), self.step, self.ahead(candidate.settings))
            running.begin_again()
        except Exception as error:
            if running is not None:
                with suppress(Exception):
                    running.close()
            candidate.status, candidate.reason = "failed", " ".join(f"{type(error).__name__}: {error}".split())
            return error
        candidate.memory = max(0, memory_in_use() - before)
        if self.max_memory is not None and candidate.memory > self.max_memory:
            running.close()
            candidate.status = "too much memory"
            candidate.reason = f"{candidate.memory >> 20:,} MiB, allowed are {self.max_memory >> 20:,}"
            return ConfigError(candidate.reason)
        return running

    def _screen(self, first: Candidate, reference: Running, share: float) -> None:
        """Each against the simplest, in turn, as far as that share of the budget goes; one of them whatever it is."""
        if not first.relative:
            first.rounds.append([reference.turn()])
            first.relative = [1.0]
        while (candidate := self._most_promising()) is not None:
            compared = any(other.relative for other in self.candidates if other is not first)
            if compared and self.elapsed() + self._usual_seconds() > share * self.budget:
                break
            if (lost := self._lost_part(candidate)) is not None:
                candidate.status, candidate.reason = "dropped", f"{lost.name} alone is slower"
                continue
            begun = time.perf_counter()
            if isinstance(running := self._open(candidate), Running):
                try:
                    pairs = [(running.turn(), reference.turn()) for _ in range(SCREENING_TURNS)]
                except Exception as error:
                    candidate.status = "failed"
                    candidate.reason = " ".join(f"{type(error).__name__}: {error}".split())
                else:
                    candidate.rounds.append([rate for rate, _ in pairs])
                    candidate.relative = [rate / other for rate, other in pairs]
                    first.rounds[0] += [other for _, other in pairs]
                finally:
                    running.close()
            self.taken.append(time.perf_counter() - begun)

    def _usual_seconds(self) -> float:
        """That screening one takes."""
        return sorted(self.taken)[len(self.taken) // 2] if self.taken else 0.0

    def _most_promising(self) -> Candidate | None:
        """The next to screen: the fastest if each change does what it did alone.

        What is not known is taken to change nothing; of equals the single changes come first, and of those the
        largest, which tell most about the rest.
        """
        known: dict[tuple[int, int], float] = {}
        for other in self.candidates:
            if other.relative and other.complexity[0] == 1:
                known[other.changes[0]] = summarise(other.relative).median

        def promise(candidate: Candidate) -> tuple[float, int, int]:
            expected = math.prod(known.get(change, 1.0) for change in candidate.changes)
            return expected, -candidate.complexity[0], candidate.complexity[1]

        left = [c for c in self.candidates if not c.relative and c.status == "not measured"]
        return max(left, key=promise, default=None)

    def _lost_part(self, candidate: Candidate) -> Candidate | None:
        """One that changes a single setting in the same way, and was clearly slower than the simplest."""
        for other in self.candidates:
            alone = other is not candidate and other.relative and len(other.changes) == 1
            if alone and other.changes[0] in candidate.changes and summarise(other.relative).high < LOST:
                return other
        return None

    def _near_the_best(self) -> list[Candidate]:
        screened = [summarise(candidate.relative) for candidate in self.candidates if candidate.relative]
        best = max(screened, key=lambda found: found.median)
        return [c for c in self.candidates if c.relative and summarise(c.relative).high >= LOST * best.low]

    def _final(self) -> None:
        """The best of the screening in turn, until the time is up or they are known well enough."""
        near = self._near_the_best()
        screened = [candidate for candidate in self.candidates if candidate.relative]
        screened.sort(key=lambda candidate: -summarise(candidate.relative).median)
        best = summarise(screened[0].relative)
        simplest = min(screened, key=lambda candidate: candidate.number)
        finalists: list[Candidate] = []
        memory = 0
        for candidate in [simplest, *(candidate for candidate in screened if candidate is not simplest)]:
            found = summarise(candidate.relative)
            memory += candidate.memory or 0
            if len(finalists) >= FINALISTS or candidate not in near:
                candidate.status = "dropped"
                candidate.reason = f"{found.median / best.median:.2f} of the best when each met the simplest"
            elif finalists and self.max_memory is not None and memory > self.max_memory:
                candidate.status, candidate.reason = "not measured", "no memory left to measure it beside the others"
            else:
                finalists.append(candidate)
        if len(finalists) == 1:
            return
        open_ones: dict[int, Running] = {}
        try:
            for candidate in finalists:
                if len(open_ones) > 1 and self.elapsed() > OPENING_SHARE * self.budget:
                    candidate.status, candidate.reason = "dropped", "no time left to measure it again"
                elif isinstance(running := self._open(candidate), Running):
                    open_ones[id(candidate)] = running
            self._rounds([candidate for candidate in finalists if id(candidate) in open_ones], open_ones)
        finally:
            for running in open_ones.values():
                running.close()

    def _rounds(self, finalists: list[Candidate], running: dict[int, Running]) -> None:
        slowest = len(finalists) * TURN_SECONDS
        for number in range(MOST_ROUNDS):
            if self.elapsed() + slowest > self.budget:
                return
            begun = time.perf_counter()
            self.say(f"round {number + 1}, {len(finalists)} left")
            for candidate in finalists:
                candidate.rounds.append([running[id(candidate)].turn()])
            slowest = max(slowest, time.perf_counter() - begun)
            if number + 1 < LEAST_FOR_INTERVAL:
                continue
            leader = max(finalists, key=lambda candidate: candidate.summary().median)
            for candidate in [c for c in finalists if c is not leader]:
                against = ratios(candidate.final, leader.final)
                if against.high < SAME:
                    finalists = [c for c in finalists if c is not candidate]
                    candidate.status = "dropped"
                    candidate.reason = f"{against.median:.2f} of the best after {number + 1} rounds"
            if len(finalists) == 1 or all(
                c.summary().high - c.summary().low < NARROW * c.summary().median for c in finalists
            ):
                return

    def _ranked(self) -> list[Candidate]:
        measured = [candidate for candidate in self.candidates if candidate.values]
        rest = [candidate for candidate in self.candidates if not candidate.values]
        return sorted(measured, key=lambda c: (c.status == "dropped", -c.summary().median)) + rest

    def _choose(self) -> Candidate:
        left = [c for c in self.candidates if c.values and c.status == "not measured" and not c.reason]
        best = max(left, key=lambda candidate: candidate.summary().median)
        reached = best.summary()
        for candidate in left:
            found = candidate.summary()
            tied = found.overlaps(reached) and found.median >= SAME * reached.median
            candidate.status = "best" if candidate is best else "tie" if tied else "slower"
            candidate.reason = "" if candidate is best else f"{found.median / reached.median:.3f} of the best"
        return min((c for c in left if c.status in ("best", "tie")), key=lambda candidate: candidate.number)
