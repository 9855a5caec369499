"""Other ways to load the same samples, behind the interface of `Loader`, so that whole runs can be compared."""

from __future__ import annotations

import os
import queue
import sys
import time
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any, ClassVar

import numba
import numpy as np
import torch
from joblib import cpu_count
from torch.utils.data import DataLoader
from torchvision import transforms

from fastmnist.data.beton import Beton
from fastmnist.data.epochs import Batch, EpochLoader
from fastmnist.data.kernels import gather
from fastmnist.data.loader import Loader
from fastmnist.data.order import AUGMENT_STREAM, Window, random_bits
from fastmnist.data.workers import LONGEST_WAIT, Batched, Coloured, Grey, Plan, batches_of, of_workers, unchanged
from fastmnist.errors import ConfigError

Data = str | os.PathLike[str] | Beton

LOOK_AGAIN = 0.5  # seconds between two looks at whether a thread that is waited for still runs
MOST_WORKERS = 4  # that workers=None takes
HOW_TO_GET_FFCV = (
    "on Debian and Ubuntu: apt-get install libopencv-dev libturbojpeg0-dev pkg-config, then "
    "pip install 'fastmnist[ffcv]'; on Colab the same two lines, each with ! before it"
)


class _Baseline(EpochLoader):
    """What these have in common: the one dtype that each makes, and that closing it ends what still runs."""

    makes: ClassVar[torch.dtype] = torch.uint8

    def __init__(self, data: Data, batch_size: int = 512, **common: Any) -> None:
        super().__init__(data, batch_size, dtype=self.makes, **common)
        self._running: weakref.WeakSet[Generator[Batch]] = weakref.WeakSet()

    @property
    def needs_file(self) -> bool:
        return False

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in super()._settings().items() if name != "dtype"}

    def _copy(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All images (n, H, W, C) uint8 and labels (n,) int64 that are iterated over, in memory of their own."""
        file = self.file
        images = np.empty((len(self.indices), file.image_size), np.uint8)
        gather(file.data, file.offsets, self.indices, 0, images)
        return torch.from_numpy(images).view(-1, *file.image_shape), torch.from_numpy(file.labels[self.indices])

    def _positions(self, epoch: int, first: int) -> np.ndarray:
        """(n,) int64: which of those are handed out, from batch `first` on."""
        return self._epoch_order(epoch)[first * self.batch_size : self._taken]

    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        running = self._run(epoch, first)
        self._running.add(running)
        return running

    @abstractmethod
    def _run(self, epoch: int, first: int) -> Generator[Batch]:
        """The same as a generator, which closing the loader closes."""

    def close(self) -> None:
        for running in list(self._running):
            running.close()
        super().close()


class PlainDataLoader(_Baseline):
    """What notebooks write: torchvision's MNIST, its transforms sample by sample, a DataLoader, `.to(device)`.

    Args:
        data, batch_size, common: as for `Loader`, without `dtype`. With `augment` RandomAffine moves each image.
        workers: processes, begun anew each epoch; 0 loads in this one. They are not forked from this process, because
            its threads would be lost there with what they hold: a script that asks for workers needs
            `if __name__ == "__main__"`.

    Yields:
        images float32, normalised: without `augment` the bits of `Loader(dtype=torch.float32)`, in the same order.
        With it, random bits come from (seed, epoch, batch) in this process: they repeat, also when a run is resumed.
        From workers they repeat only when an epoch is begun at the same batch, with as many workers.

    Raises:
        ConfigError: images that PIL does not hold (neither 1 nor 3 channels); a setting that cannot work.
        RuntimeError: an error in a worker, with its traceback; no batch within a minute.
    """

    makes = torch.float32

    def __init__(self, data: Data, batch_size: int = 512, *, workers: int = 0, **common: Any) -> None:
        check_workers(workers, 0)
        super().__init__(data, batch_size, **common)
        self.workers = workers
        height, width, channels = self.file.image_shape
        if channels not in (1, 3):
            raise ConfigError(f"{self.file.path}: PIL has no images of {channels} channels; take another loader")
        steps: list[Any] = [transforms.ToTensor(), transforms.Normalize(*self.file.moments)]
        if self.augment is not None:
            moves = self.augment
            affine = transforms.RandomAffine(
                moves.rotation,
                translate=(min(1.0, moves.shift / width), min(1.0, moves.shift / height)),
                scale=(1 - moves.scale, 1 + moves.scale),
                interpolation=transforms.InterpolationMode.BILINEAR,
            )
            steps.insert(0, affine)
        kind = Grey if channels == 1 else Coloured
        self._dataset = kind(*self._copy(), transforms.Compose(steps))

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"workers": self.workers}

    def _run(self, epoch: int, first: int) -> Generator[Batch]:
        seeds = random_bits(len(self), self.seed, epoch, AUGMENT_STREAM).tolist()[first:]
        loader = DataLoader(
            self._dataset,
            self.batch_size,
            sampler=self._positions(epoch, first).tolist(),
            generator=torch.Generator().manual_seed(seeds[0] if seeds else 0),  # seeds the workers
            **of_workers(self.workers),
        )
        batches = batches_of(loader)
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):  # the transforms draw from the bits that a model's dropout uses
                torch.default_generator.manual_seed(seed)
                images, labels = next(batches)
            yield images.to(self.device, memory_format=torch.channels_last), labels.to(self.device)


class TunedDataLoader(_Baseline):
    """A DataLoader as those write it who know it: whole batches by `__getitems__`, persistent workers, pinned memory.

    Args:
        data, batch_size, common: as for `Loader`, without `dtype` and `augment`.
        workers: processes, kept until the loader is closed; not forked, see `PlainDataLoader`. 0 loads in this one;
            None takes 0 for a CPU of two cores or fewer, else as many as there are cores, at most 4. The images are
            in shared memory then (/dev/shm must hold them), and on a CPU the batches too: each that is held takes two
            file descriptors.
        prefetch_factor: batches that each worker is ahead.

    Yields:
        images uint8: the batches of `Loader`, in the same order.

    Raises:
        RuntimeError: an error in a worker, with its traceback; no batch within a minute; with workers, a batch of an
            epoch when a later one has begun.
    """

    def __init__(
        self, data: Data, batch_size: int = 512, *, workers: int | None = None, prefetch_factor: int = 2, **common: Any
    ) -> None:
        check_workers(workers, 0)
        if prefetch_factor < 1:
            raise ConfigError(f"prefetch_factor {prefetch_factor} must be at least 1")
        super().__init__(data, batch_size, **common)
        if workers is None:
            workers = 0 if self.device.type == "cpu" and cpu_count() <= 2 else min(MOST_WORKERS, cpu_count())
        self.workers, self.prefetch_factor = workers, prefetch_factor
        self._plan: list[np.ndarray] = []  # what the workers are given next, batch by batch
        self._epochs_begun = 0
        self._loader: DataLoader[Batch] | None = DataLoader(
            Batched(*self._copy()),
            batch_sampler=Plan(self._plan),
            collate_fn=unchanged,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
            prefetch_factor=prefetch_factor if workers else None,
            generator=torch.Generator().manual_seed(0),  # or it draws from the bits that a model's dropout uses
            **of_workers(workers),
        )

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"workers": self.workers, "prefetch_factor": self.prefetch_factor}

    def _run(self, epoch: int, first: int) -> Generator[Batch]:
        assert self._loader is not None
        positions = self._positions(epoch, first)
        self._plan[:] = [positions[at : at + self.batch_size] for at in range(0, len(positions), self.batch_size)]
        self._epochs_begun += 1
        turn = self._epochs_begun
        for images, labels in batches_of(self._loader):
            yield (
                images.permute(0, 3, 1, 2).to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
            )
            if self.workers and turn != self._epochs_begun:  # the workers serve one epoch at a time
                raise RuntimeError("a later epoch of this loader has begun; begin this one anew (set_epoch)")

    def close(self) -> None:
        super().close()
        self._loader = None  # which ends its workers


class TensorLoader(_Baseline):
    """All images as one tensor on the device; a batch is its rows at a part of the epoch's permutation.

    Args:
        data, batch_size, common: as for `Loader`, without `dtype` and `augment`.

    Yields:
        images uint8: the batches of `Loader`, in the same order.
    """

    def __init__(self, data: Data, batch_size: int = 512, **common: Any) -> None:
        super().__init__(data, batch_size, **common)
        images, labels = self._copy()
        self._images, self._labels = images.to(self.device), labels.to(self.device)

    def _run(self, epoch: int, first: int) -> Generator[Batch]:
        positions = torch.from_numpy(self._positions(epoch, first)).to(self.device)
        for at in range(0, len(positions), self.batch_size):
            chosen = positions[at : at + self.batch_size]
            yield self._images.index_select(0, chosen).permute(0, 3, 1, 2), self._labels.index_select(0, chosen)

    def close(self) -> None:
        super().close()
        self._images = self._labels = torch.empty(0)


class FFCVLoader(_Baseline):
    """FFCV's own Loader over the same file (G. Leclerc et al., "FFCV: Accelerating training", CVPR 2023).

    It orders an epoch in its own way: `epoch_indices` says how. It cannot begin within an epoch: to resume there, the
    batches that were handed out are read once more. FFCV sets the number of threads of torch and of numba for the
    whole process; both are put back. What stays are the threads that numba keeps once they are started, and numba's
    types of arrays, which FFCV makes read-only: `Loader` mends them for itself (`jit.mend_array_types`).

    Args:
        data, batch_size, common: as for `Loader`, without `dtype` and `augment`. FFCV has no `uneven` and no ranks.
        workers: threads that gather a batch, at most as many as numba has.
        batches_ahead: that are ready before they are asked for.
        os_cache: read through the system's page cache; False reads pages into memory of FFCV's own.
        reuse_buffers: hand out FFCV's own memory, which is valid until the next batch is asked for, not a copy of it.

    Yields:
        images uint8.

    Raises:
        ConfigError: FFCV cannot be imported (says how to get it), or a setting cannot work.
        RuntimeError: an error in FFCV's thread, which Python has printed.
    """

    def __init__(
        self,
        data: Data,
        batch_size: int = 512,
        *,
        workers: int = 1,
        batches_ahead: int = 3,
        os_cache: bool = True,
        reuse_buffers: bool = False,
        **common: Any,
    ) -> None:
        check_workers(workers, 1)
        most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
        if workers > most:
            raise ConfigError(f"workers {workers}: numba has {most} threads for FFCV here")
        if batches_ahead < 1:
            raise ConfigError(f"batches_ahead {batches_ahead} must be at least 1")
        with _thread_counts_kept():
            ffcv = _import_ffcv()
        super().__init__(data, batch_size, **common)
        if self.world_size > 1:
            raise ConfigError(f"FFCV's loader serves one process here, not a world_size of {self.world_size}")
        self.workers, self.batches_ahead = workers, batches_ahead
        self.os_cache, self.reuse_buffers = os_cache, reuse_buffers
        move = [ffcv.transforms.ToDevice(self.device)] if self.device.type == "cuda" else []
        with _thread_counts_kept():
            self._loader = ffcv.loader.Loader(
                str(self.file.path.absolute()),
                batch_size,
                num_workers=workers,
                os_cache=os_cache,
                order=ffcv.loader.OrderOption[self.order.upper()],
                seed=self.seed,
                indices=None if self._all else self.indices,
                pipelines={
                    self.file.image_field: [ffcv.fields.decoders.NDArrayDecoder(), ffcv.transforms.ToTensor(), *move],
                    self.file.label_field: [ffcv.fields.decoders.IntDecoder(), ffcv.transforms.ToTensor(), *move],
                },
                drop_last=self.drop_last,
                batches_ahead=batches_ahead,
            )
        # FFCV shuffles this in place, so that an epoch's quasi-random order would depend on what was asked before.
        self._pages_before = getattr(self._loader.traversal_order, "page_to_samples_array", np.empty(0)).copy()

    @property
    def needs_file(self) -> bool:
        return True

    def _settings(self) -> dict[str, Any]:
        own = ("workers", "batches_ahead", "os_cache", "reuse_buffers")
        return super()._settings() | {name: getattr(self, name) for name in own}

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"order": f"ffcv {self.order}"}

    def _set_epoch_of_ffcv(self, epoch: int) -> None:
        self._loader.next_epoch = epoch
        self._loader.traversal_order.page_to_samples_array = self._pages_before.copy()

    def _samples(self, epoch: int) -> tuple[np.ndarray, list[Window]]:
        self._set_epoch_of_ffcv(epoch)
        return np.array(self._loader.next_traversal_order(), np.int64), []

    def _run(self, epoch: int, first: int) -> Generator[Batch]:
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with ExitStack() as leaving:
            with _thread_counts_kept(), on_device:
                if self.os_cache:
                    _ = self._loader.memory_manager.state_type  # see jit.mend_array_types: FFCV compiles by this
                self._set_epoch_of_ffcv(epoch)
                thread = iter(self._loader)
                leaving.callback(_end, thread)
                self._wait(thread)  # it sets the thread counts too, before its first batch
            for number in range(len(self)):
                self._wait(thread)
                found = next(thread)
                if number >= first:
                    yield self._batch(found)

    def _wait(self, thread: Any) -> None:
        """Until FFCV's thread has put something into its queue: it puts nothing when it fails."""
        waiting = thread.output_queue
        with waiting.not_empty:
            while not waiting.queue:
                if not thread.is_alive():
                    raise RuntimeError(f"{self.file.path}: FFCV's thread ended by an error, which is printed above")
                waiting.not_empty.wait(LOOK_AGAIN)

    def _batch(self, found: Sequence[torch.Tensor]) -> Batch:
        fields = dict(zip(self._loader.pipeline_specs, found, strict=True))  # in the file's order, not the pipelines'
        labels = fields[self.file.label_field].view(-1)
        images = fields[self.file.image_field].view(-1, *self.file.image_shape).permute(0, 3, 1, 2)
        if not self.reuse_buffers:
            images, labels = images.clone(), labels.clone()
        return images.to(self.device), labels.to(self.device)

    def close(self) -> None:
        super().close()
        self._loader = None


LOADERS: dict[str, type[EpochLoader]] = {
    "ours": Loader,
    "ffcv": FFCVLoader,
    "dataloader": PlainDataLoader,
    "tuned": TunedDataLoader,
    "tensors": TensorLoader,
}


def check_workers(workers: int | None, least: int) -> None:
    """Raises ConfigError naming the least."""
    if workers is not None and workers < least:
        raise ConfigError(f"workers {workers} must be at least {least}")


def _import_ffcv() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FFCV 1.0 is of 2023: what it says of today's numpy and numba is known
            import ffcv.fields.decoders
            import ffcv.loader
            import ffcv.transforms
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        raise ConfigError(f"FFCV's loader needs ffcv, which cannot be imported ({error}); {HOW_TO_GET_FFCV}") from error
    return ffcv


@contextmanager
def _thread_counts_kept() -> Iterator[None]:
    of_torch, of_numba = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(of_torch)
        numba.set_num_threads(of_numba)


def _end(thread: Any) -> None:
    """Ends FFCV's thread within an epoch: by itself it may wait for ever to be rid of its last batch."""
    thread.terminate_event.set()
    thread.iter_ixes = iter(())  # nothing more to load
    give_up = time.monotonic() + LONGEST_WAIT
    while thread.is_alive() and time.monotonic() < give_up and not sys.is_finalizing():
        with suppress(queue.Empty):
            thread.output_queue.get_nowait()  # room for what it puts
        thread.join(0.01)
    thread.close()  # the threads that read pages for it
