"""Watching a run: planted troubles are found in any loop, in constant memory.

Clock and system are simulated, so that each part takes exactly the seconds it says.
"""

import gc
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastmnist
from fastmnist.errors import ConfigError
from fastmnist.measure import watch as module
from fastmnist.measure.changes import compare
from fastmnist.measure.watched import Bin, Stall, Trend
from fastmnist.system import scheduling
from fastmnist.system.scheduling import ResourceUse

MEBI = 1 << 20


class System:
    """Time passes in `sleep`; in each second, the threads run and wait for so long, and memory grows by so much."""

    ran, waited, memory, growth, stopped = 0.9, 0.01, 400 * MEBI, 0, 0
    look_seconds = 1e-5

    def __init__(self):
        self.now, self.used = 0.0, ResourceUse()

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def thread_times(self):
        self.now += self.look_seconds
        here = os.getpid()
        return {(here, here): (int(1e9 * self.ran * self.now), int(1e9 * self.waited * self.now))}

    def limit_periods(self):
        return [(int(self.stopped * self.now / 0.1), int(self.now / 0.1))]

    def resources(self):
        return self.used

    def private_memory(self, threads):
        return self.memory + int(self.growth * self.now)


@pytest.fixture(autouse=True)
def system(monkeypatch):
    made = System()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=made.perf_counter, thread_time=made.perf_counter))
    for name in ("thread_times", "limit_periods", "resources"):
        monkeypatch.setattr(module, name, getattr(made, name))
    monkeypatch.setattr(module, "_private_memory", made.private_memory)
    monkeypatch.setattr(module, "available_memory", lambda: 1000 * MEBI)
    monkeypatch.setattr(scheduling, "cpu_count", lambda: 2)
    monkeypatch.setattr(scheduling, "physical_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return made


class Slow:
    """A loader of `count` numbers that takes seconds(number) for each."""

    def __init__(self, system, count, seconds):
        self.system, self.count, self.seconds = system, count, seconds

    def __len__(self):
        return self.count

    def __iter__(self):
        for number in range(self.count):
            self.system.sleep(self.seconds(number))
            yield number


def watched(system, count=2000, waiting=lambda number: 1e-4, computing=lambda number: 3e-3, epochs=1):
    watch = fastmnist.watch(Slow(system, count, waiting))
    for _ in range(epochs):
        for number in watch:
            system.sleep(computing(number))
    found = watch.report()
    plain = json.loads(json.dumps(watch.to_dict()))
    assert (plain["kind"], plain["verdict"]) == (found.kind, found.verdict)
    assert "\n" not in found.verdict
    assert not any(change.beyond_noise for change in compare(plain, plain).changes)
    assert sum(one["steps"] for one in plain["timeline"]) == found.steps - 1 == count * epochs - 1
    return found


def test_a_loop_that_waits(system):
    found = watched(system, waiting=lambda number: 0.3 if number == 0 else 1e-3)
    assert found.kind == "loader"
    assert found.waiting_share == pytest.approx(0.25, rel=0.01)
    assert found.step_seconds.median == pytest.approx(4e-3, rel=0.01)
    assert (found.first_batch_seconds, found.first_step_seconds) == pytest.approx((0.3, 3e-3))
    assert found.jitter == 1
    assert found.stalls.count == 0


def test_all_is_well(system):
    found = watched(system)
    assert found.kind == "model"
    assert found.waiting_share == pytest.approx(1 / 31, rel=0.01)
    assert found.watching < 0.005


@pytest.mark.parametrize("where", ["loader", "step"])
def test_stalls_at_even_distances(system, where):
    def planted(number):
        return 0.1 if number % 50 == 49 else 1e-3

    found = watched(system, **{"waiting" if where == "loader" else "computing": planted})
    assert found.kind == "stalls"
    assert found.stalls.every == 50
    assert set(found.stalls.causes) == {where}
    assert "50" in found.verdict
    assert where in found.verdict
    assert {stall.step % 50 for stall in found.stalls.worst} == {0}  # counted from 1
    assert 0.9 * 2000 / 50 <= found.stalls.count <= 2000 / 50
    assert found.stalls.seconds == pytest.approx(found.stalls.count * 0.099, rel=0.01)
    assert found.stalls.in_loader == pytest.approx(found.stalls.seconds if where == "loader" else 0, abs=0.01)


def test_a_mark_names_the_cause(system):
    watch = fastmnist.watch(range(2000))
    for number in watch:
        system.sleep(1e-3)
        if number % 4 == 0:
            watch.mark("logging")  # costs nothing
        if number % 400 == 399:
            watch.mark("checkpoint")
            system.sleep(0.2)
    causes = watch.report().stalls.causes
    assert causes == {"checkpoint": (pytest.approx(5, abs=1), pytest.approx(1.0, abs=0.21))}


def test_the_start_of_an_epoch(system):
    found = watched(system, 300, waiting=lambda number: 1e-4 if number else 0.5, epochs=6)
    assert found.epochs == 6
    assert found.stalls.causes == {"start of an epoch": (5, pytest.approx(2.5, rel=0.01))}


def stall(**facts):
    plain = {"seconds": 0.11, "waiting": 0.1, "excess": 0.1, "in_loader": True, "first_of_epoch": False, "marks": ()}
    use = ResourceUse(**{name: facts.pop(name) for name in list(facts) if name in ResourceUse._fields})
    return Stall(**{"step": 9, "epoch": 1, "collecting": 0.0, "stopped": False, "used": use} | plain | facts)


@pytest.mark.parametrize(
    ("facts", "cause"),
    [
        ({}, "loader"),
        ({"in_loader": False}, "step"),
        ({"in_loader": False, "marks": ("checkpoint",)}, "checkpoint"),
        ({"marks": ("checkpoint",)}, "loader"),  # the mark is of the step
        ({"first_of_epoch": True, "switches": 30}, "start of an epoch"),
        ({"stopped": True, "switches": 30}, "CPU limit"),
        ({"collecting": 0.08, "ran": 0.1}, "garbage collection"),
        ({"major_faults": 40}, "pages read from disk"),
        ({"major_faults": 1, "ran": 0.1}, "loader"),  # it computed
        ({"minor_faults": 30_000, "in_system": 0.07, "ran": 0.1}, "new memory"),
        ({"switches": 12, "ran": 0.01}, "other processes"),
        ({"switches": 12, "ran": 0.1}, "loader"),
        ({"switches": 1}, "loader"),
    ],
)
def test_causes(facts, cause):
    assert stall(**facts).cause == cause


def test_what_the_system_counted_is_of_the_stalled_step_alone(system):
    """Normal steps switch once a step; the stalled one does not at all, or thirty times."""
    watch = fastmnist.watch(range(3000))
    for number in watch:
        stalls = number % 500 == 499
        system.sleep(0.1 if stalls else 3e-3)
        switches = (0 if number < 1500 else 30) if stalls else 1
        system.used = system.used._replace(switches=system.used.switches + switches)
    assert {name: count for name, (count, _) in watch.report().stalls.causes.items()} == {
        "step": 3,
        "other processes": 3,
    }


def test_garbage_collection_is_timed(system):
    watch = fastmnist.watch(range(2000))

    def collect(phase, info):
        system.sleep(0.1 if phase == "stop" and info["generation"] == 2 else 0)

    gc.callbacks.insert(0, collect)  # before the watch's own
    gc.disable()
    try:
        for number in watch:
            system.sleep(1e-3)
            if number % 500 == 499:
                gc.collect()
    finally:
        gc.callbacks.remove(collect)
        gc.enable()
    assert watch.report().stalls.causes == {"garbage collection": (4, pytest.approx(0.4, rel=0.01))}


def test_memory_that_creeps(system):
    system.growth = 10 * MEBI
    found = watched(system, 4000)
    assert found.kind == "memory"
    assert found.memory.per_second == pytest.approx(10 * MEBI, rel=0.01)
    assert found.memory.low <= found.memory.per_second <= found.memory.high
    assert found.memory.full_in == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize(
    "memory",
    [
        lambda share: 400 + 400 * (share > 0.4),  # allocated once
        lambda share: 400 + 300 * min(share / 0.2, 1),  # a cache that fills at the beginning
        lambda share: 400 + 50 * np.sin(40 * share),
        lambda share: 4000 + 10 * share,  # too little
    ],
)
def test_memory_that_does_not_creep(memory):
    timeline = [Bin(1.0, 10, 1.0, 1.0, int(MEBI * memory(at / 100))) for at in range(100)]
    found = Trend.of(timeline, 1000 * MEBI)
    assert found is not None
    assert found.full_in is None


def test_a_starved_host(system):
    system.ran, system.waited = 0.6, 0.4
    found = watched(system)
    assert found.kind == "host"
    assert found.host.lost.median == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("since", [0.0, 1.0])
def test_a_cpu_limit(system, since):
    """It stops the process in half of its periods; without one at the first step, there are no periods to look at."""
    system.stopped, system.now = 0.5, since
    found = watched(system)
    assert found.kind == ("host" if since else "model")
    assert found.host.stopped == (pytest.approx(0.5, abs=0.1) if since else None)


def test_a_long_run_takes_no_more_memory(system, monkeypatch):
    monkeypatch.setattr(module, "MOST_BINS", 16)
    watch, sizes = fastmnist.watch(range(2_000_000)), []
    for number in watch:
        system.sleep(0.05 if number % 10 == 9 and number > 1000 else 1e-2)
        if number % 500 == 100:
            watch.mark(f"step {number}")
            system.sleep(0.5)
            sizes.append((len(watch._bins), len(watch._causes), len(watch._worst), len(watch._gaps)))
        if number == 40_000:
            break
    most = (16, module.MOST_CAUSES + 1, module.MOST_WORST, module.MOST_GAPS)
    assert all(size <= limit for size, limit in zip(np.max(sizes, axis=0), most, strict=True))
    timeline = watch.report().timeline
    assert sum(one.steps for one in timeline) == 40_000  # without the first
    assert sum(one.computing for one in timeline) == pytest.approx(sum(one.seconds for one in timeline), rel=0.01)


def test_batches_of_several_steps(system):
    watch = fastmnist.watch(())
    for number in watch.over(range(100), 8):
        system.sleep(0.5 if number == 80 else 0.04)
    found = watch.report()
    assert found.steps == 800
    assert found.quantiles["p50"] == pytest.approx(0.005, rel=0.02)
    assert found.stalls.count == 1


def test_any_loop(system, capsys):
    """Left early, with an error, over a loader of anything, with and without `with`."""
    before = list(gc.callbacks)
    with fastmnist.watch([1, 2, 3]) as watch:
        assert len(watch) == 3
        assert list(watch) == [1, 2, 3]
        for _ in watch:
            break
        for number in watch:
            if number == 2:
                with pytest.raises(ZeroDivisionError):
                    list(fastmnist.watch(1 // 0 for _ in range(1)))
    assert gc.callbacks == before
    lines = capsys.readouterr().out.splitlines()
    assert lines == [watch.verdict, *watch.lines()]
    assert watch.epochs == 3
    with fastmnist.watch([]) as empty:
        assert list(empty) == []
    assert not capsys.readouterr().out
    with pytest.raises(ConfigError, match="steps watched: 0"):
        empty.report()


class Event:
    """Of a queue that takes `busy` seconds for a step: reached when the queue has come to it."""

    def __init__(self, system):
        self.system, self.reached = system, max(system.now, system.queue)

    def query(self):
        return self.system.now >= self.reached

    def elapsed_time(self, other):
        return 1e3 * (other.reached - self.reached)


@pytest.mark.parametrize(("busy", "share"), [(0.004, 0.0), (0.001, 0.5)])
def test_a_gpu_waits_only_for_what_its_queue_does_not_hide(system, monkeypatch, busy, share):
    """The host takes 2 ms to load and is done with a step at once."""
    system.queue = 0.0
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(module, "_recorded", lambda: Event(system))
    monkeypatch.setattr(module, "origin", lambda device: {})

    def launch(number):
        system.queue = max(system.now, system.queue) + busy
        system.sleep(max(0.0, system.queue - system.now - 0.01))  # the queue takes some steps, then the host waits
        return 0.0

    found = watched(system, waiting=lambda number: 2e-3, computing=launch)
    assert found.device_waiting == pytest.approx(share, abs=0.02)
    assert found.kind == ("loader" if share else "model")


def test_files(system, tmp_path, monkeypatch):
    watch = fastmnist.watch(Slow(system, 1000, lambda number: 1e-3))
    for number in watch:
        system.sleep(0.08 if number % 100 == 99 else 1e-3)
    watch.save(tmp_path / "watch.json")
    watch.save(str(tmp_path / "watch.png"))
    content = json.loads((tmp_path / "watch.json").read_text())
    assert content["verdict"] == watch.verdict
    assert content["versions"]["torch"]
    assert (tmp_path / "watch.png").read_bytes().startswith(b"\x89PNG")
