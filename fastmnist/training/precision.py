"""Choice of mixed precision and of the compile mode, each with a reason to show the user."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fastmnist.errors import ConfigError
from fastmnist.system.machine import processor_flags
from fastmnist.system.processes import world_size

# Seconds of a cold torch.compile of a ResNet-18, forward and backward, and the share of a recorded step that it saves
# (H200, torch 2.11, batch 256: 24 s, in a later process about 10 s; 1.42 ms became 0.89).
COMPILE_SECONDS = 25.0
COMPILE_GAIN = 0.4

# With AVX-512 BF16 a training step ran at 1.3 (imagenet stem) to 1.7 times (cifar) the speed of float32:
# benchmarks/step.py.
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}


@dataclass(frozen=True)
class Precision:
    """amp: the autocast dtype, None for float32 throughout. scaled: whether gradients need a loss scaler."""

    amp: torch.dtype | None
    reason: str

    @property
    def scaled(self) -> bool:
        return self.amp == torch.float16

    @property
    def name(self) -> str:
        return {torch.bfloat16: "bf16", torch.float16: "fp16", None: "off"}[self.amp]


def choose_precision(asked: str, device: torch.device) -> Precision:
    """The autocast dtype for `device`. Raises ConfigError for fp16 on a CPU."""
    if asked == "off":
        return Precision(None, "asked for")
    if asked == "fp16" and device.type == "cpu":
        raise ConfigError("--amp fp16 needs a GPU; on a CPU use bf16 or off")
    if asked in ("bf16", "fp16"):
        return Precision(torch.bfloat16 if asked == "bf16" else torch.float16, "asked for")
    if device.type == "cpu" and (found := BFLOAT16_FLAGS & processor_flags()):
        return Precision(torch.bfloat16, f"this processor has bfloat16 ({', '.join(sorted(found))})")
    if device.type != "cuda":
        return Precision(None, "bfloat16 is emulated here, float32 is faster")
    # is_bf16_supported() is also true where bfloat16 is emulated, slowly.
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return Precision(torch.bfloat16, f"compute capability {major}.{minor} has bfloat16 tensor cores")
    return Precision(torch.float16, f"compute capability {major}.{minor} has float16 but no bfloat16 tensor cores")


def keep_precision(begun: str, device: torch.device) -> Precision:
    """The precision of a resumed run, by name. Raises ConfigError when `device` does not have it."""
    if begun == "fp16" and device.type == "cpu":
        raise ConfigError("the run was begun with --amp fp16, which needs a GPU; resume it on one, or start a new run")
    return replace(choose_precision(begun, device), reason="as the run was begun")


def choose_compile(asked: str, device: torch.device) -> tuple[str, str]:
    """(mode, reason); on a GPU "auto" starts by recording the step, which takes a fraction of a second.

    Raises:
        ConfigError: the mode needs a GPU and there is none.
    """
    if asked in ("default", "max-autotune") and world_size() > 1:
        raise ConfigError(f"--compile {asked} serves a single process; with several say off or auto")
    if asked == "graph" and device.type != "cuda":
        raise ConfigError("--compile graph records a CUDA graph and needs a GPU; use default, off or auto")
    if asked != "auto":
        return asked, "asked for"
    if device.type != "cuda":
        return "off", "on a CPU compiling a ResNet-18 took 37 to 59 s and made it no faster"
    if world_size() > 1:
        return "off", "with several processes a step is recorded only when --compile graph says so"
    return "graph", "recorded as a CUDA graph"


def worth_compiling(seconds: float) -> tuple[bool, str]:
    """Whether compiling pays for a run whose recorded steps take `seconds` in all, and why."""
    saved = seconds * COMPILE_GAIN
    weighed = (
        f"the run takes about {seconds:.1f} s; compiling costs about {COMPILE_SECONDS:.0f} s, and may save "
        f"{saved:.1f} s"
    )
    return saved > COMPILE_SECONDS, weighed
