"""Loader settings: which each loader has, their limits, what gives them an effect, and the values to search.

Types, defaults in a run and help texts are the fields of `config.DataConfig`. The command line imports this module, so
it imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastmnist.errors import whole_number

LoaderName = Literal["ours", "ffcv", "dataloader", "tuned", "tensors"]
Settings = Mapping[str, Any]

MOST_WORKERS = 64
MOST_WORKERS_SEARCHED = 8


def _nothing(settings: Settings, device: str) -> str:
    return ""


@dataclass(frozen=True)
class LoaderSetting:
    """One setting of a loader.

    Attributes:
        search: (device type, cores) -> the values to search on such a machine, the loader's own default first.
        limits: least and most of a number, both included; None for any other setting.
        missing: (a run's settings, device type or "" while it is unknown) -> what the setting has no effect without,
            as an error names it; "" where it has an effect.
    """

    search: Callable[[str, int], Sequence[Any]]
    limits: tuple[int, int] | None = None
    missing: Callable[[Settings, str], str] = _nothing


def _stream(settings: Settings, device: str) -> str:
    return "--placement stream" if settings["placement"] == "resident" and device not in ("", "cpu") else ""


def _copies(settings: Settings, device: str) -> str:
    return "a GPU" if device == "cpu" else _stream(settings, device)


def _gpu(settings: Settings, device: str) -> str:
    return "a GPU" if device == "cpu" else ""


def _workers(settings: Settings, device: str) -> str:
    workers = settings["workers"]
    if workers is None:  # for a tuned DataLoader: as many as pay
        workers = int(settings["loader"] == "tuned")
    return "" if workers else "--workers of 1 or more"


OURS = {
    "placement": LoaderSetting(lambda device, cores: ["auto", "resident", *(["stream"] if device != "cpu" else [])]),
    "threads": LoaderSetting(lambda device, cores: sorted({0, 1, 2, cores}), (0, 1024), _stream),
    "prefetch": LoaderSetting(lambda device, cores: [3, 1, 2, 8] if device != "cpu" else [3], (0, 64), _copies),
}
FFCV = {
    "workers": LoaderSetting(lambda device, cores: sorted({1, min(2, cores), cores}), (1, MOST_WORKERS)),
    "batches_ahead": LoaderSetting(lambda device, cores: [3, 1, 8], (1, 64)),
    "os_cache": LoaderSetting(lambda device, cores: [True, False]),
}
DATALOADER = {
    "workers": LoaderSetting(
        lambda device, cores: sorted({0, 1, 2, min(4, cores), min(MOST_WORKERS_SEARCHED, cores)}), (0, MOST_WORKERS)
    ),
    "prefetch_factor": LoaderSetting(lambda device, cores: [2, 4], (1, 64), _workers),
    "persistent_workers": LoaderSetting(lambda device, cores: [False, True], missing=_workers),
    "pin_memory": LoaderSetting(lambda device, cores: [False, True] if device != "cpu" else [False], missing=_gpu),
}
TUNED = DATALOADER | {
    "persistent_workers": LoaderSetting(lambda device, cores: [True, False], missing=_workers),
    "pin_memory": LoaderSetting(lambda device, cores: [True, False] if device != "cpu" else [False], missing=_gpu),
}
LOADER_SETTINGS: Mapping[LoaderName, Mapping[str, LoaderSetting]] = {
    "ours": OURS,
    "ffcv": FFCV,
    "dataloader": DATALOADER,
    "tuned": TUNED,
    "tensors": {},
}


def settings_of_run(loader: LoaderName) -> dict[str, LoaderSetting]:
    """The settings that a run with this loader reads: its own, and ours, which loads the images to evaluate on."""
    return {**OURS, **LOADER_SETTINGS[loader]}


def checked_numbers(settings: Mapping[str, LoaderSetting], **values: Any) -> tuple[int, ...]:
    """Numbers that a loader was made with, as Python's own.

    Raises:
        ConfigError: a value is no integer or outside its limits; names it.
    """
    return tuple(whole_number(name, value, *(settings[name].limits or ())) for name, value in values.items())


def unused_settings(settings: Settings, defaults: Settings, device: str = "") -> dict[str, tuple[Any, str]]:
    """The settings of a run that change nothing beside the others.

    Args:
        settings: of the run, with all settings of loaders.
        defaults: of a run.
        device: its type; "" while it is unknown.

    Returns:
        from names to the value that changes nothing either and what the setting has no effect without.
    """
    own, found = settings_of_run(settings["loader"]), {}
    for table in LOADER_SETTINGS.values():
        for name in [name for name in table if name not in own]:
            loaders = [loader for loader, other in LOADER_SETTINGS.items() if name in other]
            found[name] = defaults[name], f"--loader {' or '.join(loaders)}"
    for name, setting in own.items():
        if missing := setting.missing(settings, device):
            found[name] = setting.search(device or "cpu", 1)[0], missing
    return found
