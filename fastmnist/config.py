"""Every setting of a training run: its meaning, its default and its check. Flags and YAML keys come from here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from types import NoneType
from typing import Any, Literal, Optional, Union, get_args, get_origin, get_type_hints

from fastmnist.errors import ConfigError, check_limits
from fastmnist.loader_settings import LoaderName, settings_of_run, unused_settings

# Optional[...] instead of `| None`: the command line's types are read from these annotations on Python 3.10 too.
# ruff: noqa: UP045

Stem = Literal["imagenet", "stride2", "cifar"]
Amp = Literal["auto", "off", "bf16", "fp16"]
Compile = Literal["auto", "off", "graph", "default", "max-autotune"]


@dataclass(frozen=True)
class DataConfig:
    """Data and loader"""

    dataset: Optional[str] = None
    """mnist, fashion, kmnist, qmnist, emnist-<split> or digits; by default mnist, or digits if that cannot be had."""

    data_dir: Optional[str] = None
    """Folder with the IDX files (.gz or not; torchvision's MNIST/raw layout too) or with compiled files; by default
    $FASTMNIST_DATA, then the cache, then a download."""

    cache_dir: Optional[str] = None
    """Folder for compiled files and downloads; by default the user's cache folder."""

    verify: Literal["size", "full"] = "size"
    """How a compiled file is checked when it is opened: its size and addresses, or every byte."""

    val_size: Optional[int] = None
    """Training images held out for validation; by default 5,000, or a tenth of the training set if that is less."""

    batch_size: int = 128
    """Images per training step."""

    loader: LoaderName = "ours"
    """What loads the training images, to compare with ours: FFCV's loader on the same file, a DataLoader as notebooks
    write it, a tuned one, or all images as tensors on the device."""

    workers: Optional[int] = None
    """Processes of a DataLoader (by default 0, tuned: as many as pay) or threads of FFCV (by default 1)."""

    placement: Literal["auto", "resident", "stream"] = "auto"
    """Where the images are (ours): all in the device's memory, or streamed from the file."""

    threads: int = 0
    """Threads that gather a batch on the host (ours); 0 takes as many as pay."""

    prefetch: int = 3
    """Batches on their way to a GPU ahead of the current one (ours)."""

    order: Literal["auto", "random", "quasi_random"] = "auto"
    """Order of the training images: random, or some pages of the file at a time; auto does the latter where ours
    streams a file larger than the memory."""

    prefetch_factor: Optional[int] = None
    """Batches that each process of a DataLoader is ahead; by default 2."""

    persistent_workers: Optional[bool] = None
    """Keep a DataLoader's processes from epoch to epoch; by default true for tuned, false for dataloader."""

    pin_memory: Optional[bool] = None
    """Copy a DataLoader's batches to a GPU through page-locked memory; by default true for tuned, false for
    dataloader."""

    batches_ahead: int = 3
    """Batches that FFCV has ready ahead of the current one."""

    os_cache: bool = True
    """FFCV reads through the system's page cache, or else into memory of its own."""

    tuned_on: Optional[str] = None
    """Hardware and data that the settings were tuned on, written by fastmnist tune; train warns when it is another."""


@dataclass(frozen=True)
class ModelConfig:
    """Model"""

    model: str = "resnet18"
    """resnet18, small-cnn, or torchvision:<name> for any classifier of torchvision that takes images of this size."""

    stem: Stem = "imagenet"
    """First layer of resnet18: 7x7 stride 2 and max-pool, 3x3 stride 2, or 3x3 stride 1 (more accurate, slower)."""

    channels_last: bool = True
    """Weights and images in channels_last memory, which tensor cores and oneDNN prefer, or in torch's own layout."""

    live_taps: bool = True
    """Train resnet18 without those weights that only ever meet padding on images of this size: the same function."""


@dataclass(frozen=True)
class RecipeConfig:
    """Recipe"""

    epochs: Optional[float] = None
    """Passes over the training set, 0.5 for half of one; by default as many as make --images-seen, at most 20."""

    images_seen: int = 180_000
    """Training images in all where --epochs is not given; more than one pass is rounded to whole ones."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum, or AdamW."""

    learning_rate: Optional[float] = None
    """Peak of the one-cycle schedule; by default 0.1 for sgd, 0.003 for adamw."""

    momentum: float = 0.9
    """Nesterov momentum (sgd), or beta1 (adamw)."""

    weight_decay: float = 5e-4
    """Of all weights."""

    warmup: float = 0.3
    """Share of all steps in which the learning rate rises to its peak."""

    label_smoothing: float = 0.1
    """Probability that is spread over the wrong classes in the loss."""

    augment: bool = True
    """Shift, turn and scale each training image at random."""

    shift: float = 2.0
    """Largest shift in each direction (pixels)."""

    rotation: float = 8.0
    """Largest rotation (degrees)."""

    scale: float = 0.08
    """Largest change of size (0.1 is 10 % larger or smaller)."""

    seed: int = 0
    """Of the weights, the order and the augmentation."""


@dataclass(frozen=True)
class RunConfig:
    """Run"""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 and so on."""

    amp: Amp = "auto"
    """Mixed precision: bf16 from compute capability 8.0 and on processors that have it, fp16 with a scaler below."""

    compile: Compile = "auto"
    """graph records the whole step as one CUDA graph; default and max-autotune compile it first (torch.compile), which
    takes half a minute or minutes; auto records on a GPU, and compiles where the run is long enough."""

    log_every: Optional[int] = None
    """Steps between two lines in metrics.jsonl; by default 50, fewer in a short run."""

    out: Optional[str] = None
    """The run's folder, which must be new or empty; by default runs/<date>-<dataset>-<n>."""

    tensorboard: bool = False
    """Write TensorBoard events into the run's folder too."""

    quiet: bool = False
    """Print the result only."""


GROUPS = (DataConfig, ModelConfig, RecipeConfig, RunConfig)


@dataclass(frozen=True)
class TrainConfig(RunConfig, RecipeConfig, ModelConfig, DataConfig):
    """All settings of a run.

    Raises:
        ConfigError: a value cannot work; the message names the flag, the value and what is possible.
    """

    def __post_init__(self) -> None:
        for name, value in checked_settings(vars(self)).items():
            object.__setattr__(self, name, value)
        refuse_unused(vars(self))
        own = {name: setting.limits for name, setting in settings_of_run(self.loader).items()}
        for name, limits in (LIMITS | own).items():
            value = getattr(self, name)
            if value is not None and limits is not None:
                check_limits(flag(name), value, *limits)
        for name in ("learning_rate", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{flag(name)} {value} must be more than 0")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def recipe(self) -> dict[str, Any]:
        """All settings but the folders of this machine: what a result says that it was made with."""
        return {name: value for name, value in self.to_dict().items() if name not in FOLDERS}


LIMITS: dict[str, tuple[float, float] | None] = {
    "val_size": (0, math.inf),
    "batch_size": (2, math.inf),  # batch normalisation needs two
    "images_seen": (1, math.inf),
    "momentum": (0, 0.9999),
    "weight_decay": (0, math.inf),
    "warmup": (0.01, 0.99),
    "label_smoothing": (0, 0.99),
    "shift": (0, math.inf),
    "rotation": (0, 180),
    "scale": (0, 0.9),
    "seed": (0, 2**63 - 1),
    "log_every": (1, math.inf),
}
"""Least and most of a run's numbers, but for those of loaders, which `loader_settings` has."""


def unused(settings: Mapping[str, Any], device: str = "") -> dict[str, tuple[Any, str]]:
    """Settings that change nothing beside the others, with all as `loader_settings.unused_settings` gives them.

    Args:
        settings: some or all of a run's.
        device: its type; "" while it is unknown.
    """
    every = {**DEFAULTS, **settings}
    found = unused_settings(every, DEFAULTS, device)
    if every["model"] != "resnet18":
        found |= {name: (DEFAULTS[name], "--model resnet18") for name in ("stem", "live_taps")}
    return {name: why for name, why in found.items() if name in settings}


def refuse_unused(settings: Mapping[str, Any], device: str = "") -> None:
    """Raises ConfigError for a setting that changes nothing beside the others; `device` as in `unused`."""
    for name, (neutral, missing) in unused(settings, device).items():
        value = settings[name]
        if value not in (None, neutral):
            given = flag(name if value else f"no_{name}") if isinstance(value, bool) else f"{flag(name)} {value}"
            raise ConfigError(f"{given}: has no effect without {missing}; leave it out")


def without_unused(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run whose version took those without effect, these at the value that changes nothing either."""
    return {**settings, **{name: neutral for name, (neutral, _) in unused(settings).items()}}


def checked_settings(values: Mapping[Any, Any], source: str = "") -> dict[str, Any]:
    """Settings of a run with numbers of numpy and torch made plain, as YAML, JSON and a checkpoint keep them.

    Args:
        values: from names to values; some may be missing.
        source: what the message of an error begins with.

    Raises:
        ConfigError: there is no such setting, or its value has another type; names it.
    """
    types, checked = _types(), {}
    for name, value in without_retired(values).items():
        if name not in types:
            raise ConfigError(f"{source}{flag(short(name))} is no setting of a run; take it out")
        plain = value.item() if getattr(value, "ndim", None) == 0 else value
        if not _fits(plain, types[name]):
            raise ConfigError(f"{source}{flag(name)} {short(value)}: must be {_type_name(types[name])}")
        checked[name] = plain
    return checked


@cache
def _types() -> dict[str, Any]:
    return get_type_hints(TrainConfig)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is Union:
        return any(_fits(value, each) for each in get_args(kind))
    return type(value) in ((int, float) if kind is float else (kind,))


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    names = [each.__name__ for each in get_args(kind) or (kind,) if each is not NoneType]
    return " or ".join(names)


def short(value: Any) -> str:
    """Of what a damaged file holds; a list of lists may be endless when it is written out."""
    return str(value)[:40] if isinstance(value, (str, int, float, bool)) else f"of type {type(value).__name__}"


RETIRED = {"reuse_buffers": "every batch is safe to keep, at no cost"}  # settings of older versions, and why they went


def without_retired(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a file that an older version wrote, without those that mean nothing any more."""
    return {name: value for name, value in settings.items() if name not in RETIRED}


FOLDERS = ("data_dir", "cache_dir", "out")  # of one machine: no part of what was measured


def flag(name: str) -> str:
    """The command line's name of a setting."""
    return "--" + name.replace("_", "-")


DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(TrainConfig)}
