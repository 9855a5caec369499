"""Execution mode of a trainer's steps: eager, recorded, or compiled and recorded; set up before the clock starts."""

from __future__ import annotations

from typing import Any

import torch

from fastmnist.errors import FastmnistError
from fastmnist.training.graph import side_stream
from fastmnist.training.loop import Trainer
from fastmnist.training.precision import choose_compile, worth_compiling

# Inductor options. Combo kernels run small operations side by side: 268 kernels of a step became 213 (H200, torch
# 2.11).
COMBINED = {
    "combo_kernels": True,
    # A buffer that another stream still reads (see `overlap`) must not be written to.
    "allow_buffer_reuse": False,
    "inplace_buffers": False,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": COMBINED,
    "max-autotune": COMBINED | {"max_autotune": True, "coordinate_descent_tuning": True},
}


def set_up_compile(trainer: Trainer, asked: str) -> tuple[str, str]:
    """Warms the trainer up and sets up the execution mode of its steps.

    On a GPU every mode but "off" records the whole step as one CUDA graph.

    Returns:
        (mode, reason); where what "auto" chose fails, the mode falls back and the reason says so.

    Raises:
        ConfigError: the batch does not fit into the GPU's memory, or the mode needs a GPU and there is none.
        FastmnistError: the mode that was asked for by name does not work here.
    """
    mode, reason = choose_compile(asked, trainer.device)
    trainer.model.train()
    try:
        _set_up(trainer, mode)
    except FastmnistError:
        raise
    except Exception as error:
        if asked != "auto":
            raise FastmnistError(
                f"--compile {mode} does not work here: {_first_line(error)}; use --compile off"
            ) from error
        trainer.compute = trainer.forward
        return "off", f"{mode} was chosen but failed ({_first_line(error)})"
    if trainer.graph is not None:
        reason = f"{reason}; a step takes {trainer.graph.seconds * 1e3:.2f} ms"
    if asked == "auto" and trainer.graph is not None:
        pays, weighed = worth_compiling(trainer.graph.seconds * (trainer.steps - trainer.step))
        reason = f"{reason}; {weighed}"
        if pays:
            return _try_compiled(trainer, reason)
    return mode, reason


def _set_up(trainer: Trainer, mode: str) -> None:
    if mode in OPTIONS:
        _compile(trainer, mode)
    if mode == "off" or trainer.device.type != "cuda":
        trainer.warm_up()
        return
    with side_stream(trainer.device):
        trainer.warm_up()
        trainer.record_graph()


def _compile(trainer: Trainer, mode: str) -> None:
    """Forward and loss through torch.compile; it happens at the first pass."""
    options = OPTIONS[mode] if trainer.device.type == "cuda" else {}
    trainer.compute = torch.compile(trainer.forward, options=options)


def _try_compiled(trainer: Trainer, reason: str) -> tuple[str, str]:
    recorded = trainer.graph
    try:
        _set_up(trainer, "default")
    except Exception as error:
        trainer.compute, trainer.graph = trainer.forward, recorded
        return "graph", f"{reason}, and failed ({_first_line(error)})"
    return "default", reason


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
