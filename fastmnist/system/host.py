"""What the loader asks of the machine that it runs on: device, process and memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fastmnist.errors import ConfigError, whole_number

CONTROL_GROUPS, GROUPS_OF_THIS_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


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
    rank, world_size = whole_number("rank", rank), whole_number("world_size", world_size, 1)
    if rank >= world_size:
        raise ConfigError(f"rank {rank} must be 0 to world_size - 1, which is {world_size - 1}")
    return rank, world_size


def available_memory() -> int:
    """Bytes that can be had without swapping, of the machine and of the control group (a container's limit).

    Where Linux does not tell, all that there are.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([available, *_left_in_control_groups()])


def _left_in_control_groups() -> list[int]:
    """Bytes that each control group of this process, which is set a limit, has left; its file cache can be given up."""
    left = []
    for group, limit_name, usage_name in _memory_groups():
        try:
            limit = int((group / limit_name).read_text())  # "max" is no number
            usage = int((group / usage_name).read_text())
            counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        cache = sum(int(counts.get(prefix + "_file", 0)) for prefix in ("active", "inactive"))
        left.append(max(0, limit - usage + cache))
    return left


def _memory_groups() -> list[tuple[Path, str, str]]:
    """(folder, its file with the limit, its file with the usage) of this process's groups, the old and the new kind."""
    try:
        lines = GROUPS_OF_THIS_PROCESS.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "memory":
            folder, files = CONTROL_GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        elif not controllers:
            folder, files = CONTROL_GROUPS, ("memory.max", "memory.current")
        else:
            continue
        place = folder / name.lstrip("/")
        # Those around it may be set a limit too; within a container, where the name is none, the top is the group.
        found += [(around, *files) for around in (place, *place.parents) if around.is_relative_to(folder)]
    return found
