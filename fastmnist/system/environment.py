"""Environment of a measurement: hardware, package versions, date and commit."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from joblib import cpu_count

from fastmnist.system.machine import processor_name

PACKAGES = ("fastmnist", "torch", "torchvision", "numpy", "numba", "ffcv")


def versions() -> dict[str, str]:
    """Python's and each package's version; a package that is not installed is left out."""
    numbers = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:
            continue
    return numbers


def hardware(device: torch.device) -> dict[str, str | int]:
    """Processor, cores available to this process, torch's threads, and the GPU if `device` is one."""
    facts: dict[str, str | int] = {
        "processor": processor_name(),
        "cores": cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts |= _gpu_state(torch.cuda.get_device_properties(device).uuid)
    return facts


def _gpu_state(uuid: Any) -> dict[str, str]:
    """Driver, power limit and clocks, as nvidia-smi reports them; empty without it."""
    asked = {
        "driver": "driver_version",
        "power_limit": "power.limit",
        "clock": "clocks.sm",
        "clock_limit": "clocks.max.sm",
    }
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(asked.values())}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(asked, (value.strip() for value in answer.strip().split(",")), strict=False))


def commit() -> str | None:
    """The git commit of this package, with "+" if tracked files differ; None outside a checkout."""
    package = Path(__file__).resolve().parents[1]
    if not (package.parent / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(package.parent), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def origin(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, date and commit, for every result."""
    return {
        "hardware": hardware(device),
        "versions": versions(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
    }


def describe_hardware(facts: dict[str, Any]) -> str:
    """`hardware` in one line: "AMD EPYC 7763, 2 cores" or with the GPU's name after it."""
    parts = [str(facts["processor"]), f"{facts['cores']} core{'s' if facts['cores'] != 1 else ''}"]
    if "gpu" in facts:
        parts.append(str(facts["gpu"]))
    return ", ".join(parts)


def tuned_on(device: torch.device, image_shape: tuple[int, int, int], dataset: str) -> str:
    """Hardware and data of tuned settings, in one line; `train` warns if they differ from its own."""
    return f"{describe_hardware(hardware(device))}; {dataset}, {' x '.join(map(str, image_shape))}"
