"""Processes of one job, as torchrun starts them: their group and what they exchange.

Without a group, every function answers for a single process.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from fastmnist.errors import ConfigError, FastmnistError, ReportedError
from fastmnist.system.machine import local_rank, physical_cores, processes_here

LAUNCHED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""Environment variables of a process that was started as one of several."""

TIMEOUT = 10.0  # minutes


def launched() -> bool:
    """Whether this process belongs to a job, of one process or several."""
    return _grouped() or os.environ.keys() >= LAUNCHED


def check_launch() -> None:
    """Raises ConfigError where this process was started as one of several that have no group."""
    if launched() and not _grouped() and int(os.environ["WORLD_SIZE"]) > 1:
        raise ConfigError(
            f"{os.environ['WORLD_SIZE']} processes were started, each of which would train alone: call "
            "torch.distributed.init_process_group first, or run torchrun -m fastmnist train"
        )


def rank() -> int:
    """This process's number in the group."""
    return distributed.get_rank() if _grouped() else 0


def world_size() -> int:
    """Number of processes in the group."""
    return distributed.get_world_size() if _grouped() else 1


def backend() -> str | None:
    """How the processes exchange tensors, such as "gloo"; None for a single process."""
    return distributed.get_backend() if _grouped() else None


def _grouped() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@contextmanager
def process_group(device: str = "auto", minutes: float = TIMEOUT) -> Iterator[None]:
    """Joins the processes of a job for the length of the block: NCCL between GPUs, gloo between CPUs.

    Does nothing where there is no job, or the group exists already. Each process takes the GPU of its number, and its
    share of the cores unless OMP_NUM_THREADS says otherwise. An error in one process ends them all.

    Args:
        device: of this process: "auto", "cpu" or "cuda".
        minutes: after which a process that waits for the others gives up.

    Raises:
        ConfigError: there are fewer GPUs than processes on this machine, or `device` names one of them.
        ReportedError: this process ends because of another one, which reports why.
        FastmnistError: the group cannot be joined, or another process died.
    """
    if not launched() or _grouped():
        yield
        return
    size = processes_here()
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        if device not in ("auto", "cuda"):
            raise ConfigError(f"--device {device}: each process takes the GPU of its number; say cuda, cpu or auto")
        if size > torch.cuda.device_count():
            raise ConfigError(
                f"{size} processes on a machine with {torch.cuda.device_count()} GPUs: start one for each, or say "
                "--device cpu"
            )
        torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl"
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun's own default, too
        torch.set_num_threads(max(1, physical_cores() // size))
    store = None
    try:
        shared, own, world = next(distributed.rendezvous("env://", timeout=timedelta(minutes=minutes)))
        # torchrun may keep the store from start to start, with the addresses of processes that are gone.
        start = f"fastmnist {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} of {world}"
        store = distributed.PrefixStore(start, shared)
        distributed.init_process_group(
            backend, store=store, rank=own, world_size=world, timeout=timedelta(minutes=minutes)
        )
    except (RuntimeError, ValueError) as error:
        if not _is_first(store):
            raise ReportedError("another process reports why they cannot join") from error
        raise FastmnistError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot join the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {_first_line(error)}"
        ) from error
    try:
        yield
    except BaseException as error:
        if not _is_first(store):
            raise ReportedError("another process reports why the job ends") from error
        if world > 1 and _is_of_the_group(error):
            raise FastmnistError(
                f"process {own} of {world} waited for one that died or does not answer ({_first_line(error)}); the job "
                "ends here, and torchrun --max-restarts starts it again"
            ) from error
        raise
    distributed.destroy_process_group()


def _is_first(store: Any) -> bool:
    """Whether this process is the first of the job to fail."""
    try:
        return bool(store.add("fastmnist failures", 1) == 1)
    except (RuntimeError, AttributeError):  # whoever kept the store is gone, or was never there
        return True


def _is_of_the_group(error: BaseException) -> bool:
    names = ("gloo", "NCCL", "Connection closed", "ProcessGroup")
    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and any(name in str(error) for name in names)
    )


def _first_line(error: BaseException) -> str:
    """Without the source line that torch puts before it, and the guess that it puts behind."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^]]*\] ", "", line).partition(". This is")[0][:200]


@contextmanager
def first_on_each_machine() -> Iterator[None]:
    """Runs the block in the first process of each machine, then in the others."""
    if world_size() > 1 and local_rank():
        distributed.barrier()
    yield
    if world_size() > 1 and not local_rank():
        distributed.barrier()


def gather(value: Any) -> list[Any]:
    """All processes' values, in the order of their numbers; any value that pickles."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """The value of process 0."""
    if world_size() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def average(tensor: torch.Tensor) -> None:
    """Replaces `tensor` by its mean over all processes, in place."""
    if world_size() > 1:
        distributed.all_reduce(tensor)
        tensor /= world_size()


def check_agreement(values: dict[str, Any]) -> None:
    """Raises ConfigError in all processes unless all of them pass the same values; names the first that differs."""
    for name, value in values.items():
        first, *others = gather(value)
        for number, other in enumerate(others, 1):
            if other != first:
                raise ConfigError(
                    f"process {number} has another {name} than process 0: {_difference(first, other)}; start all "
                    "processes with the same version, settings and data"
                )


def _difference(first: Any, other: Any) -> str:
    if isinstance(first, dict) and isinstance(other, dict):
        name = next(key for key in [*first, *other] if first.get(key) != other.get(key))
        return f"{name} {other.get(name)} instead of {first.get(name)}"
    return f"{other} instead of {first}"
