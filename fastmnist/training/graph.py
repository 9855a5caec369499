"""A whole training step as one CUDA graph: one launch instead of hundreds, so that the host no longer sets the pace."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

TIMED = 5  # replays
WARM_UPS = 3  # runs before recording

Body = Callable[[], None]
Update = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """On a GPU, work on a stream of its own, after what was asked for before and before what is asked for after.

    What is recorded must not have run on the default stream first: autograd remembers on which one it met a weight.
    """
    if device.type != "cuda":
        yield
        return
    outer, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(outer)
    with torch.cuda.stream(stream):
        yield
    outer.wait_stream(stream)


def cuda_graph(body: Body, reset: Body) -> Body:
    """Records what `body` launches: the function that is returned launches all of it at once.

    To be called on a stream of its own (`aside`), as torch.cuda.graph asks for.

    reset: called before `body` runs to be warm, as it will be before the recording is used.

    Raises:
        RuntimeError: something in it cannot be recorded (it waits for the GPU, or its shapes depend on data).
    """
    for _ in range(WARM_UPS):
        reset()
        body()
    graph = torch.cuda.CUDAGraph()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a tensor that is freed meanwhile would end the recording
    try:
        # Other threads may go on with the GPU meanwhile.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            body()
    finally:
        if collecting:
            gc.enable()
    return graph.replay


class StepGraph:
    """A step with everything that belongs to it: its batch, forward and backward pass, optimizer, rate and results.

    Its batches come from one place in memory, which holds some of them; counters on the device say which is next, where
    its results go, and what its learning rate is. Recording trains: the caller puts back what `update` changes.

    Attributes:
        seconds: that one replay took, of `TIMED`.

    Args:
        update: images (B, C, H, W), labels (B,) to (mean loss, number of right answers); trains the model.
        images, labels: an example of all batches that are prepared together: (n, C, H, W), (n,).
        batch_size: B.
        rate: () float32, which the optimizer reads; rates: (steps,) float32, of each step.
        losses, right: (steps of an epoch,) float32, for results.
        record: makes a function of it that does the same, faster.

    Raises:
        RuntimeError: the step cannot be recorded.
    """

    def __init__(
        self,
        update: Update,
        images: torch.Tensor,
        labels: torch.Tensor,
        batch_size: int,
        rate: torch.Tensor,
        rates: torch.Tensor,
        losses: torch.Tensor,
        right: torch.Tensor,
        record: Callable[[Body, Body], Body] = cuda_graph,
    ) -> None:
        self._update, self._rate, self._rates, self._losses, self._right = update, rate, rates, losses, right
        self._images, self._labels = torch.empty_like(images), torch.empty_like(labels)
        # Rows as they lie in memory: (n, H, W, C) in channels_last, which no gather would keep by itself.
        self._last = images.stride(1) == 1
        self._rows = self._images.permute(0, 2, 3, 1) if self._last else self._images
        self._numbers = torch.arange(batch_size, device=images.device)
        # Of the batch among those in memory, of its results, and of the step.
        self._at = torch.zeros(3, dtype=torch.int64, device=images.device)
        self.load(images, labels, 0, 0)
        self.replay = record(self._step, self._reset)
        self.seconds = self._time()

    def load(self, images: torch.Tensor, labels: torch.Tensor, at: int, step: int) -> None:
        """The batches that come next, no more than in the example: results from place `at`, rates from `step` on."""
        self._images[: len(images)].copy_(images)
        self._labels[: len(labels)].copy_(labels)
        for place, value in zip(self._at, (0, at, step), strict=True):
            place.fill_(value)

    def _step(self) -> None:
        batch, at, step = self._at.split(1)
        chosen = self._numbers + batch * len(self._numbers)
        images = self._rows.index_select(0, chosen)
        self._rate.copy_(self._rates.index_select(0, step).view(()))
        loss, right = self._update(
            images.permute(0, 3, 1, 2) if self._last else images, self._labels.index_select(0, chosen)
        )
        self._losses.index_copy_(0, at, loss.view(1))
        self._right.index_copy_(0, at, right.to(self._right.dtype).view(1))
        self._at.add_(1)

    def _reset(self) -> None:
        self._at.zero_()

    def _time(self) -> float:
        def finish() -> None:
            if self._at.is_cuda:
                torch.cuda.synchronize(self._at.device)

        finish()
        begun = time.perf_counter()
        for _ in range(TIMED):
            self._reset()
            self.replay()
        finish()
        return (time.perf_counter() - begun) / TIMED
