"""Readback of losses while training runs: copied in stream order, read once they have arrived."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

MOST_PENDING = 2  # readbacks: how far the host may run ahead of the values it has seen


@dataclass(frozen=True)
class Readback:
    """Losses and right answers, (steps,) float32 each, of the steps from place `start` of the epoch up to `step`."""

    start: int
    step: int
    losses: torch.Tensor
    right: torch.Tensor
    copied: torch.cuda.Event | None
    then: Callable[[Readback], None]

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()

    @property
    def arrived(self) -> bool:
        return self.copied is None or self.copied.query()


class Readbacks:
    """Reads parts of `losses` and `right`, (steps of an epoch,) on a device, without waiting for it."""

    def __init__(self, losses: torch.Tensor, right: torch.Tensor) -> None:
        self._losses, self._right = losses, right
        self._pending: deque[Readback] = deque()

    def request(self, start: int, end: int, step: int, then: Callable[[Readback], None]) -> None:
        """Copies places start to end, the last of which is `step` of the run; calls `then` now or later."""
        losses, right = (
            values[start:end].to("cpu", non_blocking=True, copy=True) for values in (self._losses, self._right)
        )
        copied = None
        if self._losses.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._pending.append(Readback(start, step, losses, right, copied, then))
        self.poll()

    def poll(self) -> None:
        """Delivers what has arrived; waits for the oldest while more than MOST_PENDING have not."""
        while self._pending and (self._pending[0].arrived or len(self._pending) > MOST_PENDING):
            self._deliver()

    def finish(self) -> None:
        """Waits for all and delivers them."""
        while self._pending:
            self._deliver()

    @property
    def pending(self) -> bool:
        return bool(self._pending)

    def _deliver(self) -> None:
        oldest = self._pending.popleft()
        oldest.wait()
        oldest.then(oldest)
