"""How a trainer's steps run: eagerly, compiled, or as a CUDA graph; chosen, set up and warmed up before the clock."""

from __future__ import annotations

import torch

from fastmnist.errors import ConfigError, FastmnistError
from fastmnist.training.loop import Trainer
from fastmnist.training.precision import GRAPH_PAYS, choose_compile

TIMED_PASSES = 5


def set_up_compile(trainer: Trainer, asked: str) -> tuple[str, str]:
    """Warms the trainer up, chooses and sets up how its steps run: (mode, reason).

    Raises:
        ConfigError: the batch does not fit into the GPU's memory, or the mode needs a GPU and there is none.
        FastmnistError: the mode that was asked for does not work here. What auto chose and failed is left out.
    """
    trainer.model.train()
    trainer.warm_up()
    eager = 0.0
    if asked == "auto" and trainer.device.type == "cuda":
        eager = trainer.warm_up(TIMED_PASSES)
    mode, reason = choose_compile(asked, trainer.device, eager * (trainer.steps - trainer.step))
    if mode == "off":
        if asked == "auto" and eager * (trainer.steps - trainer.step) > GRAPH_PAYS:
            return _try_graph(trainer, eager, reason)
        return mode, reason
    if mode == "graph" and trainer.precision.scaled:
        raise ConfigError("--compile graph cannot record a gradient scaler; say --amp bf16 or off, or --compile off")
    try:
        if mode == "graph":
            trainer.record_graph()
        else:
            compile_step(trainer, mode)
            trainer.warm_up()
    except FastmnistError:
        raise
    except Exception as error:
        what = _first_line(error)
        if asked != "auto":
            raise FastmnistError(f"--compile {mode} does not work here: {what}; say --compile off") from error
        trainer.compute = trainer.forward
        return "off", f"compiling was worth it but failed ({what})"
    return mode, reason


def compile_step(trainer: Trainer, mode: str) -> None:
    """Forward and loss through torch.compile; it happens at the first pass."""
    how: dict[str, str] = {"backend": mode} if mode == "cudagraphs" else {"mode": mode}
    trainer.compute = torch.compile(trainer.forward, **how)  # type: ignore[call-overload]


def _try_graph(trainer: Trainer, eager: float, reason: str) -> tuple[str, str]:
    if trainer.precision.scaled:
        return "off", f"{reason}; a step with a gradient scaler is not recorded as a CUDA graph"
    try:
        seconds = trainer.record_graph()
    except Exception as error:
        return "off", f"{reason}; a CUDA graph of the step failed ({_first_line(error)})"
    measured = f"a step takes {seconds * 1e3:.2f} ms as a CUDA graph, its passes {eager * 1e3:.2f} ms without"
    if seconds < eager:
        return "graph", measured
    trainer.graph = None
    return "off", f"{reason}; {measured}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
