"""Named settings of a run, each with what it was measured to reach. Any flag overrides what a preset says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError

Settings = dict[str, Any]


def cpu() -> Settings:
    """99 % on a CPU, in the least time."""
    return {
        "images_seen": 36_000,
        "batch_size": 128,
        "learning_rate": 0.05,
        "shift": 1.0,
        "rotation": 5.0,
    }


def fast99() -> Settings:
    """99.0 % on a GPU, in the least time."""
    return {"images_seen": 30_000, "batch_size": 128}


def fast995() -> Settings:
    """99.5 % on a GPU, in the least time."""
    return {"images_seen": 180_000, "batch_size": 128}


def accurate() -> Settings:
    """99.7 % on a GPU, in the least time."""
    return {"images_seen": 1_200_000, "batch_size": 128}


PRESETS: Mapping[str, Callable[[], Settings]] = {
    "fast99": fast99,
    "fast995": fast995,
    "accurate": accurate,
    "cpu": cpu,
}
OTHERS = {"auto": "cpu or fast995 by device", "none": "the plain defaults"}


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
