"""The doctor: planted troubles are found, and its verdict follows from its evidence.

Its clock and the system's thread times are simulated, so that a step takes exactly the seconds it says.
"""

import json
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError
from fastmnist.loader.loader import Loader
from fastmnist.measure import batches as batches_module
from fastmnist.measure import doctor as module
from fastmnist.measure import step as step_module
from fastmnist.measure.changes import compare
from fastmnist.measure.diagnosis import COPYING_LEAST, QUEUED_LEAST, WAITING_LEAST, Diagnosis, Evidence, judge
from fastmnist.measure.doctor import diagnose_training, doctor
from fastmnist.system import scheduling, statistics
from fastmnist.system.progress import Reporter
from fastmnist.system.scheduling import CoreUse, Host, thread_times
from fastmnist.system.statistics import Summary
from fastmnist.training.loop import Trainer

PAUSE = 0.03  # seconds of a slow step or batch
INSTANT = 1e-5  # seconds of a fast one, and of a look at the clock
BATCH = 8
CORES = 2  # of the simulated system; as many threads of torch


class Clock:
    """Time passes in `sleep`, and a little at each look, so that no measured time is zero."""

    now = 0.0

    def perf_counter(self):
        self.now += INSTANT
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def step(self, seconds=PAUSE):
        """A training step that takes so long."""
        return lambda batch: self.sleep(seconds)


class System:
    """Thread times: in each second, this process and its workers run and wait for so many seconds."""

    ran, waited, workers = 0.9, 0.01, 0

    def __init__(self, clock):
        self.clock = clock

    def thread_times(self):
        here, nanoseconds = os.getpid(), 1e9 * self.clock.now
        times = int(self.ran * nanoseconds), int(self.waited * nanoseconds)
        return {(process, process): times for process in range(here, here + self.workers + 1)}


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    for timed in (module, batches_module, step_module, statistics):
        monkeypatch.setattr(timed, "time", SimpleNamespace(perf_counter=made.perf_counter))
    return made


@pytest.fixture(autouse=True)
def system(clock, monkeypatch):
    made = System(clock)
    monkeypatch.setattr(module, "thread_times", made.thread_times)
    monkeypatch.setattr(module, "limit_periods", list)
    monkeypatch.setattr(module, "TINY", 0)  # most steps below take as long for any batch
    for counts in ("cpu_count", "physical_cores"):
        monkeypatch.setattr(scheduling, counts, lambda: CORES)
    monkeypatch.setattr(torch, "get_num_threads", lambda: CORES)
    return made


def batches(count=5, size=BATCH):
    return [(torch.full((size, 4), float(number)), torch.arange(size)) for number in range(count)]


class Slow:
    """A loader that takes a pause per batch."""

    def __init__(self, clock, loaded=None):
        self.clock, self.loaded = clock, loaded or batches()

    def __iter__(self):
        for batch in self.loaded:
            self.clock.sleep(PAUSE)
            yield batch


def check(found):
    """Invariants of every diagnosis."""
    evidence, plain = found.evidence, json.loads(json.dumps(found.to_dict()))
    assert plain["kind"] == found.kind
    assert plain["evidence"]["step_seconds"]["n"] == evidence.turns >= module.LEAST_TURNS
    assert sum(evidence.shares.values()) == pytest.approx(1)
    assert all(0 <= share <= 1 for share in evidence.shares.values())
    assert "\n" not in found.verdict
    assert all(note in found.lines() for note in evidence.notes)
    assert not any(change.beyond_noise for change in compare(plain, plain).changes)
    return found


# Planted troubles.


def test_a_slow_loader(clock):
    found = check(doctor(Slow(clock), clock.step(INSTANT), seconds=1, device="cpu"))
    assert found.kind == "loader"
    assert found.evidence.waiting > 0.7
    assert found.evidence.next_seconds.median > 0.7 * PAUSE
    assert found.evidence.loader_seconds.median > 0.7 * PAUSE
    assert "fastmnist.tune_loader" in found.verdict


def test_a_slow_model(clock):
    found = check(doctor(batches(), clock.step(), seconds=1, device="cpu"))
    assert found.kind == "model"
    assert found.evidence.waiting < 0.3
    assert found.evidence.headroom.median > 10
    assert found.evidence.batch_images == BATCH
    rates = found.evidence.images_per_second
    assert rates["loader"] > rates["real"] > 0.2 * BATCH / PAUSE
    of_pair = doctor(batches(), lambda images, labels: clock.sleep(PAUSE), seconds=1, device="cpu")
    assert of_pair.kind == "model"
    assert of_pair.evidence.gain.median == pytest.approx(found.evidence.gain.median, rel=0.01)


@pytest.mark.parametrize(
    ("size", "fixed", "kind"), [(8, 1.0, "batch"), (64, 0.95, "batch"), (8, 0.0, "model"), (128, 1.0, "model")]
)
def test_a_batch_that_is_too_small(clock, monkeypatch, size, fixed, kind):
    """`fixed` is the share of a step that does not depend on its images."""
    monkeypatch.setattr(module, "TINY", 64)
    found = check(
        doctor(
            batches(size=size),
            lambda batch: clock.sleep(PAUSE * (fixed + (1 - fixed) * len(batch[0]) / size)),
            seconds=2,
            device="cpu",
        )
    )
    assert found.kind == kind
    if kind == "batch":
        assert found.evidence.half_batch.median == pytest.approx((1 + fixed) / 2, abs=0.01)
        assert str(size) in found.verdict


def test_a_step_that_takes_no_half_of_a_batch(clock, monkeypatch):
    monkeypatch.setattr(module, "TINY", 64)

    def step(images, labels):
        assert len(images) == BATCH, "of eight, please"
        clock.sleep(PAUSE)

    found = check(doctor(batches(), step, seconds=1, device="cpu"))
    assert found.kind == "model"
    assert "of eight, please" in found.evidence.notes[0]


def test_a_slow_loader_and_a_slow_model_share_the_step(clock):
    found = doctor(Slow(clock), clock.step(), seconds=1.5, device="cpu")
    assert found.kind == "loader"
    assert 0.3 < found.evidence.waiting < 0.7
    assert 1.4 < found.evidence.gain.median < 3


class Ahead:
    """Two workers that take so many seconds per batch, and load up to four batches ahead."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def __iter__(self):
        asked, free = [self.clock.now] * 4, [self.clock.now] * 2
        for batch in batches(50):
            free.sort()
            free[0] = max(free[0], asked.pop(0)) + self.seconds
            self.clock.now = max(self.clock.now, free[0])
            asked.append(self.clock.now)
            yield batch


def test_workers_that_load_ahead(clock, system):
    """Batches loaded during another block are not free, and loading that a step hides costs nothing."""
    system.workers = 2
    slow = doctor(Ahead(clock, 0.08), clock.step(0.005), seconds=2, device="cpu")
    assert slow.kind == "loader"  # a batch every 40 ms
    assert slow.evidence.waiting > 0.6
    assert slow.evidence.host.use.workers == 2
    hidden = doctor(Ahead(clock, 0.016), clock.step(0.08), seconds=2, device="cpu")
    assert hidden.kind == "model"  # a batch every 8 ms
    assert hidden.evidence.waiting < 0.3


def test_a_host_whose_cores_others_take(system, clock):
    system.ran, system.waited = 0.34, 0.66
    found = check(doctor(batches(), clock.step(), seconds=1, device="cpu"))
    assert found.kind == "host"
    assert found.evidence.host.lost.median == pytest.approx(0.66, abs=0.01)


def test_a_host_with_more_threads_than_cores(system, clock, monkeypatch):
    system.ran, system.waited = 1.0, 3.0
    monkeypatch.setattr(scheduling, "cpu_count", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    found = doctor(batches(), clock.step(), seconds=1, device="cpu")
    assert found.kind == "host"
    assert "torch.set_num_threads(1)" in found.verdict
    assert (found.evidence.host.threads, found.evidence.host.cores) == (4, 1)


def test_a_system_that_does_not_count(clock, monkeypatch, tmp_path):
    monkeypatch.setattr(scheduling, "PROCESSES", tmp_path)
    monkeypatch.setattr(module, "thread_times", thread_times)
    found = check(doctor(batches(), clock.step(), seconds=0.5, device="cpu"))
    assert found.kind == "model"
    assert found.evidence.host.lost is None


class Device:
    """A stand-in for a GPU: copies to it, or out of the loader's pinned memory, take so long."""

    def __init__(self, patch, clock, pause):
        device = torch.device("cuda")

        class Tensor(torch.Tensor):
            is_cuda = True
            device = torch.device("cuda")

            def cpu(self):
                return self.as_subclass(torch.Tensor)

        def to(tensor, to, non_blocking=False):
            if to == device and not isinstance(tensor, Tensor):
                clock.sleep(pause)
                return tensor.as_subclass(Tensor)
            return tensor

        patch.setattr(module, "choose_device", lambda asked: device)
        patch.setattr(torch.cuda, "synchronize", lambda device: None)
        patch.setattr(torch.Tensor, "to", to)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        self.device, self.there = device, Tensor


def test_a_slow_copy_by_the_step(monkeypatch, clock):
    with monkeypatch.context() as patch:
        gpu = Device(patch, clock, PAUSE)

        def step(batch):
            batch[0].to(gpu.device)
            clock.sleep(PAUSE)

        found = doctor(batches(), step, seconds=2)
    check(found)
    assert found.kind == "copy"
    assert found.evidence.copied_by == "step"
    assert 0.3 < found.evidence.shares["copying"] < 0.7


@pytest.mark.parametrize(("copying", "kind"), [(0.6, "copy"), (0.02, "loader")])
def test_a_slow_copy_by_the_loader(monkeypatch, copying, kind, clock):
    with monkeypatch.context() as patch:
        gpu = Device(patch, clock, copying * PAUSE / 2)  # images and labels
        loaded = [tuple(tensor.as_subclass(gpu.there) for tensor in batch) for batch in batches()]
        found = doctor(Slow(clock, loaded), clock.step(INSTANT), seconds=1)
    check(found)
    assert found.kind == kind
    assert found.evidence.copied_by == "loader"
    assert (found.evidence.shares["copying"] > 0.3) == (kind == "copy")


def test_a_step_that_takes_no_batch_on_the_device(monkeypatch, clock):
    with monkeypatch.context() as patch:
        gpu = Device(patch, clock, 0.0)

        def step(batch):
            if isinstance(batch[0], gpu.there):
                raise TypeError("a batch of the host, please")
            clock.sleep(PAUSE)

        found = doctor(batches(), step, seconds=1)
    check(found)
    assert found.kind == "model"
    assert found.evidence.copy_seconds is None
    assert "a batch of the host, please" in found.evidence.notes[0]


@pytest.mark.gpu
def test_a_slow_copy_to_a_gpu():
    host = [(torch.rand(64, 3, 512, 512), torch.arange(64)) for _ in range(3)]  # 200 MB of pageable memory
    found = check(doctor(host, lambda batch: batch[0].to("cuda").mean(), seconds=3))
    assert found.kind == "copy"
    assert found.evidence.copied_by == "step"


@pytest.mark.gpu
def test_a_model_on_a_gpu_is_the_limit():
    weights = torch.rand(4096, 4096, device="cuda")
    loader = [(torch.rand(64, 1, 28, 28, device="cuda"), torch.arange(64, device="cuda")) for _ in range(3)]
    found = check(doctor(loader, lambda batch: [weights @ weights for _ in range(30)], seconds=3))
    assert found.kind == "model"
    assert found.evidence.copied_by == "loader"
    assert found.evidence.queued_steps is not None


# The verdict follows from the evidence.


def summary(median, spread=0.0, n=9):
    return Summary(n, median, median - spread, median + spread, median - spread, median + spread)


GOOD_HOST = Host(summary(0.01), CoreUse(1.0, 0.9, 0.01), None, 8, 8, 8, 8)


def evidence(
    gain=1.0, headroom=310.0, spread=0.001, copying=0.0, copied_by=None, device="cpu", queued=None, lost=0.0, **host
):
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
    ("found", "kind", "facts"),
    [
        (evidence(gain=2.6), "loader", ["62 %", "2.6"]),
        (evidence(gain=1.003), "model", ["0.4 %", "310"]),
        (evidence(gain=1.2, spread=0.3), "model", ["20 %", "50 %"]),  # noisy: both the median and the most
        (evidence(gain=1.3, spread=0.31), "model", []),  # noise is no gain
        (evidence(gain=1.3, spread=0.29), "loader", []),
        (evidence(headroom=0.98), "model", []),
        (evidence(cores=8, machine_cores=32), "model", ["8", "32"]),
        (evidence(copying=0.5, copied_by="step", device="cuda"), "copy", ["50 %", "2.0", "pin_memory"]),
        (evidence(gain=2.0, copying=0.2, copied_by="step", device="cuda"), "loader", ["50 %"]),
        (evidence(gain=2.0, copying=0.4, copied_by="loader", device="cuda"), "copy", ["40 %"]),
        (evidence(gain=2.0, copying=0.1, copied_by="loader", device="cuda"), "loader", ["50 %"]),
        (evidence(gain=1.0, copying=0.4, copied_by="loader", device="cuda"), "model", []),  # hidden
        (evidence(lost=0.5, cores=2, threads=2), "host", ["50 %", "2.0", "1.0"]),
        (
            evidence(lost=0.5, cores=1, threads=4, use=CoreUse(1, 0.5, 0.5)),
            "host",
            ["0.5 of 1", "torch.set_num_threads(1)"],
        ),
        (evidence(lost=0.5, cores=1, threads=1), "host", ["threads"]),
        (evidence(lost=0.5, cores=1, threads=1, use=CoreUse(1, 0.5, 0.5, 4, 0.5, 0.5)), "host", ["4", "worker"]),
        (evidence(lost=0.5, gain=1.6), "host", ["38 %"]),  # it slows both
        (evidence(lost=0.3, gain=10.0), "loader", ["90 %"]),  # the loss does not explain it
        (evidence(lost=0.1), "model", []),
        (evidence(lost=0.5, device="cuda", queued=2.0), "model", []),  # the GPU was never idle
        (evidence(lost=0.5, device="cuda", queued=0.0), "host", []),
        (evidence(stopped=0.8), "host", ["80 %", "limit"]),
        (evidence(stopped=0.01), "model", []),
        (evidence(threads=1, physical_cores=8), "host", ["torch.set_num_threads(8)", "OMP_NUM_THREADS"]),
        (evidence(threads=1, physical_cores=8, device="cuda"), "model", []),
        (evidence(threads=1, physical_cores=8, use=CoreUse(1, 0.1, 0)), "model", []),  # it does not compute
        (evidence(threads=1, physical_cores=8, lost=None, use=None), "model", []),
    ],
)
def test_verdicts(found, kind, facts):
    judged, verdict = judge(found, "a tuner")
    assert ("a tuner" in verdict) == (kind == "loader")
    assert judged == kind
    assert [fact for fact in facts if fact not in verdict] == []


shares = st.floats(0, 0.99)


@given(
    waiting=shares, copying=shares, by=st.sampled_from([None, "step", "loader"]), lost=shares, queued=st.floats(0, 3)
)
def test_every_verdict_has_its_reason(waiting, copying, by, lost, queued):
    found = evidence(1 / (1 - waiting), copying=copying, copied_by=by, device="cuda", lost=lost, queued=queued)
    kind = check(Diagnosis(*judge(found, "a tuner"), found)).kind
    assert (kind != "loader") or waiting >= WAITING_LEAST * 0.999
    assert (kind != "copy") or found.shares["copying"] >= COPYING_LEAST
    assert (kind != "host") or (lost >= scheduling.LOST_LEAST and queued < QUEUED_LEAST)
    assert (kind != "model") or waiting < WAITING_LEAST * 1.01
    if kind == "host":  # the more is lost, the more it is the host
        worse = replace(found.host, lost=summary(min(1.0, lost * 1.1)))
        assert judge(replace(found, host=worse), "a tuner")[0] == "host"


# Loaders of all kinds.


@pytest.mark.parametrize("batch", [torch.zeros(BATCH, 4), {"images": torch.zeros(BATCH, 4)}, ("no tensor", 3), None])
def test_any_structure_of_tensors(batch, clock):
    found = check(doctor([batch], clock.step(), seconds=0.5, device="cpu"))
    assert found.kind == "model"
    images = None if batch is None or isinstance(batch, tuple) else BATCH
    assert found.evidence.batch_images == images
    assert (found.evidence.images_per_second is None) == (images is None)


def test_the_fixed_batch_is_a_copy(clock):
    """A loader may reuse its memory: the fixed step gets the first batch as it was."""
    seen, memory = set(), torch.zeros(BATCH, 4)

    class Reusing:
        def __iter__(self):
            return (memory.fill_(number) for number in range(1, 6))

    def step(batch):
        if batch is not memory:
            seen.add(batch[0, 0].item())
        clock.sleep(0.003)

    doctor(Reusing(), step, seconds=0.5, device="cpu")
    assert seen == {1.0}


def test_a_partial_batch_counts_as_a_part(clock):
    loader = [*batches(2), (torch.zeros(1, 4), torch.zeros(1))]
    found = doctor(loader, lambda batch: clock.sleep(len(batch[0]) * PAUSE / BATCH), seconds=1.5, device="cpu")
    assert found.kind == "model"
    assert 0.8 < found.evidence.gain.median < 1.2


@pytest.mark.parametrize("device", ["cpu", None])
def test_our_loader(tmp_path, write_small_beton, device, clock):
    write_small_beton(tmp_path / "a.beton", 40)
    with Loader(tmp_path / "a.beton", BATCH, device=device) as loader:
        found = check(doctor(loader, clock.step(), seconds=0.5))
        assert found.kind == "model"
        assert torch.device(found.evidence.device).type == loader.device.type
        assert len(list(loader)) == 5


def test_a_dataloader(clock):
    dataset = torch.utils.data.TensorDataset(torch.zeros(40, 4), torch.arange(40))
    loader = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True)
    found = check(doctor(loader, clock.step(), seconds=0.5, device="cpu"))
    assert found.kind == "model"
    assert found.evidence.batch_images == BATCH


def test_diagnosing_a_run_leaves_no_folder(tmp_path, clock, monkeypatch):
    real = Trainer.train_step

    def train_step(*arguments):
        clock.sleep(0.2)
        return real(*arguments)

    def train_loader(self):
        for batch in iterate(self):
            clock.sleep(1.0)
            yield batch

    iterate = Loader.__iter__
    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(Loader, "__iter__", train_loader)
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(
        dataset="digits", model="small-cnn", batch_size=32, device="cpu", cache_dir=str(tmp_path / "cache"), quiet=True
    )
    found = check(diagnose_training(config, 10.0, Reporter(quiet=True)))
    assert found.kind == "loader"
    assert "fastmnist tune." in found.verdict  # the command
    assert found.evidence.batch_images == 32
    assert not (tmp_path / "runs").exists()


# Errors.


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf])
def test_seconds_that_cannot_be(seconds, clock):
    with pytest.raises(ConfigError, match="seconds"):
        doctor(batches(), clock.step(INSTANT), seconds=seconds)


def test_too_few_seconds(clock):
    with pytest.raises(ConfigError, match=r"seconds 0.01 .*\b0\.03\d* s.*\b1$"):
        doctor(batches(), clock.step(), seconds=0.01, device="cpu")


def test_a_device_that_is_not_there(clock):
    with pytest.raises(ConfigError, match="gpu"):
        doctor(batches(), clock.step(INSTANT), device="gpu")


@pytest.mark.parametrize("at", [1, 7, 30])
@pytest.mark.parametrize("where", ["loader", "step"])
def test_an_error_passes_through(at, where):
    calls = {"loader": 0, "step": 0}

    def call(name):
        calls[name] += 1
        if name == where and calls[name] == at:
            raise KeyError("mine")

    class Failing:
        def __iter__(self):
            for batch in batches():
                call("loader")
                yield batch

    with pytest.raises(KeyError, match="mine"):
        doctor(Failing(), lambda batch: call("step"), seconds=1, device="cpu")
