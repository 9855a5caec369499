"""Ladder: from the plain notebook to the fast run, one setting per rung, measured on this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError, FastmnistError, check_limits
from fastmnist.presets import PRESETS
from fastmnist.runs.speedrun import Speedrun, speedrun, spread
from fastmnist.system.environment import origin
from fastmnist.system.machine import choose_device
from fastmnist.system.progress import Reporter
from fastmnist.system.statistics import summarise

Progress = Callable[[str, float], None]
# A difference below this share, or with ranges that overlap, counts as none: short runs vary by as much.
NOISE = 0.04


@dataclass(frozen=True)
class Rung:
    """name: of the change. settings: of `train`, on top of the rungs below. why: one sentence for the reader.

    else_why: the condition for a gain, shown where there is none. needs_gpu: left out on a CPU, for the reason in
    `instead`.
    """

    name: str
    settings: dict[str, Any]
    why: str
    else_why: str = ""
    needs_gpu: bool = False
    instead: str = ""


GROUND: dict[str, Any] = {
    "loader": "dataloader",
    "amp": "off",
    "compile": "off",
    "channels_last": False,
    "live_taps": False,
    "augment": False,
    "optimizer": "adamw",
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "label_smoothing": 0.0,
    "batch_size": 128,
}


def rungs(preset: str) -> list[Rung]:
    """All rungs, the plain notebook first; the last one takes the recipe of `preset`."""
    recipe = {name: value for name, value in PRESETS[preset]().items() if name not in ("images_seen", "stem")}
    plain = TrainConfig()
    names = ("optimizer", "learning_rate", "weight_decay", "label_smoothing", "augment", "shift", "rotation", "scale")
    settled = {name: getattr(plain, name) for name in names} | recipe
    return [
        Rung("plain DataLoader", {}, "torchvision's MNIST, sample by sample, as in most notebooks"),
        Rung(
            "2 workers",
            {"workers": 2},
            "two processes load while the model computes",
            "they need cores that the model leaves idle",
        ),
        Rung(
            "batched fetch",
            {"loader": "tuned", "workers": None},
            "one indexing operation per batch instead of one per image, and normalisation of whole batches",
            "the model must have been waiting for images",
        ),
        Rung(
            "compiled file and Loader",
            {"loader": "ours"},
            "one gather per batch from the memory map",
            "the model must have been waiting for batches; fastmnist bench shows the loaders alone",
        ),
        Rung(
            "resident on the device",
            {"placement": "resident"},
            "all images in the GPU's memory: nothing is copied per step",
            "copies hidden behind computation cost nothing before",
            needs_gpu=True,
            instead="on a CPU the images are in its memory already",
        ),
        Rung(
            "channels_last",
            {"channels_last": True},
            "the memory layout of oneDNN and tensor cores",
            "it pays where convolutions over large maps bound the step",
        ),
        Rung(
            "AMP",
            {"amp": "auto"},
            "bfloat16 or float16 where the hardware has it, float32 elsewhere",
            "it pays where arithmetic bounds the step; its casts cost time",
        ),
        Rung(
            "live taps",
            {"live_taps": True},
            "no arithmetic and no optimizer state for weights that only meet padding",
            "the last maps must have one or two pixels",
        ),
        Rung(
            "CUDA graph",
            {"compile": "graph"},
            "the whole step in one launch: the host no longer sets the pace",
            "the host must have been the bottleneck",
            needs_gpu=True,
            instead="there are no launches to save on a CPU",
        ),
        Rung(
            "torch.compile",
            {"compile": "default"},
            "fused kernels, at the price of compiling them first",
            "little is left beside convolutions",
            needs_gpu=True,
            instead="on a CPU compiling a ResNet-18 took 37 to 59 s and made it no faster",
        ),
        Rung(
            f"recipe of {preset}",
            settled,
            "SGD, one cycle up to a high rate, small shifts: fewer epochs are enough",
            "its purpose is accuracy",
        ),
    ]


@dataclass(frozen=True)
class Ladder:
    """rows: a dict per rung, see `ladder`. seconds: duration. interrupted: by Ctrl-C, where the rows end."""

    rows: Sequence[dict[str, Any]]
    origin: dict[str, Any]
    seconds: float = 0.0
    interrupted: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": list(self.rows),
            "seconds": self.seconds,
            "interrupted": self.interrupted,
            "settings": self.settings,
            **self.origin,
        }


def ladder(
    *,
    seeds: int | None = None,
    images: int | None = None,
    quick: bool = False,
    dataset: str | None = None,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    image_size: str | None = None,
    device: str = "auto",
    reporter: Reporter | None = None,
    progress: Progress = lambda text, share: None,
) -> Ladder:
    """Trains every rung in turn with the same seeds and the same number of images.

    A row has name, why and settings; images_per_second, seconds_per_epoch (both over the training clock),
    test_accuracy and compile_seconds, each with its values; over_below, the speed over that of the rung below; and
    effect, one of "faster", "none" and "slower", the last two with an explanation, or None with one seed. A rung that
    needs a GPU where there is none has `left_out`, one that failed `error`, both with the reason.

    Args:
        seeds: per rung; by default 3, or 1 if `quick`.
        images: training images of each run; by default `default_images`, or a quarter of that if `quick`.
        dataset, data_dir, cache_dir, image_size, device: as for `train`.
        reporter, progress: as for `speedrun`.

    Raises:
        ConfigError: a number out of range. FastmnistError: the data cannot be used, or no rung could be measured.
    """
    if seeds is None:
        seeds = 1 if quick else 3
    check_limits("--seeds", seeds, 1, math.inf)
    if images is not None and images < GROUND["batch_size"]:
        raise ConfigError(f"--images {images}: must be at least {GROUND['batch_size']}, one batch")
    begun = time.perf_counter()
    chosen = choose_device(device)
    on_gpu = chosen.type == "cuda"
    seen = images or default_images(device) // (4 if quick else 1)
    reporter = reporter or Reporter(quiet=True)
    where = {"dataset": dataset, "data_dir": data_dir, "cache_dir": cache_dir, "device": device}
    where["image_size"] = image_size
    settings = GROUND | {"images_seen": seen, "quiet": True}
    every = rungs("fast995" if on_gpu else "cpu")
    rows: list[dict[str, Any]] = []
    below: dict[str, Any] | None = None
    interrupted = False
    for number, rung in enumerate(every):
        progress(f"{rung.name}, rung {number + 1} of {len(every)}", number / len(every))
        row: dict[str, Any] = {"name": rung.name, "why": rung.why, "settings": rung.settings}
        if rung.needs_gpu and not on_gpu:
            rows.append(row | {"left_out": rung.instead})
            continue
        tried = settings | rung.settings
        try:
            found = speedrun(TrainConfig(**{**tried, **where}), seeds, curve=False, reporter=Reporter(quiet=True))
        except KeyboardInterrupt:
            interrupted = True
            break
        except FastmnistError as error:
            if not number:
                raise
            rows.append(row | {"error": str(error)})
            continue
        settings = tried
        row |= _measured(found, below)
        if row["effect"] in ("none", "slower"):
            row["explanation"] = rung.else_why
        rows.append(row)
        below = row
        reporter.say(describe(row))
        if found.interrupted:
            interrupted = True
            break
    if below is None:
        raise KeyboardInterrupt
    about = {"seeds": seeds, "images": seen, "device": str(chosen), "dataset": found.setup["dataset"]}
    return Ladder(rows, origin(chosen), time.perf_counter() - begun, interrupted, about)


def default_images(device: str) -> int:
    """Number of images that each run of `ladder` trains on, by device."""
    return 120_000 if choose_device(device).type == "cuda" else 12_000


def _measured(found: Speedrun, below: dict[str, Any] | None) -> dict[str, Any]:
    setup = found.setup
    rates = [setup["steps"] * setup["config"]["batch_size"] / seconds for seconds in found.seconds]
    rate = summarise(rates)
    row = {
        "n": len(rates),
        "images_per_second": rate.to_dict() | {"values": rates},
        "seconds_per_epoch": setup["train_images"] / rate.median,
        "test_accuracy": {"mean": statistics.fmean(found.accuracies), "stdev": spread(found.accuracies)},
        "test_accuracies": found.accuracies,
        "compile_seconds": setup["compile_seconds"],
        "amp": setup["amp"],
        "compile": setup["compile"],
        "over_below": None,
        "effect": None,
    }
    if below is not None:
        before = below["images_per_second"]
        row["over_below"] = rate.median / before["median"]
        row["effect"] = effect(rates, before["values"])
    return row


def effect(rates: Sequence[float], before: Sequence[float]) -> str | None:
    """Effect of a rung on the images/s of the rung below: "faster", "none" or "slower"; None where one seed ran."""
    if min(len(rates), len(before)) < 2:
        return None
    ratio = statistics.median(rates) / statistics.median(before)
    overlap = min(rates) <= max(before) and min(before) <= max(rates)
    return "none" if overlap or abs(ratio - 1) < NOISE else "faster" if ratio > 1 else "slower"


def describe(row: dict[str, Any]) -> str:
    """A measured rung in one line."""
    effects = {"faster": "{:.2f} times as fast", "none": "no difference here", "slower": "slower here, {:.2f} times"}
    effect = "" if row["effect"] is None else f", {effects[row['effect']].format(row['over_below'])}"
    return (
        f"{row['name']}: {row['images_per_second']['median']:,.0f} images/s{effect}; "
        f"{row['test_accuracy']['mean']:.2%} test accuracy"
    )
