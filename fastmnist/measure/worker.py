"""Worker processes: one contender of a comparison each, driven by JSON lines over pipes.

`WorkerProcess` is the parent's end. `main` is the program of the child: it reads a command per line from standard input
and answers each with a line. Whatever else is printed there goes to standard error.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, ClassVar

import psutil

if TYPE_CHECKING:
    import torch

    from fastmnist.loader.epochs import Batch
    from fastmnist.measure.contenders import Source

KIBI = 1024


class WorkerError(Exception):
    """The contender could not be measured; the message says what happened."""


class WorkerProcess:
    """A new process for one contender, in a session of its own, so that a signal reaches its children too.

    It imports from where this process does: with `-m`, a clone in the current folder would shadow the installed package
    and its cached machine code.

    Args:
        contender: its name.
        environment: variables beyond those of this process.
    """

    program: ClassVar[Sequence[str]] = (
        sys.executable,
        "-c",
        "import sys; sys.path[:] = sys.argv[1:]; from fastmnist.measure.worker import main; main()",
    )

    def __init__(self, contender: str, environment: Mapping[str, str] | None = None) -> None:
        self.contender = contender
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            [*self.program, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | dict(environment or {}),
            text=True,
            start_new_session=True,
        )
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def send(self, command: str, **arguments: Any) -> None:
        """Sends a command, a method of `Worker`, without waiting for its answer."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died; `receive` says why
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()

    def receive(self, timeout: float) -> dict[str, Any]:
        """The answer to the oldest command that has none yet.

        Raises:
            WorkerError: no answer within `timeout` seconds, the process has ended, or the command failed there. The
                process is closed.
        """
        try:
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            self.close()
            raise WorkerError(f"no answer within {timeout:.0f} s: stopped") from None
        if not line:
            status = self._process.wait()
            last = self._last_words()
            self.close()
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            raise WorkerError(f"its process ended with {how}{': ' if last else ''}{last}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self.close()
            raise WorkerError(" ".join(str(answer["error"]).split()))
        return answer

    def request(self, command: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """Sends a command and returns its answer; raises as `receive` does."""
        self.send(command, **arguments)
        return self.receive(timeout)

    def pause(self) -> None:
        """Stops the process and its children, so that they take nothing from what is measured now."""
        self._signal("SIGSTOP")

    def resume(self) -> None:
        self._signal("SIGCONT")

    def _signal(self, name: str) -> None:
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, getattr(signal, name))
            return
        act = {"SIGSTOP": "suspend", "SIGCONT": "resume", "SIGKILL": "kill"}[name]  # Windows, process by process
        with suppress(psutil.Error):
            process = psutil.Process(self._process.pid)
            for each in (process, *process.children(recursive=True)):
                with suppress(psutil.Error):
                    getattr(each, act)()

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return " ".join(" ".join(line.strip() for line in lines if line.strip()).split()[-60:])

    def close(self) -> None:
        """Kills the process and its children. A second call does nothing."""
        self._signal("SIGKILL")
        self._process.wait()
        self._reader.join(5)
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with suppress(OSError):
                    stream.close()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Worker:
    """The commands, one method each; the returned dictionary is the answer."""

    source: Source
    device: torch.device
    batches: Iterator[Batch]

    def imports(self, contender: str) -> dict[str, Any]:
        """Imports the contender's packages.

        Returns:
            seconds.
        """
        begun = time.perf_counter()
        import torch

        from fastmnist.baselines.peers import PEERS
        from fastmnist.measure.contenders import BY_NAME

        self.torch, self.contender = torch, BY_NAME[contender]
        if self.contender.kind == "peer":
            __import__(PEERS[self.contender.loader].module)
        return {"seconds": time.perf_counter() - begun}

    def write(self, data: str, folder: str) -> dict[str, Any]:
        """Writes the samples of a compiled file in a peer's own format, into an empty folder.

        Returns:
            seconds, bytes.
        """
        import numpy as np

        from fastmnist.baselines.peers import PEERS
        from fastmnist.beton.reader import Beton

        begun = time.perf_counter()
        with Beton(data) as file:
            images, labels = file.images(np.arange(len(file))), file.labels.copy()
        PEERS[self.contender.loader]().write(images, labels, Path(folder))
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        return {"seconds": time.perf_counter() - begun, "bytes": size}

    def open(self, data: str, batch_size: int, device: str, folder: str) -> dict[str, Any]:
        """Makes the loader, takes its first batch and runs one epoch.

        Returns:
            first_batch: seconds. compiled: functions that numba compiled instead of reading them from its cache.
            peak_memory: bytes that the epoch took beyond the imports. peak_device_memory: bytes, on a GPU.
            shape, dtype: of a batch of images.
        """
        from numba.core import event

        from fastmnist.measure.contenders import Source
        from fastmnist.system.machine import memory_in_use

        self.device = self.torch.device(device)
        if self.device.type == "cuda":
            self.torch.zeros(1, device=self.device)  # the context is nobody's first batch
        before = _reset_peak()
        begun = time.perf_counter()
        with event.install_recorder("numba:compile") as compilations:
            self.source = Source(self.contender, Path(data), batch_size, self.device, Path(folder))
            batches = self.source.epoch()
            images, labels = next(batches)
            self._synchronize()
            first = time.perf_counter() - begun
        compiled = sum(compilation.is_start for _, compilation in compilations.buffer)
        shape, dtype = list(images.shape), str(images.dtype).removeprefix("torch.")
        del images, labels
        for _ in batches:
            pass
        memory = None if before is None else _peak() - before + memory_in_use(children_only=True)
        answer: dict[str, Any] = {"first_batch": first, "compiled": compiled, "peak_memory": memory}
        answer |= {"shape": shape, "dtype": dtype}
        if self.device.type == "cuda":
            answer["peak_device_memory"] = self.torch.cuda.max_memory_allocated(self.device)
        self.batches = self.source.stream()
        return answer

    def turn(self, warm_up: float, seconds: float) -> dict[str, Any]:
        """Loads for so many seconds after a warm-up, or for one epoch.

        Returns:
            images, seconds, cpu_seconds: those of the process and its children.
        """
        if self.contender.whole_epochs:
            return self._timed(self.source.epoch(), float("inf"))
        self._timed(self.batches, warm_up)
        return self._timed(self.batches, seconds)

    def _timed(self, batches: Iterator[Batch], seconds: float) -> dict[str, Any]:
        from fastmnist.system.machine import cpu_seconds

        self._synchronize()
        used = cpu_seconds()
        images, begun = 0, time.perf_counter()
        for _, labels in batches:
            images += len(labels)
            if time.perf_counter() - begun >= seconds:
                break
        self._synchronize()
        taken = time.perf_counter() - begun
        return {"images": images, "seconds": taken, "cpu_seconds": cpu_seconds() - used}

    def _synchronize(self) -> None:
        from fastmnist.system.machine import synchronize

        synchronize(self.device)


def _reset_peak() -> int | None:
    """Resident bytes, from which the peak counts from now on; None where the system cannot reset it (Linux can)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _peak()
    except OSError:
        return None


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return KIBI * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = Worker()
    for line in sys.stdin:
        arguments = json.loads(line)
        command: Callable[..., dict[str, Any]] = getattr(worker, arguments.pop("command"))
        try:
            answer = command(**arguments)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # without waiting for a loader's threads
