"""Bottleneck diagnosis of a training loop: its loader, copies to the device, the model, or too few cores."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError
from fastmnist.measure.batches import BatchCount, Epochs, kept, length_of, step_of_batch, tensors_of, with_tensors
from fastmnist.measure.step import fixed_batch_seconds, training_setup
from fastmnist.system.machine import choose_device, limit_periods, synchronize
from fastmnist.system.numbers import milliseconds, rough_percent
from fastmnist.system.progress import Reporter
from fastmnist.system.scheduling import CoreUse, Host, core_use, stopped_share, thread_times
from fastmnist.system.statistics import Summary, in_turns, ratios, summarise

Kind = Literal["loader", "copy", "model", "host"]

# Many short turns: in 6 s on a shared machine, 21 bound the gain of a free loader within about 5 %, 9 within 10 %.
TURNS, LEAST_TURNS = 21, 3
WARM_UP_STEPS = 3  # after the first, which compiles
LEAD_IN = 4  # 1 / LEAD_IN of a block's steps run before its clock starts
MOST_AHEAD = 64  # batches that a loader may have ready; dropped before the clock of the loader alone starts
LOADER_PART, MOST_BATCHES = 4, 16  # the loader alone runs for 1 / 4 of a block's time, at most 16 times its batches
OVERTIME = 3  # the doctor takes up to this many times the given seconds rather than refuse

# A loader that costs nothing measured 0 to 0.05 of a step in 6 s, up to 0.12 in 3 s, on 2 cores of a shared machine.
# So the interval of the gain must lie above 1 too.
WAITING_LEAST = 0.05
# Chosen without a measurement:
COPYING_LEAST = 0.1  # of a step
QUEUED_LEAST = 0.5  # of a step: work that the GPU had left when the host was done


@dataclass(frozen=True)
class Evidence:
    """The measurements behind a verdict. A partial batch counts as its share of a step.

    Summaries are over `turns`; in each turn all parts ran one after the other.

    Attributes:
        device: of the model.
        steps: number of real steps.
        batch_images: images of a batch; None if unknown.
        first_batch_seconds: until the loader's first batch; not in any other figure.
        step_seconds: of a real step, with its loading. fixed_step_seconds: of a step on one batch that is kept.
        loader_seconds: per batch, of the loader alone. next_seconds: per real step, of asking for its batch; on a GPU,
            the host also waits there when the queue is full.
        gain: real over fixed step: how many times as fast training could be with an infinitely fast loader.
        headroom: real step over loader_seconds: how many times as fast a model this loader could feed.
        copy_seconds: of copying a batch to the device. By the "step", it is the time that the fixed step takes longer
            with its batch on the host. By the "loader", it is a copy of as many bytes from pinned memory, whether or
            not the loader hides it behind the model. None where nothing is copied or it could not be measured.
        images_per_second: of the "real" loop, the "fixed" step and the "loader" alone; None without batch_images.
        queued_steps: steps that the GPU was behind the host at the end of a block; None on a CPU.
        host: the use of the cores during the real steps.
        notes: reasons why something could not be measured.
    """

    device: str
    turns: int
    steps: int
    batch_images: int | None
    first_batch_seconds: float
    step_seconds: Summary
    fixed_step_seconds: Summary
    loader_seconds: Summary
    next_seconds: Summary
    gain: Summary
    headroom: Summary
    copy_seconds: Summary | None
    copied_by: Literal["step", "loader"] | None
    images_per_second: dict[str, float] | None
    queued_steps: float | None
    host: Host
    notes: tuple[str, ...] = ()

    @property
    def waiting(self) -> float:
        """The share of a real step that an infinitely fast loader would save, 0 to 1."""
        return _saved(self.gain.median)

    @property
    def shares(self) -> dict[str, float]:
        """The shares "loading", "copying" and "computing" of a real step; they add up to 1.

        Copies by the step are taken out of the computing, copies by the loader out of the waiting. Loading is the rest
        of the waiting: gathering, decoding, starting epochs, waiting for workers, and what the loader takes from the
        model (cores, the interpreter's lock). Work that the loader hides behind the model is in none of them.
        """
        waiting = self.waiting
        seconds = self.copy_seconds.median if self.copy_seconds else 0.0
        room = waiting if self.copied_by == "loader" else 1 - waiting
        copying = min(room, max(0.0, seconds / self.step_seconds.median))
        loading = waiting - copying if self.copied_by == "loader" else waiting
        return {"loading": loading, "copying": copying, "computing": max(0.0, 1 - loading - copying)}

    def to_dict(self) -> dict[str, Any]:
        use = self.host.use
        derived = {"waiting": self.waiting, "shares": self.shares, "unmet": use and use.unmet}
        return asdict(self) | derived | {"notes": list(self.notes)}

    def lines(self) -> list[str]:
        """The main figures as sentences."""
        step, fixed, alone, gain = self.step_seconds, self.fixed_step_seconds, self.loader_seconds, self.gain
        parts = ", ".join(f"{name} {rough_percent(share)}" for name, share in self.shares.items())
        of_images = f" of {self.batch_images} images" if self.batch_images else ""
        lines = [
            f"A step takes {milliseconds(step.median)} ({milliseconds(step.low)} to {milliseconds(step.high)}): "
            f"{parts}.",
            f"Of that, asking for a batch takes {milliseconds(self.next_seconds.median)}.",
            f"On one fixed batch a step takes {milliseconds(fixed.median)}: an infinitely fast loader could train "
            f"{_times(gain.median)} ({_times(gain.low)} to {_times(gain.high)}) times as fast.",
            f"The loader alone takes {milliseconds(alone.median)} for a batch.",
        ]
        if self.images_per_second:
            rates = {name: f"{rate:,.0f}" for name, rate in self.images_per_second.items()}
            lines.append(
                "Images/s: {real} in all, {fixed} of the model alone, {loader} of the loader alone.".format(**rates)
            )
        return [
            *lines,
            self.host.line(),
            f"Measured on {self.device} in {self.turns} turns, {self.steps} steps{of_images}; the first batch took "
            f"{self.first_batch_seconds:.2g} s.",
            *self.notes,
        ]


@dataclass(frozen=True)
class Diagnosis:
    """kind: the bottleneck. verdict: one sentence, with a remedy."""

    kind: Kind
    verdict: str
    evidence: Evidence

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"kind": self.kind, "verdict": self.verdict, "evidence": self.evidence.to_dict()}

    def lines(self) -> list[str]:
        """The evidence as sentences."""
        return self.evidence.lines()


def doctor(
    loader: Iterable[Any],
    step: Callable[..., Any],
    *,
    seconds: float = 6.0,
    device: str | torch.device | None = None,
) -> Diagnosis:
    """Finds the bottleneck of a training loop by running parts of it for some seconds.

    After a warm-up (the first batch, which compiles, and a few steps), four parts take turns: steps on one batch that
    is kept; copies to a GPU; the loader alone; real steps. Blocks are as long as `seconds` allow. Each ends by waiting
    for the GPU, and starts its clock after some steps, which use up what the loader prepared during the block before.

    The step trains: model and optimizer change, towards the batch that is kept. Pass a copy of the model
    (copy.deepcopy) if you still need yours. The loader is left in the middle of an epoch.

    Not measured are: the cost of an epoch's start, unless epochs are short; a step that changes its batch in place, on
    a fresh batch; threads that wait for the interpreter's lock, which count as computing; cores that a hypervisor takes
    away; whether waiting for cores matters to a GPU whose step ends by reading the loss.

    Args:
        loader: batches as tensors, or tuples, lists and dicts of them; each `for` loop over it is an epoch. The length
            of a batch's last tensor is its number of images; without one, there are no images per second.
        step: one training step: step(batch), a batch as the loader yields it, or step(images, labels).
        seconds: about, after the warm-up.
        device: of the model; None takes the GPU that the batches are on, else the GPU if there is one, else the CPU.

    Raises:
        ConfigError: `seconds` are not above 0, or far too few for three turns; there is no such device; `step` takes
            neither a batch nor images and labels.
        DataError: the loader yields nothing, or nothing the second time (a generator: pass a list or a DataLoader).
        Exception: any error of `loader` or `step`, unchanged.
    """
    if not 0 < seconds < math.inf:
        raise ConfigError(f"seconds {seconds}: must be more than 0")
    evidence = _Examination(loader, step_of_batch(step), device).examine(seconds)
    return Diagnosis(*judge(evidence, "fastmnist.tune_loader"), evidence)


def diagnose_training(config: TrainConfig, seconds: float = 6.0, reporter: Reporter | None = None) -> Diagnosis:
    """The diagnosis of the run that `fastmnist train` would make with these settings, without its folder.

    Raises:
        FastmnistError: as `doctor` and `training_setup`.
    """
    with training_setup(config, reporter or Reporter(config.quiet)) as setup:
        found = doctor(setup.loaders.train, setup.step, seconds=seconds, device=setup.device)
    return replace(found, verdict=judge(found.evidence, "fastmnist tune")[1])


class _Examination:
    """The batches and the clocks of one call of `doctor`."""

    def __init__(self, loader: Iterable[Any], step: Callable[[Any], Any], device: str | torch.device | None) -> None:
        self.batches, self.step = Epochs(loader), step
        self.notes: list[str] = []
        begun = time.perf_counter()
        first = next(self.batches)
        tensors = list(tensors_of(first))
        on_gpu = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        self.device = on_gpu if device is None and on_gpu is not None else choose_device(device)
        self.synchronize()
        self.first_batch_seconds = time.perf_counter() - begun
        self.images = length_of(first) or None
        self.fixed_batch = with_tensors(first, kept)
        self.copied_by: Literal["step", "loader"] | None = None
        if self.device.type == "cuda" and tensors:
            self.copied_by = "step" if on_gpu is None else "loader"
        self.next_seconds: list[float] = []
        self.queued: list[float] = []
        self.uses: list[CoreUse] = []
        self.steps, self.steps_done = 1, 0
        self.turns_left = TURNS
        self._warm_up(first)

    def synchronize(self) -> None:
        synchronize(self.device)

    def _warm_up(self, first: Any) -> None:
        """The first steps, which compile, allocate and start threads; first estimates of each part's seconds."""
        self.step(first)
        self.synchronize()
        loading, stepping = [], []
        for _ in range(WARM_UP_STEPS):
            begun = time.perf_counter()
            batch = next(self.batches)
            loading.append(time.perf_counter() - begun)
            self.step(batch)
            self.synchronize()
            stepping.append(time.perf_counter() - begun - loading[-1])
        # The latest seconds of each part, to plan the next turn with.
        self.fixed, self.alone = min(stepping), min(loading)
        self.real = self.fixed + self.alone
        if self.copied_by == "step":
            self._move_fixed_batch()
        elif self.copied_by == "loader":
            self.pinned = with_tensors(self.fixed_batch, lambda tensor: tensor.cpu().pin_memory())

    def _move_fixed_batch(self) -> None:
        """A second fixed batch on the device, if the step accepts it."""
        try:
            self.moved_batch = with_tensors(self.fixed_batch, lambda tensor: tensor.to(self.device))
            self.step(self.moved_batch)
            self.synchronize()
        except Exception as error:  # the loader never yields such a batch: not the user's mistake
            self.copied_by = None
            self.notes.append(f"Copying is not measured: the step takes no batch on {self.device} ({error}).")

    def examine(self, seconds: float) -> Evidence:
        least = LEAST_TURNS * (2 * self.real + 2 * self.alone + self.fixed)
        if least > OVERTIME * seconds:
            raise ConfigError(
                f"seconds {seconds:g} are too few for a step of {self.real:.2g} s; give at least {math.ceil(least)}"
            )
        parts: dict[str, Callable[[], float]] = {"fixed": self.time_fixed}
        if self.copied_by == "step":
            parts["moved"] = lambda: self._time_steps(self.moved_batch)
        elif self.copied_by == "loader":
            parts["copy"] = self.time_copy
        parts |= {"loader": self.time_loader, "real": self.time_real}
        self.deadline = time.perf_counter() + seconds
        periods = limit_periods()
        values = in_turns(parts, TURNS, until=self.deadline, least=LEAST_TURNS)
        return self._evidence(values, stopped_share(periods, limit_periods()))

    def _plan_turn(self) -> None:
        """Sets the steps of a block in this turn, from the speeds of the last one."""
        steps = self.fixed * (2 if self.copied_by == "step" else 1) + self.real
        cost = steps * (1 + 1 / LEAD_IN) + max(self.alone, self.real / LOADER_PART)
        left = max(0.0, self.deadline - time.perf_counter())
        self.steps = max(1, int(left / self.turns_left / cost))
        self.turns_left = max(1, self.turns_left - 1)

    def time_fixed(self) -> float:
        self._plan_turn()
        self.fixed = self._time_steps(self.fixed_batch)
        return self.fixed

    def _time_steps(self, batch: Any) -> float:
        """Seconds of a step on one batch."""
        for _ in range(self.steps // LEAD_IN):
            self.step(batch)
        return fixed_batch_seconds(self.step, batch, self.steps, self.device)

    def time_copy(self) -> float:
        """Seconds of a batch's copy from pinned memory."""
        begun = time.perf_counter()
        for _ in range(self.steps):
            with_tensors(self.pinned, lambda tensor: tensor.to(self.device, non_blocking=True))
        self.synchronize()
        return (time.perf_counter() - begun) / self.steps

    def time_loader(self) -> float:
        """Seconds per batch of the loader alone."""
        clock, whole, count = time.perf_counter, BatchCount(self.images), 0
        for _ in range(MOST_AHEAD):  # batches that are ready come at once
            begun = clock()
            next(self.batches)
            if clock() - begun > self.alone / 2:
                break
        self.synchronize()
        begun = clock()
        enough = begun + self.steps * self.real / LOADER_PART
        while count < self.steps or (clock() < enough and count < self.steps * MOST_BATCHES):
            whole.add(next(self.batches))
            count += 1
        self.synchronize()
        self.alone = (clock() - begun) / whole.batches
        return self.alone

    def time_real(self) -> float:
        """Seconds of a real step."""
        batches, step, clock = self.batches, self.step, time.perf_counter
        for _ in range(max(1, self.steps // LEAD_IN)):
            step(next(batches))
        self.synchronize()
        whole, asking = BatchCount(self.images), 0.0
        threads = thread_times()
        begun = clock()
        for _ in range(self.steps):
            asked = clock()
            batch = next(batches)
            asking += clock() - asked
            step(batch)
            whole.add(batch)
        issued = clock()
        self.synchronize()
        ended = clock()
        if threads is not None:
            self.uses.append(core_use(threads, thread_times() or {}, ended - begun))
        self.real = (ended - begun) / whole.batches
        self.next_seconds.append(asking / whole.batches)
        self.queued.append((ended - issued) / self.real)
        self.steps_done += self.steps
        return self.real

    def _evidence(self, values: dict[str, list[float]], stopped: float | None) -> Evidence:
        real, fixed, alone = values["real"], values["fixed"], values["loader"]
        gain, rates, copying = ratios(real, fixed), None, values.get("copy")
        if self.copied_by == "step":
            copying = [a - b for a, b in zip(fixed, values["moved"], strict=True)]
        if self.images:
            parts = {"real": real, "fixed": fixed, "loader": alone}
            rates = {name: self.images / summarise(seconds).median for name, seconds in parts.items()}
        lost, use = None, None
        if self.uses:
            lost = summarise([use.lost(_saved(gain.median)) for use in self.uses])
            use = sum(self.uses[1:], self.uses[0])
        return Evidence(
            device=str(self.device),
            turns=len(real),
            steps=self.steps_done,
            batch_images=self.images,
            first_batch_seconds=self.first_batch_seconds,
            step_seconds=summarise(real),
            fixed_step_seconds=summarise(fixed),
            loader_seconds=summarise(alone),
            next_seconds=summarise(self.next_seconds),
            gain=gain,
            headroom=ratios(real, alone),
            copy_seconds=None if copying is None else summarise(copying),
            copied_by=self.copied_by,
            images_per_second=rates,
            queued_steps=summarise(self.queued).median if self.device.type == "cuda" else None,
            host=Host.now(lost, use, stopped),
            notes=tuple(self.notes),
        )


def _saved(gain: float) -> float:
    """The share of a step that becoming `gain` times as fast saves."""
    return max(0.0, 1 - 1 / gain)


def judge(evidence: Evidence, tuner: str) -> tuple[Kind, str]:
    """The verdict, a pure function of the evidence; it advises `tuner` for a slow loader.

    Too few cores come first if they cost more than data or copies would still cost with enough cores: they slow loader
    and model alike, which no comparison of the two shows. They do not count while a GPU has work left when the host is
    done.
    """
    host, shares, gain = evidence.host, evidence.shares, evidence.gain
    waiting = evidence.waiting if evidence.waiting >= WAITING_LEAST and gain.low > 1 else 0.0
    copies = evidence.copy_seconds is not None and evidence.copy_seconds.low > 0
    copying = shares["copying"] if copies and shares["copying"] >= COPYING_LEAST else 0.0
    lost = host.too_few_cores if (evidence.queued_steps or 0.0) < QUEUED_LEAST else 0.0
    if lost and lost >= max(waiting, copying) * (1 - lost):
        besides = f" (besides, the model waits for data in {rough_percent(waiting)} of each step)" if waiting else ""
        return "host", f"{host.sentence()}{besides}."
    if copying > (shares["loading"] if waiting else 0.0):
        return "copy", (
            f"Copying to {evidence.device} takes {rough_percent(copying)} of each step: without it the model could "
            f"train {_times(1 / (1 - copying))} times as fast; copy ahead from pinned memory (pin_memory, "
            "non_blocking=True) or keep the images on the device."
        )
    if waiting:
        return "loader", (
            f"The model waits for data in {rough_percent(waiting)} of each step: a faster loader could train "
            f"{_times(gain.median)} times as fast; try {tuner}."
        )
    on_cpu = torch.device(evidence.device).type == "cpu"
    if on_cpu and host.idle_cores:
        return "host", (
            f"The model computes with {host.threads} thread{'s' if host.threads > 1 else ''} where "
            f"{host.physical_cores} cores may be used: say torch.set_num_threads({host.physical_cores}), "
            "or leave OMP_NUM_THREADS unset."
        )
    most, headroom = max(0.0, gain.high - 1), evidence.headroom.median
    could = f"{rough_percent(most)} at most"
    if _saved(gain.high) >= WAITING_LEAST:
        about = rough_percent(max(0.0, gain.median - 1))
        could = f"about {about} ({could}: this machine is noisy, give it more seconds)"
    feeds = f"{_times(headroom)} times as fast" if headroom > 1 else "no faster than this one"
    few = f"; {host.cores} of the machine's {host.machine_cores} cores may be used" if on_cpu and host.partial else ""
    return "model", (
        f"The model is the limit: an infinitely fast loader would gain {could}, and this one could feed a model "
        f"{feeds}{few}."
    )


def _times(factor: float) -> str:
    return f"{factor:,.0f}" if factor >= 9.95 else f"{factor:.1f}" if factor >= 1.95 else f"{factor:.2f}"
