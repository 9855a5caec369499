"""The GPU suite without a GPU: at toy size all of it runs, and without --dry it says what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_suite.py"


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, timeout=900, env=environment
    )


@pytest.mark.slow
def test_every_part_of_it_at_toy_size(mnist_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    ended = run("--dry", "--device", "cpu", "--data-dir", str(mnist_folder), "--output", str(file))
    assert ended.returncode == 0, ended.stderr
    found = json.loads(file.read_text())
    assert found["dry"]
    parts = {"presets", "notebook", "cold", "loading", "live taps", "augmentation", "loader", "bench", "steps"}
    assert parts <= set(found)
    assert not [name for name in parts if "error" in found[name]]
    assert set(found["presets"]) == {"fast99", "fast995", "accurate"}
    assert "fast99:" in ended.stdout


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    ended = run("--device", "cpu", "--data-dir", str(tmp_path))
    assert ended.returncode == 2
    assert "there is no CUDA GPU here; --dry shows that the suite runs" in ended.stderr
