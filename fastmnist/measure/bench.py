"""The comparison that `fastmnist bench` makes: every way to load, on this machine, in one run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmnist.baselines.peers import PEERS, missing
from fastmnist.beton.reader import Beton
from fastmnist.errors import ConfigError, FastmnistError
from fastmnist.measure.client import SideError, SideProcess
from fastmnist.measure.contenders import BY_NAME, OURS, PLAIN, SIDES, Side, Source
from fastmnist.prepare.prepare import FALLBACK, PrepareProgress, compile_dataset, prepare
from fastmnist.system.environment import origin
from fastmnist.system.machine import choose_device
from fastmnist.system.statistics import in_turns, ratios, row

EXPANDED = 60_000  # images that the embedded digits are deformed into, where there is no MNIST
MOST_TURNS = 15
TURN_SECONDS, WARM_UP_SECONDS = 0.35, 0.15
START_TIMEOUT, OPEN_TIMEOUT, WRITE_TIMEOUT, TURN_TIMEOUT = 60.0, 60.0, 120.0, 30.0  # seconds
TOGETHER = 2  # processes that import at the same time; nothing is measured meanwhile
FIRST_BATCHES = 6  # processes per side, as far as the time goes


@dataclass(frozen=True)
class Plan:
    """seconds: that the whole comparison may take, about. least_turns: that it makes even so."""

    seconds: float
    least_turns: int
    first_batches: int


FULL, QUICK = Plan(160.0, 6, FIRST_BATCHES), Plan(22.0, 3, 1)
Progress = Callable[[str, float], None]


@dataclass
class Comparison:
    """rows: as `clock.row` makes them, one per side and quantity; those of a side that failed have "error" instead."""

    rows: list[dict[str, Any]]
    interrupted: bool = False
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "interrupted": self.interrupted, "seconds": self.seconds, "notes": self.notes}


def bench_file(
    dataset: str | None, data_dir: str | None, cache_dir: str | None = None, progress: PrepareProgress | None = None
) -> tuple[Path, str]:
    """The compiled training images to measure with, and a note on them.

    Where no MNIST can be had and none was asked for, the embedded digits, deformed into 60,000.

    Raises:
        DataError: the dataset that was asked for cannot be had.
    """
    prepared = prepare(dataset, data_dir, cache_dir, progress=progress)
    if prepared.dataset != FALLBACK:
        return prepared.train, prepared.note
    with Beton(prepared.train) as file:
        copies = -(-EXPANDED // len(file))
    files = compile_dataset(FALLBACK, None, str(prepared.train.parent), expand=copies, progress=progress)
    note = f"{prepared.note} Each is deformed {copies} times, which makes {files[-1].samples:,} images.".strip()
    return files[-1].path, note


def choose_sides(only: str | None, quick: bool) -> list[Side]:
    """The sides by name (separated by ";"), and with them what they are held against: limits, the plain DataLoader.

    Raises:
        ConfigError: there is no side of such a name; names those that there are.
    """
    if only is None:
        return [side for side in SIDES if side.quick or not quick]
    names = [name.strip() for name in only.split(";")]
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise ConfigError(f"--only: there is no {'; '.join(unknown)}; there are {'; '.join(BY_NAME)}")
    wanted = {*names, PLAIN, *(BY_NAME[name].limit for name in [*names, PLAIN])}
    return [side for side in SIDES if side.name in wanted]


def bench(
    data: Path,
    *,
    batch_size: int = 512,
    device: str = "auto",
    sides: Iterable[Side] = SIDES,
    plan: Plan = FULL,
    progress: Progress = lambda text, share: None,
) -> Comparison:
    """Measures every side, each in a process of its own, in turn.

    Per side: images/s over parts of its epochs (after a warm-up in every turn), that over the plain DataLoader and
    over a plain copy of as many bytes, turn by turn; seconds from making the loader to its first batch in a new
    process after the imports, and the peak of memory beyond the imports over one epoch, several processes each. JIT
    caches are warm; those without are rows of their own.

    Args:
        data: a compiled file. progress: called with what is being done, and the share that is done.

    Raises:
        ConfigError: the batch is larger than the file's images. FastmnistError: ours or a limit could not be measured.
    """
    with Beton(data) as file:
        if not 1 <= batch_size <= len(file):
            raise ConfigError(f"--batch-size {batch_size}: {data} has {len(file):,} images; take 1 to that many")
        about = {"data": data.name, "images": len(file), "shape": list(file.image_shape)}
    chosen = choose_device(device)
    return _Bench(data, batch_size, chosen, list(sides), plan, progress, about).run()


class _Bench:
    """One comparison, in its order: open all, measure in turn, begin some anew, put together."""

    def __init__(
        self,
        data: Path,
        batch_size: int,
        device: torch.device,
        sides: list[Side],
        plan: Plan,
        progress: Progress,
        about: dict[str, Any],
    ) -> None:
        self.data, self.batch_size, self.device, self.plan, self.progress = data, batch_size, device, plan, progress
        self.sides, self.about = sides, about
        self.begun = time.perf_counter()
        self.origin = origin(device) | {"device": str(device)}
        self.failed: dict[str, str] = {}
        self.opened: dict[str, list[dict[str, Any]]] = {}
        self.cold: list[dict[str, Any]] = []
        self.starting: dict[str, float] = {}  # seconds that a new process takes until it is open
        self.values: dict[str, list[float]] = {}
        self.processes: dict[str, SideProcess] = {}
        self.interrupted = False

    def run(self) -> Comparison:
        with ExitStack() as leaving:
            self.folder = Path(leaving.enter_context(tempfile.TemporaryDirectory()))
            leaving.callback(self._close_all)
            try:
                self._open_all()
                self._turns()
                self._begin_anew()
            except KeyboardInterrupt:
                self.interrupted = True
        for side in self.sides:
            if side.kind in ("ours", "limit") and side.name in self.failed:
                raise FastmnistError(f"{side.name} could not be measured: {self.failed[side.name]}")
        if self.interrupted and not any(self.values.values()):
            raise KeyboardInterrupt
        return Comparison(self._rows(), self.interrupted, time.perf_counter() - self.begun)

    def _elapsed(self) -> float:
        return time.perf_counter() - self.begun

    def _say(self, text: str) -> None:
        self.progress(text, min(1.0, self._elapsed() / self.plan.seconds))

    def _close_all(self) -> None:
        for process in self.processes.values():
            process.close()

    def _open_all(self) -> None:
        here = []
        for side in self.sides:
            lacking = missing(PEERS[side.loader]) if side.kind == "peer" else None
            if lacking is None:
                here.append(side)
            else:
                self.failed[side.name] = lacking
        self._fill_jit_cache(here)
        for at in range(0, len(here), TOGETHER):
            some = here[at : at + TOGETHER]
            self._say(f"starting {', '.join(side.name for side in some)}")
            for side in some:
                self.processes[side.name] = SideProcess(side.name)
                self.processes[side.name].tell("imports", side=side.name)
            imported = []
            for side in some:
                try:
                    self.starting[side.name] = self.processes[side.name].answer(START_TIMEOUT)["seconds"]
                    imported.append(side)
                except SideError as error:
                    self._fail(side, error)
            for side in imported:
                try:
                    self._write(side)
                    begun = time.perf_counter()
                    self.opened[side.name] = [self._open(side, self.processes[side.name])]
                    self.starting[side.name] += time.perf_counter() - begun
                    self.processes[side.name].pause()
                except SideError as error:
                    self._fail(side, error)

    def _fill_jit_cache(self, sides: list[Side]) -> None:
        """On a new machine the first process would compile, and its first batch be no warm one."""
        for side in sides:
            if side.kind == "ours":
                source = Source(side, self.data, self.batch_size, self.device, self.folder)
                next(source.epoch())
                source.close()

    def _fail(self, side: Side, error: SideError) -> None:
        self.failed[side.name] = str(error)
        self.processes.pop(side.name).close()

    def _folder(self, side: Side) -> Path:
        return self.folder / side.loader

    def _write(self, side: Side) -> None:
        if side.kind == "peer":
            self._say(f"writing the images for {side.name}")
            self._folder(side).mkdir()
            asked = {"data": str(self.data), "folder": str(self._folder(side))}
            self.processes[side.name].ask("write", WRITE_TIMEOUT, **asked)

    def _open(self, side: Side, process: SideProcess) -> dict[str, Any]:
        return process.ask(
            "open",
            OPEN_TIMEOUT,
            data=str(self.data),
            batch_size=self.batch_size,
            device=str(self.device),
            folder=str(self._folder(side)),
        )

    def _turns(self) -> None:
        """Images/s of all, turn by turn, until two thirds of the time that is left are over."""
        until = time.perf_counter() + 2 / 3 * (self.plan.seconds - self._elapsed())

        def measure(side: Side) -> float:
            if side.name in self.failed:
                return np.nan
            process = self.processes[side.name]
            process.go_on()
            try:
                found = process.ask("turn", TURN_TIMEOUT, warm_up=WARM_UP_SECONDS, seconds=TURN_SECONDS)
            except SideError as error:
                self._fail(side, error)
                return np.nan
            process.pause()  # workers load ahead, and threads that wait for work may spin
            rate: float = found["images"] / found["seconds"]
            self.values[side.name].append(rate)
            return rate

        measured = [side for side in self.sides if side.name in self.opened and side.name not in self.failed]
        self.values = {side.name: [] for side in measured}
        self._say(f"turn 1 of up to {MOST_TURNS}")
        in_turns(
            {side.name: lambda side=side: measure(side) for side in measured},  # type: ignore[misc]
            MOST_TURNS,
            until=until,
            least=self.plan.least_turns,
            on_turn=lambda turn: self._say(f"turn {turn + 1} of up to {MOST_TURNS}"),
        )

    def _begin_anew(self) -> None:
        """More new processes for the first batch and the memory, and those of ours without numba's cache."""
        self._close_all()
        ready = [side for side in self.sides if side.name in self.opened and side.name not in self.failed]
        ours = [side for side in ready if side.name == OURS]
        for repeat in range(self.plan.first_batches):
            for cold, side in [*((True, side) for side in ours), *((False, side) for side in ready)]:
                wanted = cold or repeat + 1 < self.plan.first_batches  # each has been opened once
                late = self._elapsed() + self.starting[side.name] > self.plan.seconds
                if not wanted or side.kind == "limit" or late:
                    continue
                self._say(f"first batch of a new process: {side.name}{' without JIT cache' if cold else ''}")
                try:
                    with tempfile.TemporaryDirectory() as cache:
                        environment = {"NUMBA_CACHE_DIR": cache} if cold else {}
                        with SideProcess(side.name, environment) as process:
                            process.ask("imports", START_TIMEOUT, side=side.name)
                            (self.cold if cold else self.opened[side.name]).append(self._open(side, process))
                except SideError as error:
                    self.failed[side.name] = str(error)

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for side in self.sides:
            settings = {"batch_size": self.batch_size, **side.settings}
            about = {"kind": side.kind, **self.about}
            values = self.values.get(side.name, [])
            if side.name in self.failed or not values:
                why = self.failed.get(side.name, "interrupted before its first turn")
                rows.append({"group": "loader", "name": side.name, "settings": settings, "error": why, **about})
                rows[-1] |= self.origin
                continue
            opened = self.opened[side.name]
            about |= {"output": [opened[0]["shape"], opened[0]["dtype"]]}
            more = dict(about)
            for key, other in (("over_plain", PLAIN), ("of_limit", side.limit)):
                against = self.values.get(other, [])
                n = min(len(values), len(against))
                if n and other not in self.failed:
                    more[key] = ratios(values[:n], against[:n]).to_dict()
            rows.append(row("loader", side.name, values, "images/s", self.origin, settings, **more))
            if side.kind == "limit":
                continue
            for group in ("peak memory", "peak device memory"):
                key = group.replace(" ", "_")
                found = [answer[key] for answer in opened if answer.get(key) is not None]
                if found:
                    rows.append(row(group, side.name, found, "bytes", self.origin, settings, **about))
            firsts = [
                (side.name, opened, "warm"),
                (f"{side.name}, cold", self.cold if side.name == OURS else [], "cold"),
            ]
            for name, answers, cache in firsts:
                found = [answer["first_batch"] for answer in answers]
                if found:
                    about["compiled"] = [answer["compiled"] for answer in answers]
                    settings = settings | {"jit_cache": cache}
                    rows.append(row("first batch", name, found, "seconds", self.origin, settings, **about))
        return rows
