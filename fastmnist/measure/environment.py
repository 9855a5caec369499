"""The machine and the versions that a figure belongs to."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from joblib import cpu_count

PACKAGES = ("fastmnist", "torch", "torchvision", "numpy", "numba", "ffcv")


def versions() -> dict[str, str]:
    """Python's and each package's version; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device) -> dict[str, str | int]:
    """Processor, cores that this process may use, threads that torch uses, and the GPU when it is one."""
    found: dict[str, str | int] = {
        "processor": _processor(),
        "cores": cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
