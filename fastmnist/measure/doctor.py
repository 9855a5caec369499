"""Bottleneck diagnosis of a training loop: its loader, copies to the device, the model, or too few cores."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError
from fastmnist.measure.batches import BatchCount, Epochs, kept, length_of, step_of_batch, tensors_of, with_tensors
from fastmnist.measure.diagnosis import Diagnosis, Evidence, judge, saved
from fastmnist.measure.step import fixed_batch_seconds, training_setup
from fastmnist.system.machine import choose_device, limit_periods, synchronize
from fastmnist.system.progress import Reporter
from fastmnist.system.scheduling import CoreUse, Host, core_use, stopped_share, thread_times
from fastmnist.system.statistics import in_turns, ratios, summarise

# Many short turns: in 6 s on a shared machine, 21 bound the gain of a free loader within about 5 %, 9 within 10 %.
TURNS, LEAST_TURNS = 21, 3
WARM_UP_STEPS = 3  # after the first, which compiles
LEAD_IN = 4  # 1 / LEAD_IN of a block's steps run before its clock starts
MOST_AHEAD = 64  # batches that a loader may have ready; dropped before the clock of the loader alone starts
LOADER_PART, MOST_BATCHES = 4, 16  # the loader alone runs for 1 / 4 of a block's time, at most 16 times its batches
OVERTIME = 3  # the doctor takes up to this many times the given seconds rather than refuse
TINY = 64  # images of a batch: up to so many, half of it is measured too


def doctor(
    loader: Iterable[Any],
    step: Callable[..., Any],
    *,
    seconds: float = 6.0,
    device: str | torch.device | None = None,
) -> Diagnosis:
    """Finds the bottleneck of a training loop by running parts of it for some seconds.

    After a warm-up (the first batch, which compiles, and a few steps), these parts take turns: steps on one batch that
    is kept, and on half of it if it is small; copies to a GPU; the loader alone; real steps. Blocks are as long as
    `seconds` allow. Each ends by waiting for the GPU, and starts its clock after some steps, which use up what the
    loader prepared during the block before.

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
    _check_seconds(seconds)
    evidence = _Examination(loader, step_of_batch(step), device, TINY).examine(seconds)
    return Diagnosis(*judge(evidence, "fastmnist.tune_loader"), evidence)


def diagnose_training(config: TrainConfig, seconds: float = 6.0, reporter: Reporter | None = None) -> Diagnosis:
    """The diagnosis of the run that `fastmnist train` would make with these settings, without its folder.

    Raises:
        FastmnistError: as `doctor` and `training_setup`.
    """
    _check_seconds(seconds)
    with training_setup(config, reporter or Reporter(config.quiet)) as setup:
        tiny = TINY if setup.device.type == "cpu" else 0  # a GPU's recorded step has one size
        evidence = _Examination(setup.loaders.train, setup.step, setup.device, tiny).examine(seconds)
    return Diagnosis(*judge(evidence, "fastmnist tune"), evidence)


def _check_seconds(seconds: float) -> None:
    if not 0 < seconds < math.inf:
        raise ConfigError(f"seconds {seconds}: must be more than 0")


class _Examination:
    """The batches and the clocks of one call of `doctor`. tiny: images of a batch that is halved too, at most."""

    def __init__(
        self, loader: Iterable[Any], step: Callable[[Any], Any], device: str | torch.device | None, tiny: int
    ) -> None:
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
        self.half_batch: Any = None
        self._warm_up(first)
        if 2 <= (self.images or 0) <= tiny:
            self._halve_fixed_batch()

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

    def _halve_fixed_batch(self) -> None:
        """Half of the fixed batch, if the step accepts it."""
        size = self.images or 0
        half = with_tensors(self.fixed_batch, lambda all: all[: size // 2] if all.shape[:1] == (size,) else all)
        try:
            self.step(half)
            self.synchronize()
            self.half_batch = half
        except Exception as error:  # the loader yields no half batch either
            self.notes.append(f"Whether the batch is too small is not known: the step takes no half of it ({error}).")

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
        if self.half_batch is not None:
            parts["half"] = lambda: self._time_steps(self.half_batch)
        parts |= {"loader": self.time_loader, "real": self.time_real}
        self.deadline = time.perf_counter() + seconds
        periods = limit_periods()
        values = in_turns(parts, TURNS, until=self.deadline, least=LEAST_TURNS)
        return self._evidence(values, stopped_share(periods, limit_periods()))

    def _plan_turn(self) -> None:
        """Sets the steps of a block in this turn, from the speeds of the last one."""
        fixed = 1 + (self.copied_by == "step") + (self.half_batch is not None)
        steps = self.fixed * fixed + self.real
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
            lost = summarise([use.lost(saved(gain.median)) for use in self.uses])
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
            half_batch=ratios(values["half"], fixed) if "half" in values else None,
        )
