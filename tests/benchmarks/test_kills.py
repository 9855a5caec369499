"""Kill -9 at random moments, for real; benchmarks/kills.py says what is held against what."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kills.py"


@pytest.mark.slow
def test_nothing_is_lost_in_a_round_of_kills(tmp_path: Path) -> None:
    output = tmp_path / "kills.json"
    command = [sys.executable, SCRIPT, "--kills", "7", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["wrong"] == []
    assert set(result["counts"]) == {"compile", "expand", "train", "resume", "tune", "speedrun", "job"}
    assert sum(sum(counts.values()) for counts in result["counts"].values()) == 7
