"""Successive halving over loader settings, in two rungs: all against the simplest, then the best in turn.

K. Jamieson, A. Talwalkar: "Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016.
On a shared machine, two measurements a few seconds apart differ by more than the settings do. Only ratios of neighbours
in time are compared: each candidate with the simplest settings, which stay open, then the finalists with each other.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, Literal

import torch

from fastmnist.errors import FastmnistError
from fastmnist.measure.batches import Epochs, kept, length_of, with_tensors
from fastmnist.system.machine import memory_in_use
from fastmnist.system.statistics import Summary, in_turns, ratios, summarise

Settings = dict[str, Any]
Status = Literal["best", "tie", "slower", "dropped", "failed", "too much memory", "not measured"]
Progress = Callable[[str, float], None]

FIRST_RUNG = 0.6  # of the budget
CEILING_SHARE, MOST_CEILING_TURNS = 0.15, 9  # of the budget, to measure the ceiling
FINALISTS = 4
LEAST_ROUNDS, MOST_ROUNDS = 3, 15  # the least even beyond the budget: one value decides nothing
SAME = 0.95  # of the best: no slower is a tie
TURN_SECONDS = 0.25
WARM_UP_SECONDS = 1.0  # at most, to use up the batches that a loader has ready


@dataclass(eq=False)
class Candidate:
    """One combination of settings.

    place: the index of each setting's value, 0 for the simplest.
    rounds: images/s of the first rung, then of each turn of the second.
    ratio: to the simplest settings' rate in the first rung; 0 without one.
    memory: bytes that opening it took.
    """

    name: str
    settings: Settings
    place: tuple[int, ...]
    rounds: list[list[float]] = field(default_factory=list)
    ratio: float = 0.0
    memory: int | None = None
    status: Status = "not measured"
    reason: str = ""

    @property
    def complexity(self) -> tuple[int, int]:
        """How many settings are not the simplest, and by how many values."""
        return sum(at > 0 for at in self.place), sum(self.place)

    @property
    def changes(self) -> list[tuple[str, int]]:
        """(setting, index of its value) of those that are not the simplest."""
        return [(name, at) for name, at in zip(self.settings, self.place, strict=True) if at]

    @property
    def values(self) -> list[float]:
        return [value for values in self.rounds for value in values]

    @property
    def final(self) -> list[float]:
        """The values of the second rung, measured in turn with the other finalists."""
        return [value for values in self.rounds[1:] for value in values]

    def summary(self) -> Summary:
        return summarise(self.final or self.values)

    def ratios(self, simplest: Candidate) -> list[list[float]]:
        """Rates over those of the simplest settings in the same turn: of the first rung, then of each second one."""
        turns = zip(self.rounds[1:], simplest.rounds[1:], strict=False)
        return [[self.ratio], *([own / other] for [own], [other] in turns)]

    def fail(self, error: Exception) -> None:
        self.status, self.reason = "failed", " ".join(f"{type(error).__name__}: {error}".split())


@dataclass(frozen=True)
class Search:
    """candidates: the fastest first, then those without a value. chosen: the simplest of those that tie with the best.

    reference: the simplest that works, measured beside all others.
    ceiling: the rate of the step on one fixed batch over the reference's, which no loader exceeds, if measured.
    """

    candidates: list[Candidate]
    chosen: Candidate
    reference: Candidate
    seconds: float
    ceiling: Summary | None = None


def combinations(
    space: Mapping[str, Sequence[Any]],
    same_as: Callable[[Settings], Settings] = lambda settings: settings,
    name: Callable[[Settings], str] | None = None,
) -> list[Candidate]:
    """All combinations, the simplest first.

    Args:
        space: the values of each setting, the simplest first.
        same_as: the simplest combination with the same effect, so that it is measured once.
        name: of a combination; by default its differences from the simplest.
    """
    keys = list(space)
    simplest = {key: values[0] for key, values in space.items()}
    by_place: dict[tuple[int, ...], Candidate] = {}
    for values in itertools.product(*space.values()):
        same = same_as(dict(zip(keys, values, strict=True)))
        settings = {key: same[key] for key in keys}
        place = tuple(_index(space[key], settings[key]) for key in keys)
        label = name(settings) if name else describe(settings, simplest)
        by_place.setdefault(place, Candidate(label, settings, place))
    return sorted(by_place.values(), key=lambda candidate: candidate.complexity)


def _index(values: Sequence[Any], value: Any) -> int:
    """`values.index(value)`, but False is not 0."""
    return next(at for at, known in enumerate(values) if known == value and type(known) is type(value))


def describe(settings: Settings, simplest: Settings) -> str:
    """ "workers 2, os_cache off"; "defaults" when nothing differs."""
    parts = [
        f"{key} {'on' if value is True else 'off' if value is False else value}"
        for key, value in settings.items()
        if value != simplest[key]
    ]
    return ", ".join(parts) or "defaults"


def possible(gain: Summary) -> str:
    """ "1.27 (1.22 to 1.31)"; what is below 1 is noise."""
    median, low, high = (max(1.0, value) for value in (gain.median, gain.low, gain.high))
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


class OpenLoader:
    """An open loader, measured in turns.

    A turn counts consecutive batches of an epoch. The cost of an epoch's start is measured apart and spread over the
    epoch's batches.
    """

    def __init__(self, loader: Iterable[Any], step: Callable[[Any], Any] | None, ahead: int) -> None:
        self.loader, self.step, self.ahead = loader, step, ahead
        self.epochs = Epochs(loader, before_start=_synchronize)
        self.per_epoch = len(loader) if hasattr(loader, "__len__") else 0  # type: ignore[arg-type]

    def warm_up(self) -> None:
        """Starts two epochs: the first one also pays for what is made once, and does not count."""
        next(self.epochs)
        self.epochs.end_epoch()
        next(self.epochs)

    def turn(self) -> float:
        """Images/s; batches/s if a batch's length is unknown."""
        self._run(self.ahead, 0.0, WARM_UP_SECONDS)
        images, batches, taken = self._run(1, TURN_SECONDS, float("inf"))
        start = median(self.epochs.starts[1:])
        per_batch = taken / batches + (start / self.per_epoch if self.per_epoch else 0.0)
        return images / batches / per_batch

    def _run(self, least: int, seconds: float, most: float) -> tuple[int, int, float]:
        """(images, batches, seconds) of at least `least` batches and `seconds`, but not beyond `most` seconds."""
        images = batches = 0
        _synchronize()
        begun = time.perf_counter()
        while True:
            taken = time.perf_counter() - begun
            if (batches >= least and taken >= seconds) or taken > most:
                break
            epoch = len(self.epochs.starts)
            batch = next(self.epochs)
            begun += sum(self.epochs.starts[epoch:])
            if self.step is not None:
                self.step(batch)
            images += length_of(batch) or 1
            batches += 1
        _synchronize()
        return images, batches, time.perf_counter() - begun

    def close(self) -> None:
        self.epochs.end_epoch()
        close = getattr(self.loader, "close", None)
        if close is not None:
            close()
        del self.loader, self.epochs


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Halving:
    """Successive halving in two rungs; `run` makes the search.

    0. With a ceiling: turns of the step on one fixed batch, which no loader can beat, and of the simplest settings. The
       search ends where nothing is left to gain: at once if all that any settings could gain is no more than a tie; the
       first rung when a candidate comes near the ceiling; the second when the best one's interval reaches it.
    1. Each candidate takes one turn beside the simplest. Single changes come first, then their combinations, the most
       promising first (each change is expected to do what it did alone), until 0.6 of the budget are spent.
    2. The simplest and the three best take turns until the budget is spent, 3 to 15 rounds.

    Args:
        candidates: the simplest first.
        make: a loader with these settings; closed by its `close`, if it has one.
        step: one training step with a batch; None measures the loader alone.
        budget: seconds in all, from `begun` on. Two settings are compared however long that takes.
        max_memory: bytes that loaders open at the same time may take; None for no limit.
        ahead: batches that a loader with these settings may have ready.
        ceiling: measure it, where the step takes the same batches with all settings.
        announce: called with the best possible gain, before the search begins.
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
        ceiling: bool = False,
        announce: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.candidates, self.make, self.step, self.budget = candidates, make, step, budget
        self.max_memory, self.ahead, self.progress = max_memory, ahead, progress
        self.begun = time.perf_counter() if begun is None else begun
        self.errors: list[Exception] = []
        self.candidate_seconds = self.turn_seconds = 0.0  # the longest of the first rung
        self.measures_ceiling, self.announce = ceiling and step is not None, announce
        self.fixed: OpenLoader | None = None  # the step on one batch
        self.ceiling: Summary | None = None
        self.ceiling_rates: list[float] = []  # of the second rung

    def run(self) -> Search:
        """The search.

        Raises:
            FastmnistError: no settings work; the first error is its cause.
        """
        with ExitStack() as stack:
            reference, loader = self._open_reference()
            finalists = {reference: stack.enter_context(closing(loader))}
            reached = self.measures_ceiling and self._measure_ceiling(reference, loader)
            if not reached:
                reached = self._first_rung(reference, loader)
                self._open_finalists(finalists, stack)
                reached = self._second_rung(finalists) or reached
        chosen = self._choose(list(finalists))
        for candidate in self.candidates:
            if candidate.status == "not measured" and not candidate.reason:
                candidate.reason = "nothing left to gain" if reached else "out of budget"
        ranked = sorted(
            (candidate for candidate in self.candidates if candidate.values),
            key=lambda candidate: (candidate not in finalists, -candidate.summary().median),
        )
        rest = [candidate for candidate in self.candidates if not candidate.values]
        return Search(ranked + rest, chosen, reference, self._elapsed(), self.ceiling)

    def _elapsed(self) -> float:
        return time.perf_counter() - self.begun

    def _say(self, text: str) -> None:
        self.progress(text, min(1.0, self._elapsed() / self.budget))

    def _open_reference(self) -> tuple[Candidate, OpenLoader]:
        """The simplest settings that work."""
        for candidate in self.candidates:
            loader = self._open(candidate)
            if loader is not None:
                loader.turn()  # the step's first calls are slow
                return candidate, loader
        cause = self.errors[0] if self.errors else None
        raise FastmnistError(f"none of {len(self.candidates)} settings works: {self.candidates[0].reason}") from cause

    def _open(self, candidate: Candidate) -> OpenLoader | None:
        """The loader, warmed up; None, and the reason in `candidate`, if it fails or takes too much memory."""
        self._say(candidate.name)
        before = memory_in_use()
        loader: OpenLoader | None = None
        try:
            loader = OpenLoader(self.make(candidate.settings), self.step, self.ahead(candidate.settings))
            loader.warm_up()
        except Exception as error:
            if loader is not None:
                with suppress(Exception):
                    loader.close()
            candidate.fail(error)
            self.errors.append(error)
            return None
        candidate.memory = max(0, memory_in_use() - before)
        if self.max_memory is not None and candidate.memory > self.max_memory:
            loader.close()
            candidate.status = "too much memory"
            candidate.reason = f"{candidate.memory >> 20:,} MiB, allowed are {self.max_memory >> 20:,}"
            return None
        return loader

    def _measure_ceiling(self, reference: Candidate, loader: OpenLoader) -> bool:
        """Whether no settings can be more than a tie with the simplest: what they could gain is below that for sure."""
        batch = with_tensors(next(loader.epochs), kept)
        self.fixed = OpenLoader(itertools.repeat(batch), self.step, 1)
        self.fixed.warm_up()
        rates = in_turns(
            {"fixed": self.fixed.turn, "simplest": loader.turn},
            MOST_CEILING_TURNS,
            until=time.perf_counter() + CEILING_SHARE * self.budget,
            least=LEAST_ROUNDS,
        )
        self.ceiling = gain = ratios(rates["fixed"], rates["simplest"])
        self.announce(f"No settings can train more than {possible(gain)} times as fast as the simplest.")
        if gain.high * SAME > 1:
            return False
        reference.rounds, reference.ratio = [[rate] for rate in rates["simplest"]], 1.0
        return True

    def _first_rung(self, reference: Candidate, loader: OpenLoader) -> bool:
        """Whether a candidate came near the ceiling."""
        begun = time.perf_counter()
        reference.rounds, reference.ratio = [[loader.turn()]], 1.0
        self.turn_seconds = time.perf_counter() - begun
        singles = [candidate for candidate in self.candidates if len(candidate.changes) == 1]
        if self._screen(singles, reference, loader):
            return True
        alone = {candidate.changes[0]: candidate.ratio for candidate in singles}
        others = [candidate for candidate in self.candidates if len(candidate.changes) > 1]
        others.sort(key=lambda candidate: -math.prod(alone.get(change, 1.0) for change in candidate.changes))
        return self._screen(others, reference, loader)

    def _screen(self, candidates: Iterable[Candidate], reference: Candidate, beside: OpenLoader) -> bool:
        """A turn of each, then one of the reference, as far as the budget goes, or until one is near the ceiling."""
        for candidate in candidates:
            if candidate.status != "not measured" or candidate is reference:
                continue
            begun = time.perf_counter()
            if self.candidate_seconds and begun + self.candidate_seconds > self.begun + FIRST_RUNG * self.budget:
                return False
            loader = self._open(candidate)
            if loader is None:
                continue
            with closing(loader):
                try:
                    opened = time.perf_counter()
                    rate = loader.turn()
                    self.turn_seconds = max(self.turn_seconds, time.perf_counter() - opened)
                    other = beside.turn()
                except Exception as error:
                    candidate.fail(error)
                    continue
            candidate.rounds, candidate.ratio = [[rate]], rate / other
            reference.rounds[0].append(other)
            self.candidate_seconds = max(self.candidate_seconds, time.perf_counter() - begun)
            if self.ceiling is not None and candidate.ratio >= SAME * self.ceiling.high:
                return True
        return False

    def _open_finalists(self, finalists: dict[Candidate, OpenLoader], stack: ExitStack) -> None:
        """The best of the first rung, beside the reference, as far as memory and time go."""
        (reference,) = finalists
        screened = [candidate for candidate in self.candidates if candidate.ratio and candidate is not reference]
        screened.sort(key=lambda candidate: -candidate.ratio)
        memory = reference.memory or 0
        for candidate in screened:
            if len(finalists) == FINALISTS:
                share = candidate.ratio / max(reference.ratio, screened[0].ratio)
                candidate.status, candidate.reason = "dropped", f"{share:.2f} of the best beside the simplest"
            elif self.max_memory is not None and memory + (candidate.memory or 0) > self.max_memory:
                candidate.reason = "no memory left to measure it beside the others"
            elif len(finalists) > 1 and self._elapsed() + self._final_seconds(len(finalists) + 1) > self.budget:
                candidate.status, candidate.reason = "dropped", "no time left to measure it again"
            elif (loader := self._open(candidate)) is not None:
                finalists[candidate] = stack.enter_context(closing(loader))
                memory += candidate.memory or 0

    def _final_seconds(self, finalists: int) -> float:
        """Of opening one more finalist, and of the least rounds of them all."""
        return self.candidate_seconds + LEAST_ROUNDS * finalists * self.turn_seconds

    def _second_rung(self, finalists: dict[Candidate, OpenLoader]) -> bool:
        """Whether the best one's interval reached the ceiling."""

        def value(candidate: Candidate, loader: OpenLoader) -> float:
            candidate.rounds.append([loader.turn()])
            return candidate.rounds[-1][0]

        def ceiling(loader: OpenLoader) -> float:
            self.ceiling_rates.append(loader.turn())
            return self.ceiling_rates[-1]

        def reached() -> bool:
            if len(self.ceiling_rates) < LEAST_ROUNDS:
                return False
            best = max(finalists, key=lambda candidate: candidate.summary().median)
            share = ratios(best.final, self.ceiling_rates)
            return share.low >= SAME or (share.high >= 1 and share.median >= SAME)

        def ended(turn: int) -> bool:
            self._say(f"round {turn + 1}")
            return reached()

        self._say("round 1")
        turns: dict[Candidate | None, Callable[[], float]] = {
            candidate: partial(value, candidate, loader) for candidate, loader in finalists.items()
        }
        if self.fixed is not None:
            turns[None] = partial(ceiling, self.fixed)
        in_turns(
            turns,
            MOST_ROUNDS,
            until=self.begun + self.budget - len(turns) * self.turn_seconds,
            least=LEAST_ROUNDS,
            on_turn=ended,
        )
        return reached()

    def _choose(self, finalists: list[Candidate]) -> Candidate:
        """The simplest of those that tie with the best; sets each one's status."""
        best = max(finalists, key=lambda candidate: candidate.summary().median)
        for candidate in finalists:
            share = ratios(candidate.final, best.final).median
            candidate.status = "best" if candidate is best else "tie" if share >= SAME else "slower"
            candidate.reason = "" if candidate is best else f"{share:.3f} of the best"
        return next(candidate for candidate in self.candidates if candidate.status in ("best", "tie"))
