"""Training step as one CUDA graph: one launch instead of hundreds, so that the host no longer sets the pace."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fastmnist.system.processes import world_size

TIMED = 5  # replays
WARM_UPS, WARM_UPS_OF_SEVERAL = 3, 11  # runs before recording: DistributedDataParallel settles later

Body = Callable[[], None]
Update = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, runs the block on a stream of its own, in order with the work before and after it.

    What is recorded must not have run on the default stream first: autograd remembers on which stream it met a weight.
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
    """Records the launches of `body`; the returned function replays all of them at once.

    Call it on a stream of its own (`side_stream`), as torch.cuda.graph requires.

    Args:
        reset: called before each warm-up run of `body`.

    Raises:
        RuntimeError: something in it cannot be recorded (it waits for the GPU, or its shapes depend on data).
    """
    for _ in range(WARM_UPS if world_size() == 1 else WARM_UPS_OF_SEVERAL):
        reset()
        body()
    graph = torch.cuda.CUDAGraph()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # freeing a tensor would end the recording
    try:
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            body()
    finally:
        if collecting:
            gc.enable()
    return graph.replay


class StepGraph:
    """A recorded step: fetches its batch and learning rate, trains, and stores its results, all on the device.

    A fixed buffer holds several batches; counters on the device say which is next, where its results go, and what its
    learning rate is. Recording trains: the caller restores what `update` changed.

    Attributes:
        seconds: time of one replay, the mean of `TIMED`.

    Args:
        update: images (B, C, H, W), labels (B,) to (mean loss, number of right answers); trains the model.
        images, labels: (n, C, H, W), (n,), an example of the batches that are prepared together.
        batch_size: B.
        rate: () float32, read by the optimizer; rates: (steps,) float32, the rate of each step.
        losses, right: (steps of an epoch,) float32, for results.
        record: turns a function into a faster one that does the same.

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
        # Counters: batch within the buffer, place of its results, step.
        self._at = torch.zeros(3, dtype=torch.int64, device=images.device)
        self.load(images, labels, 0, 0)
        self.replay = record(self._step, self._reset)
        self.seconds = self._time()

    def load(self, images: torch.Tensor, labels: torch.Tensor, at: int, step: int) -> None:
        """Copies the next batches, at most as many as in the example; results go to places from `at` on."""
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
