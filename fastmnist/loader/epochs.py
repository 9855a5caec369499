"""Common base of all loaders: settings, order, ranks, subsets and the position in the epochs."""

from __future__ import annotations

import os
import threading
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from threading import get_ident
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import torch

from fastmnist.beton.reader import Beton, Verify
from fastmnist.errors import ConfigError, DataError, whole_number
from fastmnist.loader.arrays import Arrays, Samples
from fastmnist.loader.augment import Augmentation
from fastmnist.loader.device import on_device
from fastmnist.loader.host import Batch
from fastmnist.loader.normalise import AnyMoments, choose_moments
from fastmnist.loader.order import EpochOrder, EpochPlan, Kind, Uneven
from fastmnist.loader.sampling import Rows, Sampling, checked_rows
from fastmnist.system.machine import choose_device

DTYPES = (torch.uint8, torch.float32, torch.float16, torch.bfloat16)
STATE_VERSION = 3  # 2 counted batches of one process
AnyLoader = TypeVar("AnyLoader", bound="EpochLoader")


class Chunk(NamedTuple):
    """Consecutive batches as one, and which samples they hold.

    Attributes:
        images: (n, C, H, W). labels: (n,) int64.
        rows: (n,) int64, the samples' numbers in the file, on the loader's device.
    """

    images: torch.Tensor
    labels: torch.Tensor
    rows: torch.Tensor


class EpochLoader(ABC):
    """Iterates over epochs of a compiled file, batch by batch; see `Loader` for the settings.

    Each epoch has one plan, which says which samples come in which order (`_plan`); a subclass makes its batches
    (`_batches`).

    Attributes:
        file: the open file, or arrays. indices: (n,) int64, the samples that are iterated over.
        device, dtype: of the batches. Images of a float dtype are augmented and normalised already.
        moments: (mean, std) that they are normalised with, each one number per channel; None for uint8.
    """

    def __init__(
        self,
        data: str | os.PathLike[str] | Samples,
        batch_size: int = 512,
        *,
        shuffle: bool = True,
        seed: int = 0,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.uint8,
        moments: AnyMoments | None = None,
        augment: Augmentation | None = None,
        order: Literal["auto"] | Kind = "auto",
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        uneven: Uneven = "pad",
        indices: Rows | None = None,
        verify: Verify = "size",
        sampling: Sampling | None = None,
    ) -> None:
        batch_size, seed = whole_number("batch_size", batch_size, 1), whole_number("seed", seed)
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype} is none of {', '.join(str(d) for d in DTYPES)}")
        if augment is not None and dtype == torch.uint8:
            raise ConfigError("augment makes values between the stored ones: it needs a float dtype, not torch.uint8")
        if moments is not None and dtype == torch.uint8:
            raise ConfigError("moments normalise images of a float dtype; torch.uint8 hands out the stored values")
        check_choice("order", order, ("auto", *get_args(Kind)))
        check_choice("uneven", uneven, get_args(Uneven))
        self._owns_file = not isinstance(data, (Beton, Arrays))
        self.file: Samples = data if isinstance(data, (Beton, Arrays)) else Beton(data, verify)
        self.file.check_unchanged()
        self.batch_size, self.seed, self.drop_last = batch_size, seed, drop_last
        self.device, self.dtype, self.augment = choose_device(device), dtype, augment
        self.moments = None if dtype == torch.uint8 else choose_moments(self.file, moments)
        self._all = indices is None
        self.order: Kind = ("random" if shuffle else "sequential") if order == "auto" else order
        self.rank, self.world_size = process_rank(rank, world_size)
        self._uneven, self._sampling = uneven, sampling or Sampling()
        self.indices = np.arange(len(self.file)) if indices is None else checked_rows(indices, len(self.file))
        self._epoch_order = self._order_of(self.indices, self._sampling)
        # (epoch, position in the order of all processes)
        self._next = (0, 0)  # that the next loop starts with
        self._state = (0, 0)  # of the first batch that has not been handed out
        self._closed = False
        self._current: weakref.ref[_Epoch] | None = None

    def _order_of(self, samples: np.ndarray, sampling: Sampling) -> EpochOrder:
        """The order of `samples` (n,) int64 in each epoch; ConfigError where the settings do not work for them."""
        pages = None
        if self.order == "quasi_random":
            if not isinstance(self.file, Beton):
                raise ConfigError("order='quasi_random' spares a disk; these samples are in memory: take 'random'")
            pages = (self.file.offsets[samples] // self.file.page_size).astype(np.int32)
        order = EpochOrder(
            samples,
            self.order,
            self.seed,
            pages,
            self.rank,
            self.world_size,
            self._uneven,
            count=sampling.epoch_samples,
            draw=sampling.draw(self.file, samples, self.order),
        )
        if not len(order):
            raise ConfigError(
                f"{order.total} samples cannot be dealt to {self.world_size} processes; take uneven='pad'"
            )
        return order

    @property
    def needs_file(self) -> bool:
        """Whether the file is read while it iterates; not when the loader holds a copy."""
        return True

    def _plan(self, epoch: int, start: int = 0) -> EpochPlan:
        """The plan of an epoch from position `start` of the order of all processes on, made anew."""
        return self._epoch_order.plan(epoch, start)

    @abstractmethod
    def _batches(self, plan: EpochPlan, first: int) -> Iterator[Batch]:
        """The batches of `plan`, from number `first` to the last whole or allowed one (`_taken`)."""

    def _joined(self, plan: EpochPlan, first: int, count: int) -> Iterator[Batch]:
        """The same, up to `count` of them as one."""
        batches = self._batches(plan, first)
        while together := list(islice(batches, count)):
            images, labels = zip(*together, strict=True)
            yield joined(images), torch.cat(labels)

    def _with_rows(self, plan: EpochPlan, first: int, count: int) -> Iterator[Chunk]:
        at = first * self.batch_size
        for images, labels in self._batches(plan, first) if count == 1 else self._joined(plan, first, count):
            stop = at + len(labels)
            yield Chunk(images, labels, on_device(plan.rows[at:stop], self.device))
            at = stop

    def __len__(self) -> int:
        """Batches per epoch."""
        full, rest = divmod(len(self._epoch_order), self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def _taken(self, plan: EpochPlan) -> int:
        """Samples of `plan` that are in some batch."""
        samples = len(plan.rows)
        return samples - samples % self.batch_size if self.drop_last else samples

    @property
    def stride(self) -> int:
        """Samples in one batch of all processes together."""
        return self.batch_size * self.world_size

    def __iter__(self) -> Iterator[Batch]:
        return self._loop(self._batches)

    def chunks(self, count: int = 1) -> Iterator[Chunk]:
        """A loop over the loader with `count` batches at a time as one, and the samples' numbers with them."""
        count = whole_number("count", count, 1)
        return self._loop(partial(self._with_rows, count=count), count)

    def _loop(self, make: Callable[[EpochPlan, int], Iterator[Any]], together: int = 1) -> _Epoch:
        """A loop over an epoch as `make` makes it of the plan and the first batch's number."""
        self._check_open()
        return _Epoch(self, make, together)

    def _begin(self, loop: _Epoch) -> tuple[int, int, int, Iterator[Any]]:
        """(epoch, first position, end, what is made of it) of the epoch that is due, which `loop` now runs through."""
        self._check_open()
        if self._current is not None and (running := self._current()) is not None:
            running.check_thread()
        if self.needs_file:
            self.file.check_unchanged()
        epoch, position = self._next
        batch, between = divmod(position, self.stride)
        if between:  # the state of other batches: this epoch's are counted from there
            batch, plan = 0, self._plan(epoch, position)
        else:
            plan = self._plan(epoch)
        batches = loop.make(plan, batch)
        end = position + (self._taken(plan) - batch * self.batch_size) * self.world_size
        self._detach_running()
        self._state = (epoch, position) if position < end else (epoch + 1, 0)
        self._next = (epoch + 1, 0)
        self._current = weakref.ref(loop)
        return epoch, position, end, batches

    def set_epoch(self, epoch: int) -> None:
        """The next loop runs through this epoch, from its first batch.

        A loop that is under way keeps its batches, and no longer moves the loader's position.
        """
        self.seek(whole_number("epoch", epoch), 0)

    def seek(self, epoch: int, batch: int) -> None:
        """The next loop begins with this batch of this epoch; for a loop under way, see `set_epoch`."""
        self._detach_running()
        self._next = self._state = (epoch, batch * self.stride)

    def _detach_running(self) -> None:
        if self._current is not None and (running := self._current()) is not None:
            running.leads = False

    @property
    def epoch(self) -> int:
        """The epoch of the first batch that has not been handed out."""
        return self._state[0]

    def state_dict(self) -> dict[str, Any]:
        """The loader's position as plain values: the first sample of all processes that is not handed out yet.

        The same for all processes that are at the same batch. Another number of processes, or loaders with another
        batch size, continue from it: over all of them, each sample of the epoch still comes once.
        """
        return {"version": STATE_VERSION, "epoch": self._state[0], "position": self._state[1]} | self._identity()

    def _identity(self) -> dict[str, Any]:
        """Settings that must agree for a position to mean the same sample."""
        augment = self.augment  # without a flip its state is that of older versions
        strengths = augment and [augment.shift, augment.rotation, augment.scale, *[True] * augment.flip]
        draw = self._epoch_order.draw
        return {
            "seed": self.seed,
            "order": self.order,
            "augment": strengths,
            "samples": self._epoch_order.total,
            "indices": f"{zlib.crc32(self.indices.data):08x}",
            "file": self.file.fingerprint,
        } | (draw.identity if draw else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next loop begins where `state` was taken; for a loop under way, see `set_epoch`.

        The batch size and the number of processes may differ from those of then. States of version 2 are read too.

        Raises:
            DataError: the state is of another file or of other settings; both values are named.
        """
        state = with_position(state)
        for key, here in self._identity().items():
            if state.get(key) != here:
                raise DataError(
                    f"the loader's state was taken with {key} {state.get(key)}, this loader has {here}; "
                    f"open {self.file.path} with those settings, or start again"
                )
        epoch, position, samples = state.get("epoch"), state.get("position"), self._epoch_order.total
        if not (type(epoch) is type(position) is int and epoch >= 0 and 0 <= position < samples):
            raise DataError(
                f"the loader's state names sample {position} of epoch {epoch}; an epoch has {samples} samples"
            )
        self._detach_running()
        self._next = self._state = (epoch, position)

    def _settings(self) -> dict[str, Any]:
        """The constructor's arguments, but for the file."""
        return {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "device": str(self.device),
            "dtype": self.dtype,
            "moments": self.moments,
            "augment": self.augment,
            "order": self.order,
            "drop_last": self.drop_last,
            "rank": self.rank,
            "world_size": self.world_size,
            "uneven": self._uneven,
            "indices": None if self._all else self.indices,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process opens the file itself and continues with the same batch."""
        self._check_open()
        return _restored, (type(self), self.file.__reduce__(), self._settings(), self.state_dict())

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"the loader of {self.file.path} is closed; make a new one")
        if self.needs_file:
            self.file.check_open()

    def close(self) -> None:
        """Releases memory and threads, and the file if it was opened here. Batches that are held stay valid."""
        self._closed = True
        if self._owns_file:
            self.file.close()

    def __enter__(self: AnyLoader) -> AnyLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Epoch(Iterator[Any]):
    """One epoch's batches, for one thread: with two, neither their share nor the position would be known.

    The first `next` begins the epoch: frameworks make iterators that they never use.
    """

    _epoch: int  # these four once it has begun
    _position: int  # of the next batch, in the order of all processes
    _end: int  # after the last batch
    _advance: Callable[[], Any]

    def __init__(self, loader: EpochLoader, make: Callable[[EpochPlan, int], Iterator[Any]], together: int) -> None:
        self._loader, self.make, self._stride = loader, make, together * loader.stride
        self._thread: threading.Thread | None = None  # the first one that took a batch
        self._identifier = 0  # of that thread
        self._done = False
        self.leads = True  # moves the loader's position, until another epoch begins or the position is set

    def check_thread(self) -> None:
        """Raises RuntimeError when another thread that still lives has taken batches of this epoch."""
        if not self._done and self._thread not in (None, threading.current_thread()) and self._thread.is_alive():
            raise RuntimeError(
                "another thread is in the middle of an epoch of this loader; let it finish, or give each thread a "
                "loader of its own (with rank and world_size to share the samples)"
            )

    def __next__(self) -> Any:
        if self._identifier != get_ident():
            self.check_thread()
            if self._thread is None:
                self._epoch, self._position, self._end, batches = self._loader._begin(self)
                self._advance = batches.__next__
            self._thread, self._identifier = threading.current_thread(), get_ident()
        loader = self._loader
        if loader._closed or loader.file.closed:
            loader._check_open()
        try:
            batch = self._advance()
        except BaseException:
            self._done = True
            raise
        self._position = position = self._position + self._stride
        if self.leads:
            loader._state = (self._epoch, position) if position < self._end else (self._epoch + 1, 0)
        return batch


def joined(images: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Batches (B, C, H, W), or (views, B, C, H, W), as one; each view in channels_last."""
    if images[0].dim() == 4:
        return torch.cat(images)
    return torch.cat([batch.movedim(2, 4) for batch in images], 1).movedim(4, 2)


def with_position(state: dict[str, Any]) -> dict[str, Any]:
    """A state of this version; one of version 2 counts batches. Raises DataError for any other."""
    version = state.get("version")
    if version == 2:
        batch, size, processes = (state.get(name) for name in ("batch", "batch_size", "world_size"))
        if isinstance(batch, int) and isinstance(size, int) and isinstance(processes, int):
            return state | {"position": batch * size * processes}
    elif version == STATE_VERSION:
        return state
    raise DataError(f"the loader's state has version {version}, or is damaged; 2 and {STATE_VERSION} can be read")


def process_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """(rank, world_size) as given, or of torch.distributed; raises ConfigError when they do not fit."""
    if (rank is None) != (world_size is None):
        raise ConfigError(f"rank {rank} and world_size {world_size} come together, or neither is given")
    if rank is None or world_size is None:
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return 0, 1
        return distributed.get_rank(), distributed.get_world_size()
    rank, world_size = whole_number("rank", rank), whole_number("world_size", world_size, 1)
    if rank >= world_size:
        raise ConfigError(f"rank {rank} must be 0 to world_size - 1, which is {world_size - 1}")
    return rank, world_size


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ConfigError, naming the allowed values, unless `value` is one of them."""
    if value not in allowed:
        raise ConfigError(f"{name} {value!r} is none of {', '.join(allowed)}")


def _restored(
    kind: type[EpochLoader], file: tuple[Any, ...], settings: dict[str, Any], state: dict[str, Any]
) -> EpochLoader:
    make, arguments = file
    loader = kind(make(*arguments), **settings)
    loader._owns_file = True  # nobody else has it
    loader.load_state_dict(state)
    return loader
