"""A whole training step as one CUDA graph: one launch instead of hundreds, so that the host no longer sets the pace."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

TIMED = 5  # replays
WARM_UPS = 3  # passes on a stream of their own before recording, as torch.cuda.graph asks for

Compute = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class StepGraph:
    """Forward, backward and optimizer step for batches of one shape, recorded once and replayed.

    Model and optimizer state are as they were when recording is done. The optimizer's learning rate is a tensor from
    then on, which `run` sets.

    Attributes:
        seconds: that one replay took, of `TIMED`.

    Args:
        compute: (images, labels, transforms) to (mean loss, number of right answers).
        model: whose weights and statistics change. optimizer: over its parameters, fused, its state made already.
        images, labels, transforms: an example on the GPU; transforms may be None.
        losses, right: (steps,) on the GPU, where `run` leaves what it found.

    Raises:
        RuntimeError: something in the step cannot be recorded (it waits for the GPU, or its shapes depend on data).
    """

    def __init__(
        self,
        compute: Compute,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        images: torch.Tensor,
        labels: torch.Tensor,
        transforms: torch.Tensor | None,
        losses: torch.Tensor,
        right: torch.Tensor,
    ) -> None:
        self._compute, self._optimizer = compute, optimizer
        self._images, self._labels = images.clone(), labels.clone()
        self._transforms = None if transforms is None else transforms.clone()
        self._losses, self._right = losses, right
        self._rate = torch.zeros((), device=images.device)
        self._at = torch.zeros(1, dtype=torch.int64, device=images.device)
        for group in optimizer.param_groups:
            group["lr"] = self._rate
            if "capturable" in group:
                group["capturable"] = True
        self._graph = self._record(model)

    def run(self, images: torch.Tensor, labels: torch.Tensor, transforms: Any, rate: float, at: int) -> None:
        """One step at that learning rate; its loss and right answers are left at place `at`."""
        self._images.copy_(images)
        self._labels.copy_(labels)
        if self._transforms is not None:
            self._transforms.copy_(transforms)
        self._rate.fill_(rate)
        self._at.fill_(at)
        self._graph.replay()

    def _record(self, model: torch.nn.Module) -> torch.cuda.CUDAGraph:
        device = self._images.device
        tensors = [*model.parameters(), *model.buffers(), *self._state(), self._losses, self._right]
        before = [tensor.detach().clone() for tensor in tensors]
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                self._step()
                self._optimizer.zero_grad(set_to_none=True)
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # records, without running
            self._step()
        self.seconds = _seconds(graph)
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        return graph

    def _step(self) -> None:
        loss, right = self._compute(self._images, self._labels, self._transforms)
        loss.backward()
        self._optimizer.step()
        self._losses.index_copy_(0, self._at, loss.detach().view(1))
        self._right.index_copy_(0, self._at, right.to(self._right.dtype).view(1))

    def _state(self) -> list[torch.Tensor]:
        values = [value for state in self._optimizer.state.values() for value in state.values()]
        return [value for value in values if isinstance(value, torch.Tensor)]


def _seconds(graph: torch.cuda.CUDAGraph) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(TIMED):
        graph.replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / TIMED
