"""One side of a comparison in a process of its own: what it costs to import, to begin, to keep and to run.

    python -m fastmnist.measure.worker

reads commands from standard input, a JSON object a line, and answers each with one. Whatever else is printed goes to
standard error, so that no library's chatter is taken for an answer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from fastmnist.loader.epochs import Batch
    from fastmnist.measure.contenders import Source

KIBI = 1024


class Runner:
    """Carries out the commands, one method each; what they return is the answer."""

    source: Source
    device: torch.device
    batches: Iterator[Batch]

    def imports(self, side: str) -> dict[str, Any]:
        """Imports what the side needs; seconds of it."""
        begun = time.perf_counter()
        import torch

        from fastmnist.baselines.peers import PEERS
        from fastmnist.measure.contenders import BY_NAME

        self.torch, self.side = torch, BY_NAME[side]
        if self.side.kind == "peer":
            __import__(PEERS[self.side.loader].module)
        return {"seconds": time.perf_counter() - begun}

    def write(self, data: str, folder: str) -> dict[str, Any]:
        """Writes the samples in a peer's own format."""
        from fastmnist.measure.contenders import write_for_peer

        begun = time.perf_counter()
        write_for_peer(self.side, Path(data), Path(folder))
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        return {"seconds": time.perf_counter() - begun, "bytes": size}

    def open(self, data: str, batch_size: int, device: str, folder: str) -> dict[str, Any]:
        """Makes the loader and takes its first batch, then one epoch.

        Returns:
            first_batch: seconds. compiled: functions that numba compiled for it, rather than read from its cache.
            peak_memory: bytes beyond the imports, of the epoch; and shape and dtype of a batch of images.
        """
        from numba.core import event

        from fastmnist.measure.contenders import Source

        self.device = self.torch.device(device)
        if self.device.type == "cuda":
            self.torch.zeros(1, device=self.device)  # the context is nobody's first batch
        before = _forget_peak()
        begun = time.perf_counter()
        with event.install_recorder("numba:compile") as compiling:
            self.source = Source(self.side, Path(data), batch_size, self.device, Path(folder))
            batches = self.source.epoch()
            images, labels = next(batches)
            self._synchronize()
            first = time.perf_counter() - begun
        compiled = sum(found.is_start for _, found in compiling.buffer)
        shape, dtype = list(images.shape), str(images.dtype).removeprefix("torch.")
        del images, labels
        for _ in batches:
            pass
        memory = None if before is None else _peak() - before + _of_children()
        answer: dict[str, Any] = {"first_batch": first, "compiled": compiled, "peak_memory": memory}
        answer |= {"shape": shape, "dtype": dtype}
        if self.device.type == "cuda":
            answer["peak_device_memory"] = self.torch.cuda.max_memory_allocated(self.device)
        self.batches = self.source.stream()
        return answer

    def turn(self, warm_up: float, seconds: float) -> dict[str, Any]:
        """Images handed out and seconds taken, of a part of the stream or of one epoch."""
        if self.side.whole_epochs:
            return self._timed(self.source.epoch(), float("inf"))
        self._timed(self.batches, warm_up)
        return self._timed(self.batches, seconds)

    def _timed(self, batches: Iterator[Batch], seconds: float) -> dict[str, Any]:
        self._synchronize()
        images, begun = 0, time.perf_counter()
        for _, labels in batches:
            images += len(labels)
            if time.perf_counter() - begun >= seconds:
                break
        self._synchronize()
        return {"images": images, "seconds": time.perf_counter() - begun}

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize(self.device)


def _forget_peak() -> int | None:
    """Bytes that are resident now, from which on the peak counts; None where Linux's way to do so is missing."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _peak()
    except OSError:
        return None


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return KIBI * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _of_children() -> int:
    """Bytes of worker processes; what several of them share is counted once."""
    import psutil

    total = 0
    for child in psutil.Process().children(recursive=True):
        try:
            total += child.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    runner = Runner()
    for line in sys.stdin:
        command = json.loads(line)
        do: Callable[..., dict[str, Any]] = getattr(runner, command.pop("do"))
        try:
            answer = do(**command)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # a loader whose threads would keep the process is no longer asked


if __name__ == "__main__":
    main()
