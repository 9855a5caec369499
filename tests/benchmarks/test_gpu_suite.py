"""The GPU suite without a GPU: at toy size all of it runs, and without --dry it says what is missing."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_suite.py"


@pytest.fixture(scope="module", autouse=True)
def _import_suite() -> Iterator[None]:
    """A script beside others that it imports."""
    global gpu_suite
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        gpu_suite = importlib.import_module("gpu_suite")
        yield


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, timeout=900, env=environment
    )


@pytest.mark.slow
def test_its_parts_at_toy_size(mnist_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    parts = [part.name for part in gpu_suite.PARTS if part.name != "bench"]  # a command with tests of its own
    where = ["--data-dir", str(mnist_folder), "--output", str(file)]
    ended = run("--dry", "--device", "cpu", *where, "--parts", *parts)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(file.read_text())
    assert found["dry"]
    assert set(parts) <= set(found)
    assert not [name for name in parts if "error" in found[name]]
    assert set(found["presets"]) == {"fast99", "fast995"}
    assert "fast99:" in ended.stdout
    assert [line["name"] for line in found["steps"]["rows"]] == ["eager"]  # all that a CPU has
    assert {line["name"] for line in found["loading"]["rows"]} >= {"resident, loader", "stream, first epoch"}


class Clock:
    """Stands still until a part moves it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def suite(tmp_path: Path, clock: Clock, limit: float) -> Any:
    return gpu_suite.Suite("data", tmp_path, torch.device("cpu"), False, tmp_path / "found.json", limit, clock)


def test_the_parts_fit_their_time(tmp_path: Path) -> None:
    """Each takes what it says that it takes at most; the limit is that of one call."""
    clock = Clock()

    def taking(part: Any) -> Any:
        def measure(suite: Any) -> dict[str, str]:
            clock.now += part.seconds
            return {"measured": part.name}

        return part._replace(measure=measure)

    done = suite(tmp_path, clock, gpu_suite.LIMIT_SECONDS)
    for part in gpu_suite.PARTS:
        done.run(taking(part))
    assert done.found == {part.name: {"measured": part.name} for part in gpu_suite.PARTS}
    assert json.loads((tmp_path / "found.json").read_text())["bench"] == {"measured": "bench"}


def test_a_part_that_fails_or_has_no_time_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(suite: Any) -> None:
        suite.clock.now += 7
        raise ValueError("no such thing")

    parts = [gpu_suite.Part(name, seconds, fail) for name, seconds in (("a", 5), ("b", 4), ("c", 3))]
    done = suite(tmp_path, Clock(), 10)
    for part in parts:
        done.run(part)
    found = done.found
    assert ["no such thing" in found[name]["error"] for name in "abc"] == [True, False, True]
    assert "3 s were left" in found["b"]["error"]


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    ended = run("--device", "cpu", "--data-dir", str(tmp_path))
    assert ended.returncode == 2
    assert "--dry" in ended.stderr
