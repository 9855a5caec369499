"""The doctor: planted troubles are found, its verdict follows from its evidence, and what it does not understand.

Its clock and what the system says of threads are simulated, so that a step takes exactly as long as it says.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError, DataError, FastmnistError
from fastmnist.loader.loader import Loader
from fastmnist.measure import doctor as module
from fastmnist.measure.batches import length_of, with_tensors
from fastmnist.measure.doctor import Diagnosis, Evidence, diagnose_training, doctor, judge
from fastmnist.measure.loops import training_setup
from fastmnist.system import machine, scheduling
from fastmnist.system import statistics as clock_module
from fastmnist.system.machine import physical_cores
from fastmnist.system.progress import Reporter
from fastmnist.system.scheduling import CoreUse, Host, core_use, thread_times
from fastmnist.system.statistics import Summary
from fastmnist.training.loop import Trainer

PAUSE = 0.03  # seconds of a step or a batch that takes some
INSTANT = 1e-5  # seconds of those that do not, and of a look at the clock
BATCH = 8
CORES = 2  # of the simulated system, and as many threads of torch


class Clock:
    """Seconds that pass when somebody sleeps; a little at each look, so that no measured time is zero."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += INSTANT
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class System:
    """What it says of threads: of each second, this process and its workers run and wait for so many."""

    ran, waited, workers = 0.9, 0.01, 0

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def thread_times(self) -> dict[tuple[int, int], tuple[int, int]]:
        here, nanoseconds = os.getpid(), 1e9 * self.clock.now
        times = int(self.ran * nanoseconds), int(self.waited * nanoseconds)
        return {(process, process): times for process in range(here, here + self.workers + 1)}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for timed in (module, clock_module):
        monkeypatch.setattr(timed, "time", SimpleNamespace(perf_counter=made.perf_counter))
    return made


@pytest.fixture(autouse=True)
def system(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> System:
    made = System(clock)
    monkeypatch.setattr(module, "thread_times", made.thread_times)
    monkeypatch.setattr(module, "limit_periods", list)
    for counts in ("cpu_count", "physical_cores"):
        monkeypatch.setattr(scheduling, counts, lambda: CORES)
    monkeypatch.setattr(torch, "get_num_threads", lambda: CORES)
    return made


@pytest.fixture
def light(clock: Clock) -> Callable[[Any], None]:
    """A step that costs next to nothing."""
    return lambda batch: clock.sleep(INSTANT)


@pytest.fixture
def pausing(clock: Clock) -> Callable[[Any], None]:
    """A step that takes a pause."""
    return lambda batch: clock.sleep(PAUSE)


def batches(count: int = 5, size: int = BATCH) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.full((size, 4), float(number)), torch.arange(size)) for number in range(count)]


class Slow:
    """Yields batches after a pause each."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __iter__(self) -> Iterator[Any]:
        for batch in batches():
            self.clock.sleep(PAUSE)
            yield batch


def check(found: Diagnosis) -> None:
    """What holds for every diagnosis."""
    evidence, text = found.evidence, json.loads(json.dumps(found.to_dict()))
    assert text["kind"] == found.kind
    assert text["evidence"]["step_seconds"]["n"] == evidence.turns >= module.LEAST_TURNS
    assert sum(evidence.shares.values()) == pytest.approx(1)
    assert all(0 <= share <= 1 for share in evidence.shares.values())
    assert found.verdict.endswith(".")
    assert "\n" not in found.verdict
    assert all(line.endswith(".") for line in found.lines())


# Planted troubles.


def test_a_slow_loader(clock: Clock, light: Callable[[Any], None]) -> None:
    found = doctor(Slow(clock), light, seconds=1, device="cpu")
    check(found)
    assert found.kind == "loader", found
    assert found.evidence.waiting > 0.7
    assert found.evidence.next_seconds.median > 0.7 * PAUSE
    assert found.evidence.loader_seconds.median > 0.7 * PAUSE
    assert "try fastmnist tune" in found.verdict


def test_a_slow_model(pausing: Callable[[Any], None]) -> None:
    found = doctor(batches(), pausing, seconds=1, device="cpu")
    check(found)
    assert found.kind == "model", found
    assert found.evidence.waiting < 0.3
    assert found.evidence.headroom.median > 10
    assert found.evidence.batch_images == BATCH
    rates = found.evidence.images_per_second
    assert rates is not None
    assert rates["loader"] > rates["real"] > 0.2 * BATCH / PAUSE


def test_a_slow_loader_and_a_slow_model_share_the_step(clock: Clock, pausing: Callable[[Any], None]) -> None:
    found = doctor(Slow(clock), pausing, seconds=1.5, device="cpu")
    assert found.kind == "loader", found
    assert 0.3 < found.evidence.waiting < 0.7
    assert 1.4 < found.evidence.gain.median < 3


class Ahead:
    """Batches that two workers load in so many seconds each, up to four of them ahead."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def __iter__(self) -> Iterator[Any]:
        asked, free = [self.clock.now] * 4, [self.clock.now] * 2
        for batch in batches(50):
            free.sort()
            free[0] = max(free[0], asked.pop(0)) + self.seconds
            self.clock.now = max(self.clock.now, free[0])
            asked.append(self.clock.now)
            yield batch


def test_workers_that_load_ahead(clock: Clock, system: System) -> None:
    """Neither are the batches free that were loaded during another block, nor does loading cost that a step hides."""
    system.workers = 2
    slow = doctor(Ahead(clock, 0.08), lambda batch: clock.sleep(0.005), seconds=2, device="cpu")
    assert slow.kind == "loader", slow  # a batch every 40 ms
    assert slow.evidence.waiting > 0.6
    assert slow.evidence.host.use.workers == 2
    hidden = doctor(Ahead(clock, 0.016), lambda batch: clock.sleep(0.08), seconds=2, device="cpu")
    assert hidden.kind == "model", hidden  # a batch every 8 ms
    assert hidden.evidence.waiting < 0.3


def test_a_host_whose_core_others_take(system: System, pausing: Callable[[Any], None]) -> None:
    system.ran, system.waited = 0.34, 0.66
    found = doctor(batches(), pausing, seconds=1, device="cpu")
    check(found)
    assert found.kind == "host", found
    assert "stop what else runs" in found.verdict
    assert found.evidence.host.lost.median == pytest.approx(0.66, abs=0.01)


def test_a_host_with_more_threads_than_cores(
    system: System, pausing: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    system.ran, system.waited = 1.0, 3.0
    monkeypatch.setattr(scheduling, "cpu_count", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    found = doctor(batches(), pausing, seconds=1, device="cpu")
    assert found.kind == "host", found
    assert "say torch.set_num_threads(1) instead of 4" in found.verdict
    assert found.evidence.host.threads == 4
    assert found.evidence.host.cores == 1


class Device:
    """Stands in for a GPU: copies to it, or out of the loader's pinned memory, take so long."""

    def __init__(self, patch: pytest.MonkeyPatch, clock: Clock, pause: float) -> None:
        device = torch.device("cuda")

        class Tensor(torch.Tensor):
            is_cuda = True
            device = torch.device("cuda")

            def cpu(self) -> torch.Tensor:
                return self.as_subclass(torch.Tensor)

        def to(tensor: torch.Tensor, to: torch.device, non_blocking: bool = False) -> torch.Tensor:
            if to == device and not isinstance(tensor, Tensor):
                clock.sleep(pause)
                return tensor.as_subclass(Tensor)
            return tensor

        patch.setattr(module, "choose_device", lambda asked: device)
        patch.setattr(torch.cuda, "synchronize", lambda device: None)
        patch.setattr(torch.Tensor, "to", to)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        self.device, self.there = device, Tensor


def test_a_slow_copy_by_the_step(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    with monkeypatch.context() as patch:
        gpu = Device(patch, clock, PAUSE)

        def step(batch: Any) -> None:
            batch[0].to(gpu.device)
            clock.sleep(PAUSE)

        found = doctor(batches(), step, seconds=2)
    check(found)
    assert found.kind == "copy", found
    assert 0.3 < found.evidence.shares["copying"] < 0.7
    assert found.evidence.copied_by == "step"


@pytest.mark.parametrize(("copying", "kind"), [(0.6, "copy"), (0.02, "loader")])
def test_a_slow_copy_by_the_loader(
    monkeypatch: pytest.MonkeyPatch, copying: float, kind: str, clock: Clock, light: Callable[[Any], None]
) -> None:
    with monkeypatch.context() as patch:
        gpu = Device(patch, clock, copying * PAUSE / 2)  # images and labels
        loader = [tuple(tensor.as_subclass(gpu.there) for tensor in batch) for batch in batches()]

        class Copying:
            def __iter__(self) -> Iterator[Any]:
                for batch in loader:
                    clock.sleep(PAUSE)
                    yield batch

        found = doctor(Copying(), light, seconds=1)
    check(found)
    assert found.kind == kind, found
    assert found.evidence.copied_by == "loader"
    assert found.evidence.shares["copying"] > 0.3 if kind == "copy" else found.evidence.shares["copying"] < 0.3


def test_a_step_that_takes_no_batch_on_the_device(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    with monkeypatch.context() as patch:
        gpu = Device(patch, clock, 0.0)

        def step(batch: Any) -> None:
            if isinstance(batch[0], gpu.there):
                raise TypeError("a batch of the host, please")
            clock.sleep(PAUSE)

        found = doctor(batches(), step, seconds=1)
    assert found.kind == "model"
    assert found.evidence.copy_seconds is None
    assert "a batch of the host, please" in found.evidence.notes[0]
    assert found.evidence.notes[0] in found.lines()


@pytest.mark.gpu
def test_a_slow_copy_to_a_gpu() -> None:
    host = [(torch.rand(64, 3, 512, 512), torch.arange(64)) for _ in range(3)]  # 200 MB of pageable memory

    def step(batch: Any) -> None:
        images, _ = (tensor.to("cuda") for tensor in batch)
        images.mean()

    found = doctor(host, step, seconds=3)
    check(found)
    assert found.kind == "copy", found
    assert found.evidence.copied_by == "step"


@pytest.mark.gpu
def test_a_model_on_a_gpu_is_the_limit() -> None:
    weights = torch.rand(4096, 4096, device="cuda")
    loader = [(torch.rand(64, 1, 28, 28, device="cuda"), torch.arange(64, device="cuda")) for _ in range(3)]

    def step(batch: Any) -> None:
        for _ in range(30):
            weights @ weights

    found = doctor(loader, step, seconds=3)
    check(found)
    assert found.kind == "model", found
    assert found.evidence.copied_by == "loader"
    assert found.evidence.queued_steps is not None


# The verdict follows from the evidence.


def summary(median: float, spread: float = 0.0, n: int = 9) -> Summary:
    return Summary(n, median, median - spread, median + spread, median - spread, median + spread)


GOOD_HOST = Host(summary(0.01), CoreUse(1.0, 0.9, 0.01), None, 8, 8, 8, 8)


def evidence(
    gain: float = 1.0,
    headroom: float = 310.0,
    spread: float = 0.001,
    copying: float = 0.0,
    copied_by: Any = None,
    device: str = "cpu",
    queued: float | None = None,
    lost: float = 0.0,
    **host: Any,
) -> Evidence:
    """Of real steps that take a second; `copying` is its share of them."""
    of_host = {"lost": summary(lost), "use": CoreUse(1.0, 2.0 * (1 - lost), 2.0 * lost)} if lost else {}
    return Evidence(
        device=device,
        turns=9,
        steps=90,
        batch_images=64,
        first_batch_seconds=0.1,
        step_seconds=summary(1.0),
        fixed_step_seconds=summary(1 / gain),
        loader_seconds=summary(1 / headroom),
        next_seconds=summary(0.0),
        gain=summary(gain, spread),
        headroom=summary(headroom),
        copy_seconds=summary(copying) if copied_by else None,
        copied_by=copied_by,
        images_per_second=None,
        queued_steps=queued,
        host=replace(GOOD_HOST, **(of_host | host)),
    )


@pytest.mark.parametrize(
    ("found", "kind", "words"),
    [
        (evidence(gain=2.6), "loader", "waits for data in 62 % of each step: a faster loader could train 2.6 times"),
        (evidence(gain=1.003), "model", "would gain 0.4 % at most, and this one could feed a model 310 times as fast"),
        (evidence(gain=1.2, spread=0.3), "model", "about 20 % (50 % at most: this machine is noisy"),
        (evidence(headroom=0.98), "model", "feed a model no faster than this one"),
        (evidence(cores=8, machine_cores=32), "model", "; 8 of the machine's 32 cores may be used"),
        (evidence(copying=0.5, copied_by="step", device="cuda"), "copy", "takes 50 % of each step"),
        (evidence(copying=0.5, copied_by="step", device="cuda"), "copy", "could train 2.0 times as fast"),
        (evidence(gain=2.0, copying=0.2, copied_by="step", device="cuda"), "loader", "in 50 %"),
        (evidence(gain=2.0, copying=0.4, copied_by="loader", device="cuda"), "copy", "takes 40 %"),
        (evidence(gain=2.0, copying=0.1, copied_by="loader", device="cuda"), "loader", "in 50 %"),
        (evidence(gain=1.0, copying=0.4, copied_by="loader", device="cuda"), "model", "is the limit"),  # hidden
        (evidence(lost=0.5, cores=2, threads=2), "host", "want 2.0 cores and get 1.0 of 2: stop what else runs"),
        (
            evidence(lost=0.5, cores=1, threads=4, use=CoreUse(1, 0.5, 0.5)),
            "host",
            "get 0.5 of 1: say torch.set_num_threads(1) instead of 4, and stop",
        ),
        (evidence(lost=0.5, cores=1, threads=1), "host", "use fewer threads"),
        (evidence(lost=0.5, cores=1, threads=1, use=CoreUse(1, 0.5, 0.5, 4, 0.5, 0.5)), "host", "processes than 4"),
        (evidence(lost=0.5, gain=1.6), "host", "(besides, the model waits for data in 38 %"),  # it slows both
        (evidence(lost=0.3, gain=10.0), "loader", "90 %"),  # what is lost does not explain it
        (evidence(lost=0.1), "model", "is the limit"),
        (evidence(lost=0.5, device="cuda", queued=2.0), "model", "is the limit"),  # the GPU was never idle
        (evidence(lost=0.5, device="cuda", queued=0.0), "host", "Threads wait"),
        (evidence(stopped=0.8), "host", "CPU limit stopped this process in 80 %"),
        (evidence(stopped=0.01), "model", "is the limit"),
        (evidence(threads=1, physical_cores=8), "host", "with 1 thread where 8 cores may be used"),
        (evidence(threads=1, physical_cores=8, device="cuda"), "model", "is the limit"),
        (evidence(threads=1, physical_cores=8, use=CoreUse(1, 0.1, 0)), "model", "is the limit"),  # it does not compute
        (evidence(threads=1, physical_cores=8, lost=None, use=None), "model", "is the limit"),
    ],
)
def test_verdicts(found: Evidence, kind: str, words: str) -> None:
    assert judge(found)[0] == kind
    assert words in judge(found)[1]


shares = st.floats(0, 0.99)


@given(
    waiting=shares, copying=shares, by=st.sampled_from([None, "step", "loader"]), lost=shares, queued=st.floats(0, 3)
)
def test_every_verdict_has_its_reason(waiting: float, copying: float, by: Any, lost: float, queued: float) -> None:
    found = evidence(
        1 / (1 - waiting), copying=copying, copied_by=by, device="cuda", lost=lost, queued=queued, stopped=None
    )
    check(Diagnosis(*judge(found), found))
    kind = judge(found)[0]
    assert (kind != "loader") or waiting >= module.WAITING_LEAST * 0.999
    assert (kind != "copy") or found.shares["copying"] >= module.COPYING_LEAST
    assert (kind != "host") or (lost >= scheduling.LOST_LEAST and queued < module.QUEUED_LEAST)
    assert (kind != "model") or waiting < module.WAITING_LEAST * 1.01
    if kind == "host":  # the more is lost, the more it is the host
        worse = replace(found.host, lost=summary(min(1.0, lost * 1.1)))
        assert judge(replace(found, host=worse))[0] == "host"


def test_noise_is_no_gain() -> None:
    assert judge(evidence(gain=1.3, spread=0.31))[0] == "model"
    assert judge(evidence(gain=1.3, spread=0.29))[0] == "loader"


# What a loader may yield.


Pair = namedtuple("Pair", "images labels")


@pytest.mark.parametrize(
    ("make", "length"),
    [
        (lambda images, labels: images, 8),
        (lambda images, labels: [images, labels], 8),
        (Pair, 8),
        (lambda images, labels: OrderedDict(images=images, more={"labels": labels}, name="x"), 8),
        (lambda images, labels: (images, labels.sum()), 0),
        (lambda images, labels: ("no tensor", 3), 0),
        (lambda images, labels: None, 0),
    ],
)
def test_any_structure_of_tensors(make: Callable[..., Any], length: int, pausing: Callable[[Any], None]) -> None:
    batch = make(*batches(1)[0])
    kept = with_tensors(batch, torch.clone)
    assert type(kept) is type(batch)
    assert str(kept) == str(batch)
    assert length_of(batch) == length
    found = doctor([batch], pausing, seconds=0.5, device="cpu")
    check(found)
    assert found.kind == "model"
    assert found.evidence.batch_images == (length or None)
    assert (found.evidence.images_per_second is None) == (length == 0)


def test_the_fixed_batch_is_a_copy(clock: Clock) -> None:
    """A loader may use its memory again: what the fixed step gets stays what the first batch was."""
    seen: list[float] = []

    class Reusing:
        memory = torch.zeros(BATCH, 4)

        def __iter__(self) -> Iterator[torch.Tensor]:
            for number in range(1, 6):
                yield self.memory.fill_(number)

    def step(batch: torch.Tensor) -> None:
        if batch is not Reusing.memory:
            seen.append(batch[0, 0].item())
        clock.sleep(0.003)

    doctor(Reusing(), step, seconds=0.5, device="cpu")
    assert set(seen) == {1.0}


def test_a_partial_batch_counts_as_a_part(clock: Clock) -> None:
    loader = [*batches(2), (torch.zeros(1, 4), torch.zeros(1))]

    def step(batch: Any) -> None:
        clock.sleep(len(batch[0]) * PAUSE / BATCH)

    found = doctor(loader, step, seconds=1.5, device="cpu")
    assert found.kind == "model", found
    assert 0.8 < found.evidence.gain.median < 1.2


@pytest.mark.parametrize("device", ["cpu", None])
def test_our_loader(tmp_path, write_small_beton, device: str | None, pausing: Callable[[Any], None]) -> None:
    write_small_beton(tmp_path / "a.beton", 40)
    with Loader(tmp_path / "a.beton", BATCH, device=device) as loader:
        found = doctor(loader, pausing, seconds=0.5)
        check(found)
        assert found.kind == "model"
        assert torch.device(found.evidence.device).type == loader.device.type
        assert len(list(loader)) == 5


def test_a_dataloader(pausing: Callable[[Any], None]) -> None:
    images, labels = torch.zeros(40, 4), torch.arange(40)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), BATCH, shuffle=True)
    found = doctor(loader, pausing, seconds=0.5, device="cpu")
    check(found)
    assert found.kind == "model"
    assert found.evidence.batch_images == BATCH


# What it refuses, and what it lets through.


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf])
def test_seconds_that_cannot_be(seconds: float, light: Callable[[Any], None]) -> None:
    with pytest.raises(ConfigError, match=r"seconds .* must be more than 0"):
        doctor(batches(), light, seconds=seconds)


def test_too_few_seconds(pausing: Callable[[Any], None]) -> None:
    with pytest.raises(ConfigError, match=r"seconds 0.01 are too few for a step of 0.03\d* s; give at least 1"):
        doctor(batches(), pausing, seconds=0.01, device="cpu")


def test_a_device_that_is_not_there(light: Callable[[Any], None]) -> None:
    with pytest.raises(ConfigError, match="gpu"):
        doctor(batches(), light, device="gpu")


@pytest.mark.parametrize("empty", [[], iter(())])
def test_nothing_to_load(empty: Any, light: Callable[[Any], None]) -> None:
    with pytest.raises(DataError, match=f"the {type(empty).__name__} yields no batch; is it used up"):
        doctor(empty, light)


def test_a_generator_ends(light: Callable[[Any], None]) -> None:
    with pytest.raises(DataError, match="the generator yields no batch the second time; give a loader"):
        doctor((batch for batch in batches()), light, device="cpu")


@pytest.mark.parametrize("at", [1, 7, 30])
@pytest.mark.parametrize("where", ["loader", "step"])
def test_an_error_passes_through(at: int, where: str) -> None:
    calls = {"loader": 0, "step": 0}

    def call(name: str) -> None:
        calls[name] += 1
        if name == where and calls[name] == at:
            raise KeyError("mine")

    class Failing:
        def __iter__(self) -> Iterator[Any]:
            for batch in batches():
                call("loader")
                yield batch

    with pytest.raises(KeyError, match="mine"):
        doctor(Failing(), lambda batch: call("step"), seconds=1, device="cpu")


# How long threads wait for cores.


needs_scheduling = pytest.mark.skipif(thread_times() is None, reason="this system counts no waits for cores")


@needs_scheduling
def test_a_busy_thread_is_counted() -> None:
    before, ran = thread_times(), time.thread_time()
    while time.thread_time() - ran < 0.1:
        pass
    use = core_use(before, thread_times(), 1.0)
    assert use.ran > 0.05
    assert use.cores_wanted >= use.cores_got > 0


@needs_scheduling
def test_a_child_is_counted_apart() -> None:
    before, use = thread_times(), CoreUse(1.0, 0.0, 0.0)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        try:
            until = time.monotonic() + 60
            while use.workers_ran + use.workers_waited < 0.1 and time.monotonic() < until:
                use = core_use(before, thread_times(), 1.0)
        finally:
            child.kill()
    assert use.workers >= 1
    assert use.workers_ran + use.workers_waited >= 0.1


def test_a_system_that_does_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path, pausing: Callable[[Any], None]
) -> None:
    monkeypatch.setattr(scheduling, "PROCESSES", tmp_path)
    assert thread_times() is None
    folder = tmp_path / str(os.getpid()) / "task" / str(os.getpid())
    folder.mkdir(parents=True)
    (folder / "schedstat").write_text("0 0 0\n")
    assert thread_times() is None
    monkeypatch.setattr(module, "thread_times", thread_times)
    found = doctor(batches(), pausing, seconds=0.5, device="cpu")
    check(found)
    assert found.kind == "model"
    assert found.evidence.host.lost is None
    assert any("does not count how long threads wait" in line for line in found.lines())


amounts = st.floats(0, 8)


@given(amounts, amounts, amounts, amounts, st.floats(0, 1))
def test_what_waiting_costs(
    ran: float, waited: float, workers_ran: float, workers_waited: float, waiting: float
) -> None:
    use = CoreUse(1.0, ran, waited, 2, workers_ran, workers_waited)
    assert 0 <= use.lost(waiting) <= 1
    assert use.lost(0.0) == pytest.approx(waited / max(1.0, ran + waited))
    assert use.lost(waiting) <= max(use.lost(0.0), waiting)
    assert use.cores_wanted >= use.cores_got
    twice = use + use
    assert twice.lost(waiting) == pytest.approx(use.lost(waiting))
    assert twice.cores_wanted == pytest.approx(use.cores_wanted)


def test_a_new_thread_counts_in_full_and_an_old_one_by_its_difference() -> None:
    here = os.getpid()
    before = {(here, 1): (10**9, 10**9)}
    after = {(here, 1): (2 * 10**9, 10**9), (here, 2): (10**9, 3 * 10**9), (here + 1, 5): (0, 10**9)}
    assert core_use(before, after, 2.0) == CoreUse(2.0, 2.0, 3.0, 1, 0.0, 1.0)


@pytest.mark.parametrize(
    ("line", "place"), [("0::/a/b", "a/b"), ("0::/", ""), ("4:cpu,cpuacct:/x", "cpu/x"), ("3:memory:/x", None)]
)
def test_a_cpu_limit(monkeypatch: pytest.MonkeyPatch, tmp_path, line: str, place: str | None) -> None:
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(machine, "GROUPS_OF_THIS_PROCESS", tmp_path / "groups")
    assert machine.limit_periods() == []
    (tmp_path / "groups").write_text(line + "\n")
    folder = tmp_path / (place or "")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.stat").write_text("usage_usec 1\nnr_periods 10\nnr_throttled 4\nthrottled_usec 5\n")
    if place is None:
        assert machine.limit_periods() == []
        return
    before = machine.limit_periods()
    assert before == [(4, 10)]
    assert scheduling.stopped_share(before, before) is None
    assert scheduling.stopped_share(before, [(7, 20)]) == pytest.approx(0.3)


def test_cores() -> None:
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)


# A run's own loop.


def small_run(tmp_path, **settings: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "dataset": "digits",
            "model": "small-cnn",
            "batch_size": 32,
            "device": "cpu",
            "cache_dir": str(tmp_path / "cache"),
            "quiet": True,
        }
        | settings
    )


def test_diagnosing_a_run_leaves_no_folder(tmp_path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Trainer.train_step

    def train_step(*arguments: Any) -> Any:
        clock.sleep(0.2)
        return real(*arguments)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.chdir(tmp_path)
    found = diagnose_training(small_run(tmp_path), 2.0, Reporter(quiet=True))
    check(found)
    assert found.evidence.batch_images == 32
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("augment", [True, False])
def test_the_step_of_a_run_takes_any_loaders_batches(tmp_path, augment: bool) -> None:
    config = small_run(tmp_path, augment=augment, val_size=1300, epochs=1)
    with training_setup(config, Reporter(quiet=True)) as setup:
        assert setup.device == torch.device("cpu")
        assert setup.config.learning_rate == 0.1
        assert len(setup.indices) == len(setup.files.train) - 1300 == 137
        for dtype in (torch.uint8, torch.float32):
            with Loader(setup.files.train, 32, dtype=dtype, device="cpu", indices=setup.indices) as loader:
                for batch in loader:  # more than the run has steps, and a partial one
                    setup.step(batch)
        files, loaders = setup.files, setup.loaders
        assert len(loaders.train) == 4
    assert files.train.closed
    with pytest.raises(RuntimeError, match="is closed"):
        iter(loaders.train)


def test_the_step_of_a_run_trains(tmp_path) -> None:
    losses = []

    def keep(logits: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        losses.append(real(logits, labels, **options))
        return losses[-1]

    real = torch.nn.functional.cross_entropy
    with (
        training_setup(small_run(tmp_path, augment=False), Reporter(quiet=True)) as setup,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(torch.nn.functional, "cross_entropy", keep)
        batch = next(iter(setup.loaders.train))
        for _ in range(15):
            setup.step(batch)
    assert losses[-1] < 0.95 * losses[0]


def test_a_run_that_cannot_be(tmp_path) -> None:
    with (
        pytest.raises(ConfigError, match="records a CUDA graph"),
        training_setup(small_run(tmp_path, compile="graph"), Reporter(quiet=True)),
    ):
        pass


@pytest.mark.parametrize("works", [True, False])
def test_compiling_when_asked(tmp_path, monkeypatch: pytest.MonkeyPatch, works: bool) -> None:
    calls = []

    def compile(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        def compiled(*arguments: Any) -> Any:
            calls.append("default")
            if not works:
                raise RuntimeError("no compiler\nat all")
            return function(*arguments)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    with ExitStack() as leaving:
        if not works:
            leaving.enter_context(
                pytest.raises(FastmnistError, match=r"--compile default .*: RuntimeError: no compiler;")
            )
        config = small_run(tmp_path, compile="default")
        setup = leaving.enter_context(training_setup(config, Reporter(quiet=True)))
        setup.step(next(iter(setup.loaders.train)))
    assert calls == ["default"] * (2 if works else 1)


def test_a_batch_that_does_not_fit(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train_step(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("of the GPU")

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with (
        pytest.raises(ConfigError, match="--batch-size 32 does not fit into the memory of cpu"),
        training_setup(small_run(tmp_path), Reporter(quiet=True)) as setup,
    ):
        setup.step(next(iter(setup.loaders.train)))
