"""Worker processes: they answer, and any failure is one line that leaves no process behind."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fastmnist.measure.worker import WorkerError, WorkerProcess

ECHO = "import sys, json\nfor line in sys.stdin: print(json.dumps({'got': json.loads(line)}), flush=True)"


def started(script: str) -> WorkerProcess:
    kind = type("Planted", (WorkerProcess,), {"program": (sys.executable, "-c", script)})
    return kind("planted")


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # A child of a child, that nobody has waited for yet, is a zombie.
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert happened()


def test_it_answers_one_after_the_other() -> None:
    with started(ECHO) as process:
        assert process.request("open", 20, data="x") == {"got": {"command": "open", "data": "x"}}
        process.send("turn")
        process.send("turn", number=2)
        assert process.receive(20) == {"got": {"command": "turn"}}
        assert process.receive(20) == {"got": {"command": "turn", "number": 2}}


def test_what_hangs_is_stopped_in_time() -> None:
    process = started("import time; time.sleep(600)")
    with pytest.raises(WorkerError, match="1 s"):
        process.request("turn", 1)
    assert process._process.poll() == -signal.SIGKILL


def test_what_crashes_says_its_last_words() -> None:
    process = started("raise RuntimeError('the disk is on fire')")
    with pytest.raises(WorkerError, match=r"\b1: .*RuntimeError: the disk is on fire"):
        process.request("turn", 20)


def test_a_signal_is_named() -> None:
    process = started("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(WorkerError, match="SIGSEGV"):
        process.request("turn", 20)


def test_an_error_there_is_an_error_here() -> None:
    process = started("""import json; input(); print(json.dumps({"error": "ValueError: no such\\n page"}))""")
    with pytest.raises(WorkerError, match=r"^ValueError: no such page$"):
        process.request("turn", 20)


@pytest.mark.parametrize("groups", [True, False], ids=["posix", "as on Windows"])
def test_its_children_pause_and_end_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: bool) -> None:
    if not groups:
        monkeypatch.delattr(os, "killpg")
    script = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
print("{{}}", flush=True)
time.sleep(600)
"""
    process = started(script)
    process.request("turn", 20)
    pid = int((tmp_path / "pid").read_text())
    assert not gone(pid)
    process.pause()
    wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    process.resume()
    wait_until(lambda: psutil.Process(pid).status() != psutil.STATUS_STOPPED)
    process.close()
    process.close()
    wait_until(lambda: gone(pid))


def test_the_real_program_says_what_it_cannot_do() -> None:
    with WorkerProcess("fastmnist.Loader") as process, pytest.raises(WorkerError, match="KeyError"):
        process.request("imports", 60, contender="nothing")
