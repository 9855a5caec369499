"""Trainer state: checked in full against the trainer's own before any of it is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastmnist.errors import DataError

State = dict[str, Any]


def check_state(found: State, expected: State) -> None:
    """Compares a saved state with the trainer's own, part by part; the loader checks its own part.

    Raises:
        DataError: naming the part that is damaged, or of another model, precision or setting.
    """
    for name in ("optimizer", "random", "loader"):
        _check_like({}, found.get(name), name, whole=False)
    if found["amp"] != expected["amp"]:
        raise DataError(f"the state was saved with --amp {found['amp']}, this run has {expected['amp']}")
    expected = expected | {
        "optimizer": {"state": expected["optimizer"]["state"]},  # the settings are those of this run
        "random": {name: bits for name, bits in expected["random"].items() if name == "cpu" or name in found["random"]},
    }
    for name, part in expected.items():
        if name != "loader":
            _check_like(part, found.get(name), name, whole=name not in ("optimizer", "random"))


def _check_like(expected: Any, found: Any, name: str, whole: bool = True) -> None:
    """Raises DataError naming the part of `found` that differs from `expected` in its keys, types, shapes or dtypes.

    Args:
        whole: refuse a mapping that has more keys than `expected`.
    """
    alike = isinstance(found, type(expected)) and isinstance(found, bool) == isinstance(expected, bool)
    if isinstance(expected, torch.Tensor):
        alike = alike and (found.shape, found.dtype) == (expected.shape, expected.dtype)
    elif isinstance(expected, dict) and alike:
        alike = expected.keys() <= found.keys() and (not whole or len(found) == len(expected))
        for key in expected if alike else ():
            _check_like(expected[key], found[key], f"{name}.{key}")
    if not alike:
        raise DataError(f"the state is damaged, or of another run: {name} does not match this run's")


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """torch's random state, which dropout uses; order and augmentation draw from generators of their own."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restores what `random_state` gave, also on another kind of device."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def restoring(tensors: Iterable[torch.Tensor], device: torch.device) -> Iterator[None]:
    """Puts the values of `tensors` and torch's random state back when the block ends."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    bits = random_state(device)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        set_random_state(bits, device)
