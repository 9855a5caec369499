"""Settings of a training run: types, defaults, help texts and checks. Flags and YAML keys are derived from them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from types import NoneType
from typing import Any, Literal, Optional, Union, get_args, get_origin, get_type_hints

from fastmnist.errors import ConfigError, check_limits
from fastmnist.loader_settings import LoaderName, run_settings, unused_settings

# Optional[...] instead of `| None`: jsonargparse reads these annotations on Python 3.10 too.
# ruff: noqa: UP045

Stem = Literal["imagenet", "stride2", "cifar"]
Amp = Literal["auto", "off", "bf16", "fp16"]
Compile = Literal["auto", "off", "graph", "default", "max-autotune"]

MODELS = {
    "resnet18": "fastmnist.training.model:resnet18",
    "small-cnn": "fastmnist.training.model:small_cnn",
    "patch-cnn": "fastmnist.training.model:patch_cnn",
}
"""Each model's name and the function that makes it, as `training.model.build_model` calls it."""

FOLDERS = ("data_dir", "cache_dir", "out")
"""Settings that name folders of one machine: they do not affect a result."""

RETIRED = {"reuse_buffers": "every batch is safe to keep, at no cost"}
"""Settings of older versions, which are ignored in files, each with the reason."""


@dataclass(frozen=True)
class DataConfig:
    """Data and loader"""

    dataset: Optional[str] = None
    """mnist, fashion, kmnist, qmnist, emnist-<split>, cifar10, cifar100, svhn, digits; folder:PATH for pictures in
    PATH/train/<class>/ and PATH/test/<class>/, or in PATH/<class>/; or <name> for <name>-train.beton and
    <name>-test.beton in the data folder. By default mnist, or digits if mnist is unavailable."""

    data_dir: Optional[str] = None
    """Folder with the dataset's files as torchvision lays them out (IDX files also .gz) or with compiled files; by
    default $FASTMNIST_DATA, then the cache, then a download."""

    image_size: Optional[str] = None
    """Size of a folder's pictures, N or HxW (pixels), where they differ: each is resized to it."""

    cache_dir: Optional[str] = None
    """Folder for compiled files and downloads; by default the user's cache folder."""

    verify: Literal["size", "full"] = "size"
    """Check of a compiled file when it is opened: its size and addresses, or every byte."""

    val_size: Optional[int] = None
    """Training images held out for validation; by default 5,000, or a tenth of the training set if that is less."""

    batch_size: int = 128
    """Images per training step, in all processes together: each of several takes its share."""

    loader: LoaderName = "ours"
    """Loader of the training images: fastmnist's, or one to compare it with: FFCV on the same file, a plain or a tuned
    DataLoader, or all images as tensors on the device."""

    workers: Optional[int] = None
    """Processes of a DataLoader (by default 0; for tuned, chosen by the number of cores) or threads of FFCV (by default
    1)."""

    placement: Literal["auto", "resident", "stream"] = "auto"
    """Where ours keeps the images: all in the device's memory, or streamed from the file; auto is resident on a GPU
    with enough memory."""

    threads: int = 0
    """Threads with which ours gathers a batch on the host; 0 chooses the number."""

    prefetch: int = 3
    """Batches that ours copies to a GPU ahead of the current one."""

    order: Literal["auto", "random", "quasi_random"] = "auto"
    """Order of the training images: random over the whole file, or over a few of its pages at a time; auto is
    quasi_random where ours streams a file larger than the memory."""

    prefetch_factor: Optional[int] = None
    """Batches that each process of a DataLoader prepares ahead; by default 2."""

    persistent_workers: Optional[bool] = None
    """Keep the processes of a DataLoader from epoch to epoch; by default true for tuned, false for dataloader."""

    pin_memory: Optional[bool] = None
    """Copy a DataLoader's batches to a GPU through page-locked memory; by default true for tuned, false for
    dataloader."""

    batches_ahead: int = 3
    """Batches that FFCV prepares ahead of the current one."""

    os_cache: bool = True
    """FFCV reads through the system's page cache; otherwise into memory of its own."""

    tuned_on: Optional[str] = None
    """Hardware and data on which fastmnist tune found these settings; train warns if its own differ."""


@dataclass(frozen=True)
class ModelConfig:
    """Model"""

    model: str = "resnet18"
    """{models}, torchvision:<name> for any torchvision classifier that takes images of this size, or
    <package.module>:<function> for a model of your own."""

    stem: Stem = "imagenet"
    """First layer of resnet18: 7x7 stride 2 and max-pool, 3x3 stride 2, or 3x3 stride 1 (more accurate, slower)."""

    channels_last: bool = True
    """Keep weights and images in channels_last memory, which tensor cores and oneDNN prefer."""

    live_taps: bool = True
    """Train resnet18 without the kernel weights that only multiply zeros at this image size: the same function,
    faster."""


@dataclass(frozen=True)
class RecipeConfig:
    """Recipe"""

    epochs: Optional[float] = None
    """Passes over the training set, 0.5 for half of one; by default enough for --images-seen, at most 20."""

    images_seen: int = 180_000
    """Training images in all if --epochs is not given; above one pass, rounded to whole passes."""

    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    """SGD with Nesterov momentum, AdamW, or Muon: SGD whose updates of weight matrices are orthogonalised."""

    learning_rate: Optional[float] = None
    """Peak learning rate of the one-cycle schedule; by default 0.1 for sgd and muon, 0.003 for adamw."""

    momentum: float = 0.9
    """Nesterov momentum of sgd and muon, or beta1 of adamw."""

    weight_decay: float = 5e-4
    """Weight decay of every parameter."""

    warmup: float = 0.3
    """Share of the steps in which the learning rate rises to its peak."""

    label_smoothing: float = 0.1
    """Probability that the loss spreads over all classes."""

    augment: bool = True
    """Shift, rotate, scale and flip each training image at random."""

    shift: float = 2.0
    """Largest shift in each direction (pixels)."""

    rotation: float = 8.0
    """Largest rotation (degrees)."""

    scale: float = 0.08
    """Largest change of size (0.1 is 10 % larger or smaller)."""

    flip: Optional[bool] = None
    """Mirror each training image at random, left to right; by default true for cifar10 and cifar100, false for digits,
    letters and data of your own."""

    seed: int = 0
    """Seed of the weights, the order and the augmentation."""


@dataclass(frozen=True)
class RunConfig:
    """Run"""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 and so on."""

    amp: Amp = "auto"
    """Mixed precision; auto is bf16 on GPUs of compute capability 8.0 or more and on CPUs with bf16 instructions, fp16
    with a gradient scaler on older GPUs, off on other CPUs."""

    compile: Compile = "auto"
    """graph records the whole step as one CUDA graph; default and max-autotune run torch.compile first, which takes
    half a minute to minutes; auto records on a GPU, and compiles if the run is long enough."""

    sync_batchnorm: bool = False
    """Normalise batches by the statistics of all processes together, at two more exchanges per layer and step."""

    compress_gradients: bool = False
    """Send gradients between processes as bfloat16: half the bytes."""

    timeout: float = 10.0
    """Minutes after which a process that waits for another one gives up."""

    log_every: Optional[int] = None
    """Steps between two lines in metrics.jsonl; by default 50, fewer in a short run."""

    out: Optional[str] = None
    """Folder of the run, which must be new or empty; by default runs/<date>-<dataset>-<n>."""

    tensorboard: bool = False
    """Also write TensorBoard events into the run's folder."""

    quiet: bool = False
    """Print only the result."""


GROUPS = (DataConfig, ModelConfig, RecipeConfig, RunConfig)

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
    "timeout": (0.01, 1e5),
}
"""Least and most of each number, both included. `loader_settings` has those of the loaders."""


@dataclass(frozen=True)
class TrainConfig(RunConfig, RecipeConfig, ModelConfig, DataConfig):
    """All settings of a run.

    >>> config = TrainConfig(batch_size=256, loader="tuned", workers=2)
    >>> config.batch_size, config.learning_rate, config.to_dict()["stem"]
    (256, None, 'imagenet')
    >>> TrainConfig(warmup=1.5)
    Traceback (most recent call last):
    fastmnist.errors.ConfigError: --warmup 1.5 must be 0.01 to 0.99
    >>> TrainConfig(workers=2)
    Traceback (most recent call last):
    fastmnist.errors.ConfigError: --workers 2 has no effect without --loader ffcv or dataloader or tuned; leave it out

    Raises:
        ConfigError: a setting has a wrong type, is outside its limits, or has no effect beside the others. The message
            names the flag, the value and what is possible.
    """

    def __post_init__(self) -> None:
        for name, value in checked_settings(vars(self)).items():
            object.__setattr__(self, name, value)
        refuse_unused(vars(self))
        if self.image_size is not None:
            parse_size(self.image_size)
        limits_of_loader = {name: setting.limits for name, setting in run_settings(self.loader).items()}
        for name, limits in (LIMITS | limits_of_loader).items():
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
        """The settings that a result depends on: all but the folders of this machine."""
        return {name: value for name, value in self.to_dict().items() if name not in FOLDERS}


DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(TrainConfig)}


def unused(settings: Mapping[str, Any], device: str = "") -> dict[str, tuple[Any, str]]:
    """The settings that have no effect beside the others.

    Args:
        settings: all or some of a run's; the rest have their defaults.
        device: type of the device, "cpu" or "cuda"; "" while it is unknown.

    Returns:
        For each name, the value that it has in effect, and what it needs, in words.
    """
    every = {**DEFAULTS, **settings}
    without_effect = unused_settings(every, DEFAULTS, device)
    if every["model"] != "resnet18":
        without_effect |= {name: (DEFAULTS[name], "--model resnet18") for name in ("stem", "live_taps")}
    if not (every["dataset"] or "").startswith("folder:"):
        without_effect["image_size"] = None, "--dataset folder:PATH"
    return {name: reason for name, reason in without_effect.items() if name in settings}


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) in pixels.

    >>> parse_size("32"), parse_size("32x48")
    ((32, 32), (32, 48))

    Raises:
        ConfigError: it is neither N nor HxW.
    """
    sides = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if sides is None:
        raise ConfigError(f"--image-size {short(text)} must be N or HxW, in pixels, such as 32 or 32x48")
    return int(sides[1]), int(sides[2] or sides[1])


def refuse_unused(settings: Mapping[str, Any], device: str = "") -> None:
    """Raises ConfigError for a setting that has no effect beside the others; see `unused`."""
    for name, (effective, needs) in unused(settings, device).items():
        value = settings[name]
        if value not in (None, effective):
            given = flag(name if value else f"no_{name}") if isinstance(value, bool) else f"{flag(name)} {value}"
            raise ConfigError(f"{given} has no effect without {needs}; leave it out")


def without_unused(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, those without effect reset: older versions accepted and saved them."""
    return {**settings, **{name: effective for name, (effective, _) in unused(settings).items()}}


def checked_settings(values: Mapping[Any, Any], source: str = "") -> dict[str, Any]:
    """Settings whose names and types are right, with scalars of numpy and torch as plain Python numbers.

    Args:
        values: some or all of a run's settings, by name.
        source: the beginning of an error's message.

    Raises:
        ConfigError: a setting does not exist or its value has another type; names it.
    """
    types, checked = _types(), {}
    for name, value in without_retired(values).items():
        if name not in types:
            raise ConfigError(f"{source}{flag(short(name))} is not a setting of a run; remove it")
        plain = value.item() if getattr(value, "ndim", None) == 0 else value
        if not _fits(plain, types[name]):
            raise ConfigError(f"{source}{flag(name)} {short(value)} must be {in_words(types[name])}")
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


def in_words(kind: Any) -> str:
    """A setting's type, as a person would say it.

    >>> in_words(Optional[int]), in_words(float), in_words(Literal["a", "b"]), in_words(list[int])
    ('a whole number', 'a number', 'one of a, b', 'a list, [a whole number, ...]')
    """
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is list:
        return f"a list, [{in_words(get_args(kind)[0])}, ...]"
    [only] = [each for each in get_args(kind) or (kind,) if each is not NoneType]
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(only, "text")


def short(value: Any) -> str:
    """At most 40 characters of a value from a damaged file, which may be endless when written out."""
    return str(value)[:40] if isinstance(value, (str, int, float, bool)) else f"of type {type(value).__name__}"


def without_retired(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an older version's file that still exist."""
    return {name: value for name, value in settings.items() if name not in RETIRED}


def flag(name: str) -> str:
    """The command-line flag of a setting.

    >>> flag("batch_size")
    '--batch-size'
    """
    return "--" + name.replace("_", "-")
