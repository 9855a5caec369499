"""Diagnosis of a training loop: the evidence, and the verdict that follows from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from fastmnist.system.numbers import milliseconds, rough_percent
from fastmnist.system.scheduling import Host
from fastmnist.system.statistics import Summary

Kind = Literal["loader", "copy", "model", "host", "batch"]

# A loader that costs nothing measured 0 to 0.05 of a step in 6 s, up to 0.12 in 3 s, on 2 cores of a shared machine.
# So the interval of the gain must lie above 1 too.
WAITING_LEAST = 0.05
# Chosen without a measurement:
COPYING_LEAST = 0.1  # of a step
QUEUED_LEAST = 0.5  # of a step: work that the GPU had left when the host was done
HALF_LEAST = 0.85  # of a step: a step with half the batch that takes longer is one whose batch is too small


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
        half_batch: the seconds of a step with half of the fixed batch over those with all of it: 0.5 if only images
            cost, 1 if only the step does. Measured for small batches alone; else, and if the step refuses, None.
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
    half_batch: Summary | None = None

    @property
    def waiting(self) -> float:
        """The share of a real step that an infinitely fast loader would save, 0 to 1."""
        return saved(self.gain.median)

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


def saved(gain: float) -> float:
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
    half = evidence.half_batch
    if half is not None and half.low >= HALF_LEAST:
        return "batch", (
            f"A batch of {evidence.batch_images} images is too small: a step with half of it takes "
            f"{rough_percent(half.median)} as long, so that twice as many would train up to {_times(2 * half.median)} "
            "times as many images a second, with another learning rate."
        )
    most, headroom = max(0.0, gain.high - 1), evidence.headroom.median
    could = f"{rough_percent(most)} at most"
    if saved(gain.high) >= WAITING_LEAST:
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
