"""Loader: batches from a compiled file, one gather each, in place of a DataLoader."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import TracebackType
from typing import Any, Literal, get_args

import numpy as np
import torch
from joblib import cpu_count

from fastmnist.data.beton import Beton, Verify
from fastmnist.data.buffers import BufferPool
from fastmnist.data.host import available_memory, pick_device, process_rank
from fastmnist.data.kernels import Normaliser, gather, gather_float32, gather_looked_up, normalisation_table
from fastmnist.data.order import EpochOrder, Kind, Uneven
from fastmnist.data.transfer import Batch, copied_batches
from fastmnist.errors import ConfigError, DataError

DTYPES = (torch.uint8, torch.float32, torch.float16, torch.bfloat16)
STATE_VERSION = 1
RESIDENT_SHARE = 0.5  # of the free device memory that "auto" gives to the images
BYTES_PER_THREAD = 1 << 20  # of output; below, handing work to a second thread costs more than it saves


class Loader:
    """Iterates over epochs of a compiled file, batch by batch.

    Each `for` loop runs through one epoch, in that epoch's own order; the next loop runs through the next epoch, also
    when the last one was left early. The order depends on (seed, epoch) alone, not on placement, threads or prefetch.

    Args:
        data: a `.beton` file, or one that is open already.
        batch_size: images per batch.
        shuffle: a new order each epoch; otherwise the file's order.
        seed: of the order, 0 or more.
        device: where batches are; None takes the GPU when there is one.
        placement: "resident" keeps all images in the device's memory (on CPU: a copy in RAM); "stream" gathers from
            the memory map, on a GPU through pinned memory and a copy stream; "auto" is resident on a device whose
            free memory is at least twice the images, and streams otherwise and on CPU.
        dtype: torch.uint8, the stored values; or float32, float16, bfloat16: (value / 255 - mean) / std.
        order: "random"; "quasi_random", some pages of the file at a time (see `order.quasi_random_order`);
            "sequential"; "auto" is sequential without `shuffle`, quasi-random for a file larger than the memory that
            is available when it is streamed, else random.
        threads: that gather a batch on the host; 0 takes as many as pay, at most the cores there are.
        prefetch: batches on their way to a GPU ahead of the one that is handed out ("stream"). On a CPU the gather
            takes far less than a step, and runs when the batch is asked for.
        drop_last: leave out the last batch when it is not full.
        indices: (n,) the samples to iterate over; None takes all.
        rank, world_size: which of how many processes this is; None asks torch.distributed, or means 0 of 1. Each
            sample goes to one process, and all get equally many.
        uneven: what happens when world_size does not divide the samples: "pad" repeats some, "drop" leaves some out.
        reuse_buffers: hand out the same host memory each time: a batch is then valid only until the next one.
        verify: how the file is checked when it is opened here ("size" or "full").

    Yields:
        images (B, C, H, W) in channels_last, of `dtype`, and labels (B,) int64, both on `device`. A batch stays valid
        for as long as it is held.

    Raises:
        DataError: the file cannot be used. ConfigError: a setting cannot work.
    """

    def __init__(
        self,
        data: str | os.PathLike[str] | Beton,
        batch_size: int = 512,
        *,
        shuffle: bool = True,
        seed: int = 0,
        device: str | torch.device | None = None,
        placement: Literal["auto", "resident", "stream"] = "auto",
        dtype: torch.dtype = torch.uint8,
        order: Literal["auto"] | Kind = "auto",
        threads: int = 0,
        prefetch: int = 3,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        uneven: Uneven = "pad",
        indices: Sequence[int] | np.ndarray | None = None,
        reuse_buffers: bool = False,
        verify: Verify = "size",
    ) -> None:
        if batch_size < 1 or seed < 0 or threads < 0 or prefetch < 0:
            raise ConfigError(
                f"batch_size {batch_size} must be at least 1; seed {seed}, threads {threads} and prefetch {prefetch} "
                "at least 0"
            )
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype} is none of {', '.join(str(d) for d in DTYPES)}")
        for name, value, allowed in (
            ("placement", placement, ("auto", "resident", "stream")),
            ("order", order, ("auto", *get_args(Kind))),
            ("uneven", uneven, get_args(Uneven)),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} {value!r} is none of {', '.join(allowed)}")
        self._owns_file = not isinstance(data, Beton)
        self.file = data if isinstance(data, Beton) else Beton(data, verify)
        self.file.check_open()
        self.batch_size, self.seed, self.drop_last = batch_size, seed, drop_last
        self.device = pick_device(device)
        self.dtype, self.prefetch = dtype, prefetch
        self.indices = self._checked_indices(indices)
        self.placement = self._choose_placement(placement)
        self.order: Kind = self._choose_order(shuffle) if order == "auto" else order
        self.rank, self.world_size = process_rank(rank, world_size)
        self._epoch_order = EpochOrder(
            len(self.indices),
            self.order,
            seed,
            self.file.offsets[self.indices] // self.file.page_size if self.order == "quasi_random" else None,
            self.rank,
            self.world_size,
            uneven,
        )
        if not len(self._epoch_order):
            raise ConfigError(
                f"{len(self.indices)} samples cannot be dealt to {self.world_size} processes; take uneven='pad'"
            )
        self.threads = threads or cpu_count()
        self._next = (0, 0)  # (epoch, batch) that the next loop starts with
        self._state = (0, 0)  # the first batch that has not been handed out
        self._closed = False
        self._workers: ThreadPoolExecutor | None = None
        self._prepare(reuse_buffers)

    def _checked_indices(self, indices: Sequence[int] | np.ndarray | None) -> np.ndarray:
        if indices is None:
            return np.arange(len(self.file))
        chosen = np.array(indices)  # a copy: the kernels rely on what is checked here
        if chosen.size and not np.issubdtype(chosen.dtype, np.integer):
            raise ConfigError(f"indices must be whole numbers, not {chosen.dtype}; for a mask say np.flatnonzero(mask)")
        chosen = chosen.astype(np.int64)
        if chosen.ndim != 1 or not len(chosen) or chosen.min() < 0 or chosen.max() >= len(self.file):
            raise ConfigError(
                f"indices must be a list of at least one sample, each 0 to {len(self.file) - 1}; "
                f"got shape {chosen.shape}, values {chosen.min(initial=0)} to {chosen.max(initial=0)}"
            )
        return chosen

    def _choose_placement(self, placement: str) -> str:
        if placement != "auto":
            return placement
        if self.device.type == "cpu":
            return "stream"
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            return "resident" if len(self.indices) * self.file.image_size < RESIDENT_SHARE * free else "stream"
        return "resident"

    def _choose_order(self, shuffle: bool) -> Kind:
        if not shuffle:
            return "sequential"
        too_large = self.placement == "stream" and self.file.file_size > available_memory()
        return "quasi_random" if too_large else "random"

    def _prepare(self, reuse: bool) -> None:
        file, size = self.file, self.file.image_size
        if self.dtype != torch.uint8:  # the statistics of a file without ours take a pass over it
            self._normalise = Normaliser(*file.moments, self.device)
        self._on_device = self.placement == "resident" and self.device.type != "cpu"
        self._data, self._offsets, self._labels = np.asarray(file.data), file.offsets, file.labels
        self._rows: np.ndarray | None = self.indices  # of _offsets and _labels; None where position and row agree
        if self.placement == "resident":
            dense = np.empty((len(self.indices), size), np.uint8)
            gather(self._data, self._offsets, self.indices, dense)
            self._labels = file.labels[self.indices]
            self._rows = None
            if self._on_device:
                self._device_images = torch.from_numpy(dense).to(self.device)
                self._device_labels = torch.from_numpy(self._labels).to(self.device)
                return
            dense.flags.writeable = False  # like the map, so that one compiled kernel serves both
            self._data, self._offsets = dense.reshape(-1), np.arange(len(dense)) * size
        # A batch for another device is normalised there: a quarter of the bytes to copy.
        host_dtype = self.dtype if self.device.type == "cpu" else torch.uint8
        self._kernel, self._constants = _kernel(file, host_dtype)
        self._image_pool = BufferPool(self.batch_size, size, host_dtype, reuse=reuse)
        self._label_pool = BufferPool(self.batch_size, 1, torch.int64, reuse=reuse)

    def __len__(self) -> int:
        """Batches per epoch."""
        full, rest = divmod(len(self._epoch_order), self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def __iter__(self) -> Iterator[Batch]:
        self._check_open()
        epoch, batch = self._next
        self._state = (epoch, batch) if len(self) else (epoch + 1, 0)
        self._next = (epoch + 1, 0)
        return self._epoch(epoch, batch)

    def _epoch(self, epoch: int, first: int) -> Iterator[Batch]:
        self._check_open()
        positions = self._epoch_order(epoch)
        order = positions if self._rows is None else self._rows[positions]
        size = self.batch_size
        parts = (order[k * size : (k + 1) * size] for k in range(first, len(self)))
        batches: Iterator[Batch]
        if self._on_device:
            batches = self._device_batches(order, first)
        elif self.device.type == "cuda":
            batches = copied_batches(
                parts,
                self._fill,
                lambda rows: self._finish(self._shape(rows)),
                (self.batch_size, self.file.image_size),
                self.device,
                self.prefetch,
            )
        else:
            batches = map(self._host_batch, parts)
        for number, batch in enumerate(batches, first + 1):
            self._state = (epoch, number) if number < len(self) else (epoch + 1, 0)
            yield batch
            self._check_open()

    def epoch_indices(self, epoch: int) -> np.ndarray:
        """(n,) int64: the samples of that epoch as this process hands them out, those of the last batch too if kept."""
        return self.indices[self._epoch_order(epoch)][: len(self) * self.batch_size]

    def _shape(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, H * W * C) as (B, C, H, W) in channels_last, without a copy."""
        return rows.view(-1, *self.file.image_shape).permute(0, 3, 1, 2)

    def _gather(self, part: np.ndarray, out: np.ndarray) -> None:
        self._kernel(self._data, self._offsets, part, *self._constants, out)

    def _gather_in_threads(self, part: np.ndarray, out: np.ndarray) -> None:
        threads = min(self.threads, out.nbytes // BYTES_PER_THREAD, len(part))
        if threads < 2:
            return self._gather(part, out)
        if self._workers is None:
            self._workers = ThreadPoolExecutor(self.threads - 1, "fastmnist-gather")
        cuts = np.linspace(0, len(part), threads + 1).astype(int)
        pieces = [slice(a, b) for a, b in pairwise(cuts)]
        others = [self._workers.submit(self._gather, part[piece], out[piece]) for piece in pieces[1:]]
        self._gather(part[pieces[0]], out[pieces[0]])
        for other in others:
            other.result()
        return None

    def _host_batch(self, part: np.ndarray) -> Batch:
        memory, rows = self._image_pool.take(len(part))
        label_memory, labels = self._label_pool.take(len(part))
        self._fill(part, memory, label_memory[:, 0])
        images, labels = self._shape(rows), labels.view(-1)
        if self.device.type == "cpu":
            return images, labels
        return self._finish(images.to(self.device)), labels.to(self.device)

    def _finish(self, images: torch.Tensor) -> torch.Tensor:
        """Normalises on the device where a float type was asked for."""
        return images if self.dtype == torch.uint8 else self._normalise(images, self.dtype)

    def _device_batches(self, order: np.ndarray, first: int) -> Iterator[Batch]:
        on_device = torch.from_numpy(np.ascontiguousarray(order)).to(self.device)
        for start in range(first * self.batch_size, len(self) * self.batch_size, self.batch_size):
            part = on_device[start : start + self.batch_size]
            images = self._shape(self._device_images.index_select(0, part))
            yield self._finish(images), self._device_labels.index_select(0, part)

    def _fill(self, part: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        self._gather_in_threads(part, images)
        np.take(self._labels, part, out=labels, mode="clip")  # "raise" would copy through a buffer

    def set_epoch(self, epoch: int) -> None:
        """The next loop runs through this epoch, from its first batch."""
        if epoch < 0:
            raise ConfigError(f"epoch is 0 or more, not {epoch}")
        self._next = self._state = (epoch, 0)

    @property
    def epoch(self) -> int:
        """The epoch of the first batch that has not been handed out."""
        return self._state[0]

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, as plain values: the first batch that has not been handed out yet."""
        return {"version": STATE_VERSION, "epoch": self._state[0], "batch": self._state[1]} | self._identity()

    def _identity(self) -> dict[str, Any]:
        """What must agree for a position to mean the same batch."""
        return {
            "seed": self.seed,
            "order": self.order,
            "batch_size": self.batch_size,
            "drop_last": self.drop_last,
            "world_size": self.world_size,
            "uneven": self._epoch_order.uneven,
            "samples": len(self.indices),
            "indices": f"{zlib.crc32(self.indices.tobytes()):08x}",
            "file": self.file.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next loop goes on with the batch that `state` names.

        Raises:
            DataError: the state is of another file or of other settings; both values are named.
        """
        if state.get("version") != STATE_VERSION:
            raise DataError(f"the loader's state has version {state.get('version')}; {STATE_VERSION} is needed")
        for key, here in self._identity().items():
            if state.get(key) != here:
                raise DataError(
                    f"the loader's state was taken with {key} {state.get(key)}, this loader has {here}; "
                    f"open {self.file.path} with the settings of then, or begin anew"
                )
        epoch, batch = state.get("epoch"), state.get("batch")
        if not (isinstance(epoch, int) and isinstance(batch, int) and epoch >= 0 and 0 <= batch < max(len(self), 1)):
            raise DataError(
                f"the loader's state names batch {batch} of epoch {epoch}; an epoch has {len(self)} batches"
            )
        self._next = self._state = (epoch, batch)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"the loader of {self.file.path} is closed; make a new one")
        self.file.check_open()

    def close(self) -> None:
        """Ends the helper threads, lets go of the memory, closes the file if it was opened here.

        Batches that are held stay valid.
        """
        self._closed = True
        if self._workers is not None:
            self._workers.shutdown()
            self._workers = None
        self._data = np.empty(0, np.uint8)
        self._device_images = self._device_labels = torch.empty(0)
        if self._owns_file:
            self.file.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _kernel(file: Beton, dtype: torch.dtype) -> tuple[Callable[..., None], tuple[np.ndarray, ...]]:
    """The function that gathers a batch as `dtype`, and the arrays that it takes before `out`."""
    if dtype == torch.uint8:
        return gather, ()
    if dtype == torch.float32:
        mean, std = (np.array(values, np.float32) for values in file.moments)
        return gather_float32, (mean, std)
    return gather_looked_up, (normalisation_table(*file.moments, dtype),)
