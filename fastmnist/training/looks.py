"""Looks at a run's losses while it goes on: copied in the order of the device's work, read once they are there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

MOST_PENDING = 2  # looks: how far the host may be ahead of what it has seen


@dataclass(frozen=True)
class Look:
    """Losses and right answers, (steps,) float32 each, of the steps from place `start` of the epoch up to `step`."""

    start: int
    step: int
    losses: torch.Tensor
    right: torch.Tensor
    copied: torch.cuda.Event | None
    then: Callable[[Look], None]

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()

    @property
    def is_there(self) -> bool:
        return self.copied is None or self.copied.query()


class Looks:
    """Takes looks at `losses` and `right`, (steps of an epoch,) on a device, and hands each on once it is there."""

    def __init__(self, losses: torch.Tensor, right: torch.Tensor) -> None:
        self._losses, self._right = losses, right
        self._pending: deque[Look] = deque()

    def take(self, start: int, end: int, step: int, then: Callable[[Look], None]) -> None:
        """Of places start to end, the last of which is `step` of the run. `then` gets it here or in a later call."""
        losses, right = (
            values[start:end].to("cpu", non_blocking=True, copy=True) for values in (self._losses, self._right)
        )
        copied = None
        if self._losses.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._pending.append(Look(start, step, losses, right, copied, then))
        self.poll()

    def poll(self) -> None:
        """Hands on what is there; waits for the oldest while too many are not."""
        while self._pending and (self._pending[0].is_there or len(self._pending) > MOST_PENDING):
            self._hand_on()

    def finish(self) -> None:
        """Waits for all."""
        while self._pending:
            self._hand_on()

    @property
    def pending(self) -> bool:
        return bool(self._pending)

    def _hand_on(self) -> None:
        look = self._pending.popleft()
        look.wait()
        look.then(look)
