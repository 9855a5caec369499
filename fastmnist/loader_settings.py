"""Settings of the loaders: limits, values to search, and what each needs to have an effect.

Their types, defaults and help texts are fields of `config.DataConfig`. The command line imports this module, which
therefore imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastmnist.errors import whole_number

LoaderName = Literal[
    "ours",
    "ffcv",
    "dataloader",
    "tuned",
    "tensors",
]
Settings = Mapping[str, Any]

MOST_WORKERS = 64
MOST_WORKERS_SEARCHED = 8


def _needs_nothing(settings: Settings, device: str) -> str:
    return ""


def _needs_gathering(settings: Settings, device: str) -> str:
    resident = settings["placement"] == "resident" and device not in ("", "cpu")
    return "--placement stream" if resident else ""


def _needs_copies(settings: Settings, device: str) -> str:
    return _needs_gpu(settings, device) or _needs_gathering(settings, device)


def _needs_gpu(settings: Settings, device: str) -> str:
    return "a GPU" if device == "cpu" else ""


def _needs_workers(settings: Settings, device: str) -> str:
    workers = settings["workers"]
    some = settings["loader"] == "tuned" if workers is None else workers > 0  # tuned chooses their number
    return "" if some else "--workers of 1 or more"


@dataclass(frozen=True)
class LoaderSetting:
    """One setting of a loader.

    Attributes:
        search: (device type, cores) -> values to try on such a machine, the loader's own default first.
        limits: least and most of a number, both included; None if it is no number.
        needs: (settings of a run, device type or "" while it is unknown) -> what is missing for an effect, as an error
            message names it; "" if nothing is.
    """

    search: Callable[[str, int], Sequence[Any]]
    limits: tuple[int, int] | None = None
    needs: Callable[[Settings, str], str] = _needs_nothing


OURS = {
    "placement": LoaderSetting(lambda device, cores: ["auto", "resident", *(["stream"] if device == "cuda" else [])]),
    "threads": LoaderSetting(lambda device, cores: sorted({0, 1, 2, cores}), (0, 1024), _needs_gathering),
    "prefetch": LoaderSetting(lambda device, cores: [3, 1, 2, 8] if device == "cuda" else [3], (0, 64), _needs_copies),
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
    "prefetch_factor": LoaderSetting(lambda device, cores: [2, 4], (1, 64), _needs_workers),
    "persistent_workers": LoaderSetting(lambda device, cores: [False, True], needs=_needs_workers),
    "pin_memory": LoaderSetting(lambda device, cores: [False, True] if device == "cuda" else [False], needs=_needs_gpu),
}
TUNED = DATALOADER | {
    "persistent_workers": LoaderSetting(lambda device, cores: [True, False], needs=_needs_workers),
    "pin_memory": LoaderSetting(lambda device, cores: [True, False] if device == "cuda" else [False], needs=_needs_gpu),
}
LOADER_SETTINGS: Mapping[LoaderName, Mapping[str, LoaderSetting]] = {
    "ours": OURS,
    "ffcv": FFCV,
    "dataloader": DATALOADER,
    "tuned": TUNED,
    "tensors": {},
}


def run_settings(loader: LoaderName) -> dict[str, LoaderSetting]:
    """The settings that a run with this loader reads: the loader's own, and those of ours, which loads test images."""
    return {**OURS, **LOADER_SETTINGS[loader]}


def unused_settings(settings: Settings, defaults: Settings, device: str) -> dict[str, tuple[Any, str]]:
    """The settings of loaders that have no effect beside the others: arguments and result as `config.unused`."""
    own, unused = run_settings(settings["loader"]), {}
    for table in LOADER_SETTINGS.values():
        for name in [name for name in table if name not in own]:
            loaders = [loader for loader, other in LOADER_SETTINGS.items() if name in other]
            unused[name] = defaults[name], f"--loader {' or '.join(loaders)}"
    for name, setting in own.items():
        if missing := setting.needs(settings, device):
            unused[name] = setting.search(device or "cpu", 1)[0], missing
    return unused


def checked_numbers(settings: Mapping[str, LoaderSetting], **values: Any) -> tuple[int, ...]:
    """A loader's arguments as Python integers.

    Raises:
        ConfigError: a value is no integer or outside its limits; names it.
    """
    return tuple(whole_number(name, value, *(settings[name].limits or ())) for name, value in values.items())
