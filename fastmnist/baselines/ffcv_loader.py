"""FFCV's own Loader behind the interface of ours; ffcv is imported when one is made."""

from __future__ import annotations

import queue
import sys
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import numba
import numpy as np
import torch

from fastmnist.baselines.dataloaders import Baseline, Data
from fastmnist.baselines.workers import LONGEST_WAIT
from fastmnist.errors import ConfigError
from fastmnist.loader.epochs import Batch
from fastmnist.loader.order import EpochPlan
from fastmnist.loader_settings import FFCV, checked_numbers

LIVENESS_SECONDS = 0.5  # between two checks that FFCV's thread still runs while its batch is waited for
HOW_TO_GET_FFCV = (
    "on Debian and Ubuntu: apt-get install libopencv-dev libturbojpeg0-dev pkg-config, then "
    "pip install '.[ffcv]'; on Colab the same two lines, each with ! before it"
)


class FFCVLoader(Baseline):
    """FFCV's own Loader over the same file (G. Leclerc et al., "FFCV: Accelerating training", CVPR 2023).

    Epochs have FFCV's own order. FFCV cannot begin within an epoch: to resume there, the batches that were handed out
    are read again. It sets the number of threads of torch and of numba for the whole process; both are restored. Two
    effects stay: the threads that numba has started, and numba's array types, which FFCV makes read-only; `Loader`
    mends those for itself (`kernels.mend_array_types`).

    Args:
        data, batch_size, common: as for `Loader`, without `dtype` and `augment`. FFCV has no `uneven` and no ranks.
        workers: threads that gather a batch, at most as many as numba has.
        batches_ahead: ready before they are asked for.
        os_cache: read through the system's page cache; False reads pages into FFCV's own memory.
        reuse_buffers: hand out FFCV's own memory, valid until the next batch, instead of a copy.

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
        workers, batches_ahead = checked_numbers(FFCV, workers=workers, batches_ahead=batches_ahead)
        most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
        if workers > most:
            raise ConfigError(f"workers {workers}: numba has {most} threads for FFCV here")
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
        # FFCV shuffles this in place, which would make an epoch's quasi-random order depend on earlier calls.
        self._pages_before = getattr(self._loader.traversal_order, "page_to_samples_array", np.empty(0)).copy()

    @property
    def needs_file(self) -> bool:
        return True

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {name: getattr(self, name) for name in (*FFCV, "reuse_buffers")}

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"order": f"ffcv {self.order}"}

    def _plan(self, epoch: int, start: int = 0) -> EpochPlan:
        traversal = self._loader.traversal_order
        traversal.page_to_samples_array = self._pages_before.copy()
        return EpochPlan(epoch, np.array(traversal.sample_order(epoch), np.int64)[start:])

    def _run(self, plan: EpochPlan, first: int) -> Generator[Batch]:
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with ExitStack() as leaving:
            with _thread_counts_kept(), on_device:
                if self.os_cache:
                    _ = self._loader.memory_manager.state_type  # FFCV compiles by it: see kernels.mend_array_types
                self._loader.next_traversal_order = lambda: plan.rows
                thread = iter(self._loader)
                leaving.callback(_end, thread)
                self._wait(thread)  # the thread sets the thread counts too, before its first batch
            for number in range(-(-self._taken(plan) // self.batch_size)):
                self._wait(thread)
                fields = next(thread)
                if number >= first:
                    yield self._batch(fields)

    def _wait(self, thread: Any) -> None:
        """Waits for a batch in the queue of FFCV's thread, which puts nothing there when it fails."""
        waiting = thread.output_queue
        with waiting.not_empty:
            while not waiting.queue:
                if not thread.is_alive():
                    raise RuntimeError(f"{self.file.path}: FFCV's thread ended by an error, which is printed above")
                waiting.not_empty.wait(LIVENESS_SECONDS)

    def _batch(self, fields: Sequence[torch.Tensor]) -> Batch:
        named = dict(zip(self._loader.pipeline_specs, fields, strict=True))  # in the file's order, not the pipelines'
        labels = named[self.file.label_field].view(-1)
        images = named[self.file.image_field].view(-1, *self.file.image_shape).permute(0, 3, 1, 2)
        if not self.reuse_buffers:
            images, labels = images.clone(), labels.clone()
        return images.to(self.device), labels.to(self.device)

    def close(self) -> None:
        super().close()
        self._loader = None


def _import_ffcv() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FFCV 1.0 of 2023 warns about today's numpy and numba
            import ffcv.fields.decoders
            import ffcv.loader
            import ffcv.transforms
    except (ImportError, OSError) as error:  # OSError: it lacks a shared library
        raise ConfigError(f"FFCV's loader needs ffcv, which cannot be imported ({error}); {HOW_TO_GET_FFCV}") from error
    return ffcv


@contextmanager
def _thread_counts_kept() -> Iterator[None]:
    torch_threads, numba_threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        numba.set_num_threads(numba_threads)


def _end(thread: Any) -> None:
    """Ends FFCV's thread within an epoch; by itself it may wait forever to hand over its last batch."""
    thread.terminate_event.set()
    thread.iter_ixes = iter(())  # nothing more to load
    give_up = time.monotonic() + LONGEST_WAIT
    while thread.is_alive() and time.monotonic() < give_up and not sys.is_finalizing():
        with suppress(queue.Empty):
            thread.output_queue.get_nowait()  # room for its next batch
        thread.join(0.01)
    thread.close()  # ends its page-reading threads
