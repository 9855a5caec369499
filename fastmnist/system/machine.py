"""The machine: devices, processor, cores, and the memory and CPU limits of its control groups."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from joblib import cpu_count

from fastmnist.errors import ConfigError

WAKING_SECONDS = 0.2
CONTROL_GROUPS, GROUPS_OF_THIS_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
PROCESSORS, PROCESSOR_INFO = Path("/sys/devices/system/cpu"), Path("/proc/cpuinfo")


def choose_device(asked: str | torch.device | None) -> torch.device:
    """The device of that name; None or "auto" takes the GPU when there is one, of several processes each its own.

    Raises:
        ConfigError: there is no such device.
    """
    if asked in (None, "auto"):
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if str(asked) == "cuda" and processes_here() > 1:
        asked = f"cuda:{local_rank()}"
    try:
        device = torch.device(asked)  # type: ignore[arg-type]
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {str(asked)!r} cannot be used here: {reason}; leave it out or use cpu") from error
    return device


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has finished its queue; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wake(device: torch.device) -> None:
    """Keeps a GPU busy until its clock is up: at the low clock of an idle one, cuDNN chooses the wrong algorithms."""
    if device.type != "cuda":
        return
    matrix = torch.ones(4096, 4096, device=device, dtype=torch.float16)
    until = time.perf_counter() + WAKING_SECONDS
    while time.perf_counter() < until:
        matrix @ matrix
        torch.cuda.synchronize(device)


def processor_name() -> str:
    """The processor's model, such as "AMD EPYC 7763"; its architecture where the system does not name it."""
    return _processor_info().get("model name") or platform.processor() or platform.machine()


def processor_flags() -> set[str]:
    """The processor's instruction sets as Linux lists them; empty elsewhere."""
    return set(_processor_info().get("flags", "").split())


def _processor_info() -> dict[str, str]:
    """Of the first processor. py-cpuinfo gives the same after a second of measuring the clock."""
    try:
        first, _, _ = PROCESSOR_INFO.read_text().partition("\n\n")
    except OSError:
        return {}
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def physical_cores() -> int:
    """Cores that this process may use, two hyperthreads of one core counted once: torch's default of threads.

    joblib and psutil count hyperthreads once only where a process may use all cores.
    """
    allowed = cpu_count()
    with suppress(OSError, AttributeError):  # AttributeError: not Linux
        siblings = {
            (PROCESSORS / f"cpu{number}" / "topology" / "thread_siblings_list").read_text()
            for number in os.sched_getaffinity(0)
        }
        return int(min(allowed, len(siblings)))
    return int(allowed)


def processes_here() -> int:
    """Processes of this one's job on this machine, as torchrun says; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number among `processes_here`."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def cores_of_this_process() -> int:
    """Its equal share of the cores of this machine."""
    return max(1, cpu_count() // processes_here())


def available_memory() -> int:
    """Bytes available without swapping and within control groups' limits."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        available = int(psutil.virtual_memory().available)
    return min([available, *_left_in_memory_groups()])


def _left_in_memory_groups() -> Iterator[int]:
    """Bytes that each memory limit leaves; file cache counts as free."""
    for group, version in _control_groups("memory"):
        limit_file, usage_file = {
            1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            2: ("memory.max", "memory.current"),
        }[version]
        with suppress(OSError, ValueError):  # ValueError: no limit, which is "max"
            limit, usage = (int((group / name).read_text()) for name in (limit_file, usage_file))
            counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cache = sum(int(counts.get(f"{kind}_file", 0)) for kind in ("active", "inactive"))
            yield max(0, limit - usage + cache)


def memory_in_use(*, children_only: bool = False) -> int:
    """Bytes of this process and its children; memory that they share counts once."""
    this, total = psutil.Process(), 0
    for process in (*(() if children_only else (this,)), *this.children(recursive=True)):
        with suppress(psutil.Error):  # it has ended
            memory = process.memory_full_info()
            total += getattr(memory, "pss", memory.rss)
    return total


def cpu_seconds() -> float:
    """On a core so far, in the kernel and outside of it, of this process and its children, ended ones included."""
    ended = os.times()
    total = time.process_time() + ended.children_user + ended.children_system
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended, and counts as its parent's
            used = process.cpu_times()
            total += used.user + used.system
            total += getattr(used, "children_user", 0.0) + getattr(used, "children_system", 0.0)
    return total


def limit_periods() -> list[tuple[int, int]]:
    """(throttled periods, all periods) of each control group of this process that has a CPU limit."""
    counts = []
    for group, _ in _control_groups("cpu"):
        with suppress(OSError, ValueError, KeyError):
            fields = dict(line.split() for line in (group / "cpu.stat").read_text().splitlines())
            counts.append((int(fields["nr_throttled"]), int(fields["nr_periods"])))
    return counts


def _control_groups(controller: str) -> Iterator[tuple[Path, int]]:
    """(folder, 1 or 2 for the cgroup version) of this process's groups with that controller and of their ancestors.

    In a container, which does not see its group's name, the top folder is its group.
    """
    try:
        lines = GROUPS_OF_THIS_PROCESS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = CONTROL_GROUPS / controller if controllers else CONTROL_GROUPS
        group = top / name.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                yield folder, 1 if controllers else 2
