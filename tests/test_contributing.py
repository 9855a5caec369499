"""CONTRIBUTING's examples of adding something: put where they say, they work, and need no other line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = re.compile(r"```python\n# (\S+), (at the end|in (\S+)|before (\S+))\n(.*?)```", re.S)
PEER = """
import tempfile
from pathlib import Path
import numpy as np
from fastmnist.baselines.peers import PEERS
from fastmnist.measure.contenders import BY_NAME
peer, folder = PEERS["numpy"](), Path(tempfile.mkdtemp())
peer.write(np.arange(40, dtype=np.uint8).reshape(10, 2, 2, 1), np.arange(10), folder)
batches = list(peer.epoch(folder, 4, 0, 0, 0))
assert [len(labels) for images, labels in batches] == [4, 4, 2]
assert all(int(image[0, 0, 0]) == 4 * int(label) for images, labels in batches for image, label in zip(images, labels))
assert BY_NAME["numpy, memory-mapped"].kind == "peer"
"""


def put(root: Path, text: str) -> list[str]:
    """Puts each example into its file under `root`; gives back the files."""
    files = []
    for file, _, inside, before, code in EXAMPLE.findall(text):
        lines = (root / file).read_text().splitlines(keepends=True)
        if inside or before:
            opens = re.compile(rf"{re.escape(inside)}\b.*[\[({{]$" if inside else rf"\s*{re.escape(before)}")
            [at, *_] = [number for number, line in enumerate(lines) if opens.match(line)]
            lines.insert(at + bool(inside), code)
        else:
            lines.append(f"\n\n{code}")
        (root / file).write_text("".join(lines))
        files.append(file)
    return files


@pytest.mark.slow
def test_what_is_added_as_it_says_works(tmp_path: Path, write_dataset: Callable[..., object]) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    shutil.copytree(ROOT / "fastmnist", tmp_path / "fastmnist", ignore=shutil.ignore_patterns("__pycache__"))
    assert len(put(tmp_path, text)) == text.count("```python") == 13
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "numba")}

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = run("-m", "fastmnist", "train", "--help")
    assert "mlp, resnet18" in " ".join(shown.split())
    assert "{slices," in shown
    assert "quick" in shown
    write_dataset(tmp_path / "data", train=300, test=60)
    flags = "--dataset notmnist --data-dir data --cache-dir cache --model mlp --loader slices --preset quick --out run"
    run("-m", "fastmnist", "train", *flags.split(), "--epochs", "1")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [summary[name] for name in ("dataset", "model", "loader")] == ["notmnist", "mlp", "slices"]
    assert (tmp_path / "run" / "labels.png").is_file()
    assert "Rare classes are learned worst." in (tmp_path / "run" / "report.html").read_text()
    run("-c", PEER)
