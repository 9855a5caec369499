"""What the scripts here share: their two flags, a clock, and a result that says where it comes from."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from fastmnist.system.environment import hardware, versions


def arguments(doc: str | None, *, downloads: bool = False) -> argparse.ArgumentParser:
    """A parser with --data-dir, which may be left out if the script downloads, and --output."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=not downloads, help="folder with MNIST's four IDX files, .gz")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    return parser


def seconds(action: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def summarise(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def report(result: dict[str, Any], output: Path | None, device: torch.device | None = None) -> None:
    """Prints the result with hardware, versions and date, and writes it to `output`."""
    result |= {
        "hardware": hardware(device or torch.device("cpu")),
        "versions": versions(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if output is not None:
        output.write_text(text + "\n")
