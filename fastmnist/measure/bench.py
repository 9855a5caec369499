"""Loader comparison: every contender in a process of its own, measured in turn, in one run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmnist.baselines.peers import PEERS, missing
from fastmnist.beton.reader import Beton
from fastmnist.errors import ConfigError, FastmnistError
from fastmnist.measure.contenders import BY_NAME, CONTENDERS, OURS, PLAIN, Contender
from fastmnist.measure.worker import WorkerError, WorkerProcess
from fastmnist.prepare.prepare import FALLBACK, PrepareProgress, compile_dataset, prepare
from fastmnist.system.environment import origin
from fastmnist.system.machine import choose_device
from fastmnist.system.statistics import in_turns, ratios, row

EXPANDED = 60_000  # images that the embedded digits are deformed into, where there is no MNIST
MOST_TURNS = 15
TURN_SECONDS, WARM_UP_SECONDS = 0.35, 0.15
START_TIMEOUT, OPEN_TIMEOUT, WRITE_TIMEOUT, TURN_TIMEOUT = 60.0, 60.0, 120.0, 30.0  # seconds
TOGETHER = 2  # processes that import at the same time; nothing is measured meanwhile


@dataclass(frozen=True)
class Plan:
    """seconds: of the whole comparison, about. least_turns: made even beyond that.

    first_batches: new processes per contender that load a first batch, as far as the seconds go.
    """

    seconds: float
    least_turns: int
    first_batches: int


FULL, QUICK = Plan(160.0, 6, 6), Plan(22.0, 3, 1)
Progress = Callable[[str, float], None]


@dataclass
class Comparison:
    """rows: as `statistics.row` makes them, one per contender and quantity; a failed one's has "error" instead."""

    rows: list[dict[str, Any]]
    interrupted: bool = False
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "interrupted": self.interrupted, "seconds": self.seconds, "notes": self.notes}


def bench_file(
    dataset: str | None,
    data_dir: str | None,
    cache_dir: str | None = None,
    *,
    image_size: str | None = None,
    progress: PrepareProgress | None = None,
) -> tuple[Path, str]:
    """The compiled training images to measure with, and a note on them.

    Without a dataset named and without MNIST, these are the embedded digits, deformed into 60,000.

    Raises:
        DataError: the named dataset cannot be had.
    """
    prepared = prepare(dataset, data_dir, cache_dir, image_size=image_size, progress=progress)
    if prepared.dataset != FALLBACK:
        return prepared.train, prepared.note
    with Beton(prepared.train) as file:
        copies = -(-EXPANDED // len(file))
    files = compile_dataset(FALLBACK, None, str(prepared.train.parent), expand=copies, progress=progress)
    note = f"{prepared.note} Each is deformed {copies} times, which makes {files[-1].samples:,} images.".strip()
    return files[-1].path, note


def choose_contenders(only: str | None, quick: bool) -> list[Contender]:
    """The contenders named in `only`, separated by ";", plus their limits and the plain DataLoader.

    Raises:
        ConfigError: there is no contender of such a name; the message lists all names.
    """
    if only is None:
        return [contender for contender in CONTENDERS if contender.quick or not quick]
    names = [name.strip() for name in only.split(";")]
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise ConfigError(f"--only: there is no {'; '.join(unknown)}; there are {'; '.join(BY_NAME)}")
    wanted = {*names, PLAIN, *(BY_NAME[name].limit for name in [*names, PLAIN])}
    return [contender for contender in CONTENDERS if contender.name in wanted]


def bench(
    data: Path,
    *,
    batch_size: int = 512,
    device: str = "auto",
    contenders: Iterable[Contender] = CONTENDERS,
    plan: Plan = FULL,
    progress: Progress = lambda text, share: None,
) -> Comparison:
    """Measures all contenders in turn, each in a process of its own.

    The quantities are:
    - images/s, over parts of an epoch, after a warm-up in every turn; with its ratios, turn by turn, to the plain
      DataLoader and to a plain copy of as many bytes;
    - seconds from making the loader to its first batch, in new processes, imports not counted; with and without
      numba's cache;
    - bytes at the peak of an epoch, beyond the imports;
    - CPU seconds per million images, in the same turns as the rate, of the process and its workers.

    Args:
        data: a compiled file.
        progress: called with the current activity and the share done, 0 to 1.

    Raises:
        ConfigError: the batch size exceeds the number of images.
        FastmnistError: ours or a limit could not be measured.
    """
    with Beton(data) as file:
        if not 1 <= batch_size <= len(file):
            raise ConfigError(f"--batch-size {batch_size}: {data} has {len(file):,} images; take 1 to that many")
        about = {"data": data.name, "images": len(file), "shape": list(file.image_shape)}
    chosen = choose_device(device)
    return _Bench(data, batch_size, chosen, list(contenders), plan, progress, about).run()


class _Bench:
    """One comparison: open all, measure in turn, start new processes for first batches, make rows."""

    def __init__(
        self,
        data: Path,
        batch_size: int,
        device: torch.device,
        contenders: list[Contender],
        plan: Plan,
        progress: Progress,
        about: dict[str, Any],
    ) -> None:
        self.data, self.batch_size, self.device, self.plan, self.progress = data, batch_size, device, plan, progress
        self.contenders, self.about = contenders, about
        self.begun = time.perf_counter()
        self.origin = origin(device) | {"device": str(device)}
        self.failed: dict[str, str] = {}
        self.opened: dict[str, list[dict[str, Any]]] = {}
        self.cold: list[dict[str, Any]] = []
        self.starting: dict[str, float] = {}  # seconds from a new process to its opened loader
        self.values: dict[str, list[float]] = {}
        self.used: dict[str, list[float]] = {}
        self.processes: dict[str, WorkerProcess] = {}
        self.interrupted = False

    def run(self) -> Comparison:
        with ExitStack() as leaving:
            self.folder = Path(leaving.enter_context(tempfile.TemporaryDirectory()))
            leaving.callback(self._close_all)
            try:
                self._open_all()
                self._turns()
                self._first_batches()
            except KeyboardInterrupt:
                self.interrupted = True
        for contender in self.contenders:
            if contender.kind in ("ours", "limit") and contender.name in self.failed:
                raise FastmnistError(f"{contender.name} could not be measured: {self.failed[contender.name]}")
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
        installed = []
        for contender in self.contenders:
            lacking = missing(PEERS[contender.loader]) if contender.kind == "peer" else None
            if lacking is None:
                installed.append(contender)
            else:
                self.failed[contender.name] = lacking
        for at in range(0, len(installed), TOGETHER):
            some = installed[at : at + TOGETHER]
            self._say(f"starting {', '.join(contender.name for contender in some)}")
            for contender in some:
                self.processes[contender.name] = WorkerProcess(contender.name)
                self.processes[contender.name].send("imports", contender=contender.name)
            imported = []
            for contender in some:
                try:
                    self.starting[contender.name] = self.processes[contender.name].receive(START_TIMEOUT)["seconds"]
                    imported.append(contender)
                except WorkerError as error:
                    self._fail(contender, error)
            for contender in imported:
                try:
                    self._write(contender)
                    begun = time.perf_counter()
                    self.opened[contender.name] = [self._open_warm(contender)]
                    self.starting[contender.name] += time.perf_counter() - begun
                    self.processes[contender.name].pause()
                except WorkerError as error:
                    self._fail(contender, error)

    def _open_warm(self, contender: Contender) -> dict[str, Any]:
        """Opens our loader again, in a new process, where the first one had to compile: on a new machine."""
        opened = self._open(contender, self.processes[contender.name])
        if contender.kind == "ours" and opened["compiled"]:
            self.processes[contender.name].close()
            self.processes[contender.name] = WorkerProcess(contender.name)
            self.processes[contender.name].request("imports", START_TIMEOUT, contender=contender.name)
            opened = self._open(contender, self.processes[contender.name])
        return opened

    def _working(self) -> list[Contender]:
        return [one for one in self.contenders if one.name in self.opened and one.name not in self.failed]

    def _fail(self, contender: Contender, error: WorkerError) -> None:
        self.failed[contender.name] = str(error)
        self.processes.pop(contender.name).close()

    def _folder(self, contender: Contender) -> Path:
        return self.folder / contender.loader

    def _write(self, contender: Contender) -> None:
        if contender.kind == "peer":
            self._say(f"writing the images for {contender.name}")
            self._folder(contender).mkdir()
            folder = str(self._folder(contender))
            self.processes[contender.name].request("write", WRITE_TIMEOUT, data=str(self.data), folder=folder)

    def _open(self, contender: Contender, process: WorkerProcess) -> dict[str, Any]:
        return process.request(
            "open",
            OPEN_TIMEOUT,
            data=str(self.data),
            batch_size=self.batch_size,
            device=str(self.device),
            folder=str(self._folder(contender)),
        )

    def _turns(self) -> None:
        """Images/s of all, turn by turn, in two thirds of the remaining time."""
        until = time.perf_counter() + 2 / 3 * (self.plan.seconds - self._elapsed())

        def measure(contender: Contender) -> float:
            if contender.name in self.failed:
                return np.nan
            process = self.processes[contender.name]
            process.resume()
            try:
                answer = process.request("turn", TURN_TIMEOUT, warm_up=WARM_UP_SECONDS, seconds=TURN_SECONDS)
            except WorkerError as error:
                self._fail(contender, error)
                return np.nan
            process.pause()  # workers load ahead, and threads that wait for work may spin
            rate: float = answer["images"] / answer["seconds"]
            self.values[contender.name].append(rate)
            self.used[contender.name].append(1e6 * answer["cpu_seconds"] / answer["images"])
            return rate

        measured = self._working()
        self.values = {contender.name: [] for contender in measured}
        self.used = {contender.name: [] for contender in measured}
        self._say(f"turn 1 of up to {MOST_TURNS}")
        in_turns(
            {contender.name: partial(measure, contender) for contender in measured},
            MOST_TURNS,
            until=until,
            least=self.plan.least_turns,
            on_turn=lambda turn: self._say(f"turn {turn + 1} of up to {MOST_TURNS}"),
        )

    def _first_batches(self) -> None:
        """New processes for first batch and memory; ours without numba's cache too."""
        self._close_all()
        working = self._working()
        ours = [contender for contender in working if contender.name == OURS]
        for number in range(self.plan.first_batches):
            for cold, contender in [*product([True], ours), *product([False], working)]:
                wanted = cold or number + 1 < self.plan.first_batches  # each has been opened once
                late = self._elapsed() + self.starting[contender.name] > self.plan.seconds
                if not wanted or contender.kind == "limit" or late:
                    continue
                self._say(f"first batch of a new process: {contender.name}{' without JIT cache' if cold else ''}")
                try:
                    with tempfile.TemporaryDirectory() as cache:
                        environment = {"NUMBA_CACHE_DIR": cache} if cold else {}
                        with WorkerProcess(contender.name, environment) as process:
                            process.request("imports", START_TIMEOUT, contender=contender.name)
                            (self.cold if cold else self.opened[contender.name]).append(self._open(contender, process))
                except WorkerError as error:
                    self.failed[contender.name] = str(error)

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for contender in self.contenders:
            settings = {"batch_size": self.batch_size, **contender.settings}
            about = {"kind": contender.kind, **self.about}
            values = self.values.get(contender.name, [])
            if contender.name in self.failed or not values:
                why = self.failed.get(contender.name, "interrupted before its first turn")
                rows.append({"group": "loader", "name": contender.name, "settings": settings, "error": why, **about})
                rows[-1] |= self.origin
                continue
            opened = self.opened[contender.name]
            about |= {"output": [opened[0]["shape"], opened[0]["dtype"]]}
            more = dict(about)
            for key, other in (("over_plain", PLAIN), ("of_limit", contender.limit)):
                against = self.values.get(other, [])
                n = min(len(values), len(against))
                if n and other not in self.failed:
                    more[key] = ratios(values[:n], against[:n]).to_dict()
            rows.append(row("loader", contender.name, values, "images/s", self.origin, settings, **more))
            used = self.used[contender.name]
            rows.append(
                row("CPU time", contender.name, used, "seconds per million images", self.origin, settings, **about)
            )
            if contender.kind == "limit":
                continue
            for group in ("peak memory", "peak device memory"):
                key = group.replace(" ", "_")
                peaks = [answer[key] for answer in opened if answer.get(key) is not None]
                if peaks:
                    rows.append(row(group, contender.name, peaks, "bytes", self.origin, settings, **about))
            firsts = [
                (contender.name, opened, "warm"),
                (f"{contender.name}, cold", self.cold if contender.name == OURS else [], "cold"),
            ]
            for name, answers, cache in firsts:
                seconds = [answer["first_batch"] for answer in answers]
                if seconds:
                    about["compiled"] = [answer["compiled"] for answer in answers]
                    settings = settings | {"jit_cache": cache}
                    rows.append(row("first batch", name, seconds, "seconds", self.origin, settings, **about))
        return rows
