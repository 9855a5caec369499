"""The commands of README and docs/, run from the first to the last as a reader would, on a small dataset."""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastmnist.cli.main import main
from fastmnist.measure import bench

ROOT = Path(__file__).parents[1]
# What takes minutes is run with a flag that makes it shorter.
SHORTER = {
    "bench": ["--quick", "--only", "fastmnist.Loader"],
    "doctor --compare": [],
    "doctor": ["--seconds", "1", "--json", "a.json"],
    "ladder": ["--quick", "--images", "256"],
    "speedrun --preset fast99": ["--seeds", "1", "--images-seen", "600", "--compile", "off"],
    "speedrun": ["--seeds", "1", "--images-seen", "600"],
    "tune": ["--budget", "2"],
    "train --dataset": ["--images-seen", "200"],
    "train --preset": [],
    "train --resume": [],
    "train": ["--images-seen", "600"],
}
PROGRAM = [sys.executable, "-m", "fastmnist"]


def commands() -> list[str]:
    """Without what is said about them; the same one twice is run once."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    lines = [line.strip() for page in pages for line in page.read_text().splitlines()]
    found = [line.partition("  #")[0].strip() for line in lines if line.startswith("fastmnist ")]
    return list(dict.fromkeys(found))


def stopped(words: list[str], ready: Callable[[str], bool]) -> str:
    """What the command printed until it was `ready` for Ctrl-C, and then until its end."""
    output = Path("output.txt")
    with output.open("w") as file, subprocess.Popen([*PROGRAM, *words], stdout=file, stderr=file) as process:
        until = time.monotonic() + 120
        while not ready(output.read_text()) and time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        finally:
            process.kill()  # or leaving the block would wait for ever
    return output.read_text()


@pytest.mark.slow
def test_every_command_of_the_pages(
    write_dataset: Callable[..., Any],
    write_small_beton: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    npm: str,
) -> None:
    write_dataset(tmp_path / "data", train=600, test=100)
    for split in ("train", "test"):  # the example of docs/your-data.md
        write_small_beton(tmp_path / "data" / f"pets-{split}.beton", 300, (32, 32, 3), split=split)
    monkeypatch.setenv("FASTMNIST_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(bench, "QUICK", bench.Plan(1.0, 2, 1))
    monkeypatch.chdir(tmp_path)
    stroke = np.zeros((60, 60), np.uint8)
    stroke[10:50, 27:33] = 255
    for number in range(400):  # a folder of class folders
        Path(f"photos/{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + number % 9, 48), (number % 256, 90, 7)).save(f"photos/{number % 2}/{number}.png")
    Image.fromarray(stroke).save("photo.jpg")
    Image.fromarray(255 - stroke).save("scan.png")
    finished, metrics = "", Path("runs/stopped/metrics.jsonl")
    tried = commands()
    for command in tried:
        words = shlex.split(command)[1:]
        if words[0] == "demo" and len(words) == 1:
            said = stopped([*words, "--no-browser"], lambda text: "http://127.0.0.1:" in text)
            assert "reads what you draw" in said
            continue
        if "--resume" in words:
            said = stopped(
                ["train", "--preset", "none", "--epochs", "15", "--out", "runs/stopped", "--model", "small-cnn"],
                lambda text: metrics.is_file() and metrics.stat().st_size > 0,
            )
            assert "fastmnist train --resume" in said, said
            place = "runs/stopped"
        else:
            place = finished
        if "--compare" in words:
            shutil.copy("a.json", "b.json")
        words = [word.replace("runs/…", place) for word in words]
        words += next((more for name, more in SHORTER.items() if command.startswith(f"fastmnist {name}")), [])
        assert main(words) == 0, command
        if not finished:
            finished = str(next(Path("runs").iterdir()))
    assert Path("demo.html").stat().st_size > 1e6
    assert {command.split()[1] for command in tried} >= {
        "train",
        "bench",
        "tune",
        "doctor",
        "ladder",
        "speedrun",
        "demo",
    }
