"""Batches of any loader: epochs without an end, and the tensors in a batch of any structure."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch

from fastmnist.errors import ConfigError, DataError

_END = object()


class Epochs:
    """A loader's batches, epoch after epoch, without an end.

    starts: seconds of each epoch's start, until its first batch.

    Args:
        loader: each `for` loop over it is an epoch.
        before_start: called before each epoch starts; not in its seconds.

    Raises:
        DataError: an epoch has no batch.
    """

    def __init__(self, loader: Iterable[Any], before_start: Callable[[], None] = lambda: None) -> None:
        self._loader, self._before_start = loader, before_start
        self._batches: Iterator[Any] = iter(())
        self.starts: list[float] = []

    def __next__(self) -> Any:
        batch = next(self._batches, _END)
        if batch is not _END:
            return batch
        self._before_start()
        begun = time.perf_counter()
        self.end_epoch()
        self._batches = iter(self._loader)
        batch = next(self._batches, _END)
        if batch is _END:
            what = type(self._loader).__name__
            if self.starts:
                raise DataError(
                    f"the {what} yields no batch the second time; give a loader that can start again, not a generator"
                )
            raise DataError(f"the {what} yields no batch; is it used up, or its dataset smaller than a batch?")
        self.starts.append(time.perf_counter() - begun)
        return batch

    def end_epoch(self) -> None:
        """Drops the iterator, and with it its workers; the next batch is an epoch's first."""
        self._batches = iter(())


def step_of_batch(step: Callable[..., Any]) -> Callable[[Any], Any]:
    """`step(batch)`, of a step that takes the batch, or images and labels apart.

    >>> step_of_batch(lambda images, labels: images + labels)([1, 2])
    3

    Raises:
        ConfigError: it takes neither; also, at the call, if it takes two and the batch is no pair.
    """
    try:
        signature = inspect.signature(step)
    except (TypeError, ValueError):  # some functions in C have none
        return step
    if _takes(signature, 1):
        return step
    if not _takes(signature, 2):
        name = getattr(step, "__name__", type(step).__name__)
        raise ConfigError(f"{name}{signature}: expected a step(batch) or a step(images, labels)")

    def of_pair(batch: Any) -> Any:
        if not isinstance(batch, (list, tuple)) or len(batch) != 2:
            size = f" of {len(batch)}" if isinstance(batch, (list, tuple)) else ""
            raise ConfigError(
                f"step{signature} takes images and labels, but the loader yields a {type(batch).__name__}{size}; "
                "expected a step(batch)"
            )
        return step(*batch)

    return of_pair


def _takes(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def tensors_of(batch: Any) -> Iterator[torch.Tensor]:
    """The tensors in a structure of tuples, lists and dicts."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_of(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from tensors_of(value)


def length_of(batch: Any) -> int:
    """Images of a batch, by the length of its last tensor; 0 without one."""
    shape: tuple[int, ...] = ()
    for tensor in tensors_of(batch):
        shape = tensor.shape
    return shape[0] if shape else 0


def with_tensors(batch: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same structure with each tensor changed, and all else as it is."""
    if isinstance(batch, torch.Tensor):
        return change(batch)
    if isinstance(batch, MutableMapping):
        other = copy.copy(batch)
        for key, value in batch.items():
            other[key] = with_tensors(value, change)
        return other
    if isinstance(batch, (list, tuple)):
        values = [with_tensors(value, change) for value in batch]
        if hasattr(batch, "_make"):  # a named tuple
            return batch._make(values)
        return values if isinstance(batch, list) else tuple(values)
    return batch


def kept(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that the loader cannot overwrite; pinned if the tensor is, so that copying it to a GPU takes as long."""
    clone = tensor.detach().clone()
    return clone.pin_memory() if tensor.is_pinned() else clone


class BatchCount:
    """Counts batches; a partial one counts as its share of `images`, unless that is None."""

    def __init__(self, images: int | None) -> None:
        self._images, self._sum = images, 0

    def add(self, batch: Any) -> None:
        self._sum += length_of(batch) if self._images else 1

    @property
    def batches(self) -> float:
        return self._sum / (self._images or 1)
