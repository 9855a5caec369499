"""What the loader asks of the machine that it runs on: device, process and memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fastmnist.errors import ConfigError


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device by name; None takes the GPU when there is one. Raises ConfigError when there is no such device."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"no such device: {device!r}; try cpu or cuda") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} was asked for, but PyTorch finds no GPU here; leave it out or say cpu")
    return chosen


def process_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """(rank, world_size) as given, or as torch.distributed has them; raises ConfigError when they do not fit."""
    if (rank is None) != (world_size is None):
        raise ConfigError(f"rank {rank} and world_size {world_size} come together, or neither is given")
    if rank is None or world_size is None:
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return 0, 1
        return distributed.get_rank(), distributed.get_world_size()
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} must be 0 to world_size - 1, which is {world_size - 1}")
    return rank, world_size


def available_memory() -> int:
    """Bytes that can be had without swapping; where Linux does not tell, all that there are."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
