"""Processes that are asked one thing at a time, with a time limit: what crashes or hangs there costs its own row."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import IO, Any, ClassVar


class SideError(Exception):
    """The side could not be measured; the message says what happened."""


class SideProcess:
    """`fastmnist.measure.side` in a new process, in a session of its own, so that Ctrl-C and a kill reach its workers.

    It imports from where this process does: with `-m`, a clone in the current folder would hide the installed package,
    and its machine code, which is cached beside it, be another's.

    Args:
        side: its name.
        environment: variables beyond those of this process.
    """

    program: ClassVar[Sequence[str]] = (
        sys.executable,
        "-c",
        "import sys; sys.path[:] = sys.argv[1:]; from fastmnist.measure.worker import main; main()",
    )

    def __init__(self, side: str, environment: Mapping[str, str] | None = None) -> None:
        self.side = side
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

    def tell(self, do: str, **command: Any) -> None:
        """Sends a command; `answer` waits for what it gives."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died, which the answer says
            self._process.stdin.write(json.dumps({"do": do, **command}) + "\n")
            self._process.stdin.flush()

    def answer(self, timeout: float) -> dict[str, Any]:
        """The answer to the last command.

        Raises:
            SideError: none within `timeout` seconds, the process has ended, or the command failed there. The process
                is gone then.
        """
        try:
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            self.close()
            raise SideError(f"no answer within {timeout:.0f} s: stopped") from None
        if not line:
            status = self._process.wait()
            last = self._last_words()
            self.close()
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            raise SideError(f"its process ended with {how}{': ' if last else ''}{last}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            self.close()
            raise SideError(" ".join(str(found["error"]).split()))
        return found

    def ask(self, do: str, timeout: float, **command: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer; raises as `answer` does."""
        self.tell(do, **command)
        return self.answer(timeout)

    def pause(self) -> None:
        """Stops the process and its workers where they are, so that they take nothing from what is measured now."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After `pause`."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return " ".join(" ".join(line.strip() for line in lines if line.strip()).split()[-60:])

    def close(self) -> None:
        """Ends the process and all that it has begun. A second call does nothing."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._reader.join(5)
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with suppress(OSError):
                    stream.close()

    def __enter__(self) -> SideProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
