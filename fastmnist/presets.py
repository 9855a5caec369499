"""Named settings of a run, each with what it was measured to reach. Any flag overrides what a preset says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError

Settings = dict[str, Any]


def cpu() -> Settings:
    """99 % on a CPU in the least time.

    99.07 % ± 0.07 test accuracy (98.97 to 99.12, n=5, all 60,000 images to draw from) after 15.4 s ± 0.7 of training on
    2 cores of an AMD EPYC with bfloat16; averaged over shifts of a pixel 99.12 %. 2026-11-23,
    fastmnist speedrun --preset cpu --seeds 5 --shifted
    """
    return {
        "images_seen": 42_000,
        "batch_size": 128,
        "learning_rate": 0.05,
        "shift": 1.0,
        "rotation": 5.0,
    }


def fast99() -> Settings:
    """Aims at 99.0 % on a GPU in the least time: fewer, larger steps than `cpu`.

    99.13 % test accuracy (99.01 to 99.23, n=5) on a CPU in bfloat16, 2026-11-23. Not timed on a GPU yet; measure:
    fastmnist speedrun --preset fast99 --seeds 20
    """
    return cpu() | {"images_seen": 48_000, "batch_size": 256, "learning_rate": 0.08}


def fast995() -> Settings:
    """Aims at 99.5 % on a GPU in the least time.

    99.48 % test accuracy (99.43 to 99.54, n=5) on a CPU in bfloat16, 2026-11-23. Not timed on a GPU yet; measure:
    fastmnist speedrun --preset fast995 --seeds 20
    """
    return {"images_seen": 240_000, "batch_size": 256, "learning_rate": 0.1, "weight_decay": 2e-3}


def accurate() -> Settings:
    """Aims at the highest accuracy: maps of twice the size, and 20 epochs.

    Not timed on a GPU yet, nor its accuracy measured. Measure: fastmnist speedrun --preset accurate --seeds 20
    """
    return {"images_seen": 1_200_000, "batch_size": 256, "learning_rate": 0.1, "stem": "stride2"}


PRESETS: Mapping[str, Callable[[], Settings]] = {
    "fast99": fast99,
    "fast995": fast995,
    "accurate": accurate,
    "cpu": cpu,
}
TARGETS: Mapping[str, float] = {"fast99": 0.99, "fast995": 0.995, "accurate": 0.996, "cpu": 0.99}
"""The test accuracy that each was made for, which a claim is tested against."""
OTHERS = ("auto", "none")


def choose_preset(name: str, dataset: str | None, on_gpu: Callable[[], bool]) -> str:
    """The preset's name, "none" for none. auto takes one for MNIST alone, of which the presets are measured.

    Raises:
        ConfigError: there is no such preset.
    """
    if name == "auto":
        if dataset not in (None, "mnist"):
            return "none"
        return "fast995" if on_gpu() else "cpu"
    if name not in PRESETS and name != "none":
        raise ConfigError(f"--preset {name}: there are {', '.join((*PRESETS, *OTHERS))}")
    return name


def preset_config(name: str, **settings: Any) -> TrainConfig:
    """The run's configuration: the preset's settings, and `settings` over them.

    Raises:
        ConfigError: there is no such preset, or a setting cannot work.
    """
    chosen = choose_preset(name, None, lambda: False)
    return TrainConfig(**{**(PRESETS[chosen]() if chosen != "none" else {}), **settings})
