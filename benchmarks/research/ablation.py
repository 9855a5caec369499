"""Accuracy and seconds of each way to train faster: one change to the cpu preset per row.

    python benchmarks/research/ablation.py --data-dir FOLDER --output benchmarks/results/ablation.json \\
        --table docs/ablation.md

Evidence for what the cpu preset takes (live taps, bfloat16, batch 128) and what it leaves out. All rows train with the
same seeds on 55,000 images; the accuracy is that on the 5,000 held out, so the test set chooses nothing. Seconds come
from runs of their own: some steps of all rows in turn, as a ratio to the preset's. A change that is no setting of
`train` is written out here and was not taken into the package.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fastmnist.config import TrainConfig
from fastmnist.files import write_bytes, write_json
from fastmnist.presets import preset_config
from fastmnist.system.environment import describe_hardware, origin
from fastmnist.system.progress import Reporter
from fastmnist.system.statistics import in_turns, ratios
from fastmnist.training.loop import Trainer
from fastmnist.training.session import Session

TURNS, TIMED_IMAGES = 7, 2048
FIRST_PART = 0.5  # of the steps, on smaller images
SMALL_BATCHES = 0.5  # of the steps, in halves
EASY_FROM = 0.6  # of the steps done, from which on easy images are left out


@dataclass(frozen=True)
class Way:
    """name: what is changed. settings: of `train`. change: of a trainer that is about to begin."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Trainer], None] = lambda trainer: None


def zero_last_gamma(trainer: Trainer) -> None:
    """Each residual block begins as the identity (P. Goyal et al., "Accurate, large minibatch SGD", 2017, 5.1)."""
    for name, module in trainer.model.named_modules():
        if name.endswith("bn2") and isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)


def dirac_convolutions(trainer: Trainer) -> None:
    """Each 3x3 convolution begins by handing its first channels on (K. Jordan, 2024, 3.2: dirac initialisation)."""
    state = trainer.model.state_dict()  # with all taps, live or not
    for weight in state.values():
        if weight.ndim == 4 and weight.shape[2:] == (3, 3):
            nn.init.dirac_(weight[: weight.shape[1]])
    trainer.model.load_state_dict(state)


def whitened_stem(trainer: Trainer) -> None:
    """The first layer begins with the principal directions of image patches, scaled to unit variance, both signs.

    K. Jordan, "94 % on CIFAR-10 in 3.29 seconds on a single GPU", 2024, 3.1; with 7x7 patches there are 49 directions,
    of which the 32 with the largest variance are taken.
    """
    convolution = trainer.model.get_submodule("conv1")
    images = trainer.normalise(torch.from_numpy(trainer.loader.file.images(np.arange(2000))).permute(0, 3, 1, 2))
    patches = functional.unfold(images, 7, padding=3, stride=2).transpose(1, 2).flatten(0, 1)  # (n, 49)
    variances, directions = torch.linalg.eigh(torch.cov(patches.T))
    filters = (directions / (variances + 5e-4).sqrt()).T.flip(0)[:32].view(32, 1, 7, 7)
    with torch.no_grad():
        convolution.weight.copy_(torch.cat([filters, -filters]))


def faster_statistics(trainer: Trainer) -> None:
    for module in trainer.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3


def averaged_weights(trainer: Trainer) -> None:
    """An exponential moving average over the second half of the steps, decay 0.95, taken at the end."""
    inner, weights = trainer.train_step, list(trainer.model.parameters())
    average: list[torch.Tensor] = []

    def train_step(at: int) -> None:
        inner(at)
        values = [weight.detach() for weight in weights]
        if trainer.step < trainer.steps // 2:
            return
        if not average:
            average.extend(value.clone() for value in values)
        torch._foreach_lerp_(average, values, 0.05)
        if trainer.step == trainer.steps:
            torch._foreach_copy_(values, average)
            refresh(trainer)

    trainer.train_step = train_step  # type: ignore[method-assign]


def refresh(trainer: Trainer) -> None:
    """After the weights were changed from outside."""
    trainer.optimizer.refresh()


def lookahead(trainer: Trainer) -> None:
    """Every five steps the weights go half of the way that they went (M. Zhang et al., "Lookahead", 2019)."""
    inner, weights = trainer.train_step, list(trainer.model.parameters())
    slow = [weight.detach().clone() for weight in weights]

    def train_step(at: int) -> None:
        inner(at)
        if trainer.step % 5 == 0 or trainer.step == trainer.steps:
            values = [weight.detach() for weight in weights]
            torch._foreach_lerp_(slow, values, 0.5)
            torch._foreach_copy_(values, slow)
            refresh(trainer)

    trainer.train_step = train_step  # type: ignore[method-assign]


def smaller_batches_first(trainer: Trainer) -> None:
    """Two steps with half of the batch each, at the rate over 1.4, until half of the images are seen."""
    inner, half = trainer.train_step, trainer.loader.batch_size // 2
    until = round(trainer.steps * SMALL_BATCHES)
    trainer.rates = [rate / 1.4 if at < until else rate for at, rate in enumerate(trainer.rates)]

    def train_step(at: int) -> None:
        if trainer.step >= until:
            return inner(at)
        images, labels, first = trainer._loaded
        start = (at - first) * trainer.loader.batch_size
        for half_at in (start, start + half):
            part = slice(half_at, half_at + half)
            trainer.optimizer.rate.fill_(trainer.rates[trainer.step])
            trainer._losses[at], trainer._right[at] = trainer.update(images[part], labels[part])
        trainer.step += 1

    trainer.train_step = train_step  # type: ignore[method-assign]


def smaller_images_first(trainer: Trainer) -> None:
    """20x20 in the first half (J. Howard's progressive resizing): layer3's and layer4's maps keep their size."""
    inner = trainer.model.forward

    def forward(images: torch.Tensor) -> torch.Tensor:
        if trainer.model.training and trainer.step < trainer.steps * FIRST_PART:
            images = functional.interpolate(images, (20, 20), mode="area")
            images = images.contiguous(memory_format=torch.channels_last)
        logits: torch.Tensor = inner(images)
        return logits

    trainer.model.forward = forward


def muon(trainer: Trainer) -> None:
    """Muon (K. Jordan, 2024; torch.optim.Muon) for the inner convolutions, SGD for the rest; learning rate 0.02."""
    named = list(trainer.model.named_parameters())
    inner = [weight for name, weight in named if weight.ndim > 1 and name not in ("conv1.weight", "fc.weight")]
    chosen = {id(weight) for weight in inner}
    flat = [nn.Parameter(as_matrix(weight.detach()).clone()) for weight in inner]
    newton_schulz = torch.optim.Muon(flat, lr=0.02, momentum=0.9, weight_decay=0.0)
    rest = torch.optim.SGD(
        [weight for _, weight in named if id(weight) not in chosen],
        lr=0.0,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
    )
    peak = max(trainer.rates)

    def step() -> None:
        rate = float(trainer.optimizer.rate)
        rest.param_groups[0]["lr"], newton_schulz.param_groups[0]["lr"] = rate, 0.02 * rate / peak
        for matrix, weight in zip(flat, inner, strict=True):
            assert weight.grad is not None
            matrix.grad = as_matrix(weight.grad)
        rest.step()
        newton_schulz.step()
        with torch.no_grad():
            for matrix, weight in zip(flat, inner, strict=True):
                write_back(matrix, weight)

    trainer.optimizer.base.step = step  # type: ignore[method-assign,assignment]


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """(O, the rest): of a convolution in channels_last, or of live taps (taps, O, C)."""
    return (weight.transpose(0, 1) if weight.ndim == 3 else weight.permute(0, 2, 3, 1)).flatten(1)


def write_back(matrix: torch.Tensor, weight: torch.Tensor) -> None:
    if weight.ndim == 3:
        taps, out, channels = weight.shape
        weight.copy_(matrix.view(out, taps, channels).transpose(0, 1))
    else:
        out, channels, height, width = weight.shape
        weight.copy_(matrix.view(out, height, width, channels).permute(0, 3, 1, 2))


def without_easy_images(trainer: Trainer) -> None:
    """From three fifths of the steps on, gradients of the harder half of each batch alone; all are still computed."""
    inner = trainer.compute

    def compute(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if trainer.step < trainer.steps * EASY_FROM:
            return inner(images, labels)
        trainer.model.eval()
        amp = trainer.precision.amp
        with torch.no_grad(), torch.autocast(trainer.device.type, amp or torch.bfloat16, enabled=amp is not None):
            losses = functional.cross_entropy(trainer.model(images).float(), labels, reduction="none")
        trainer.model.train()
        hard = losses.topk(len(labels) // 2).indices
        loss, right = inner(images[hard], labels[hard])
        return loss, 2 * right

    trainer.compute = compute


def ways(config: TrainConfig) -> list[Way]:
    """The preset itself, then one change each."""
    rate, size, decay = config.learning_rate or 0.1, config.batch_size, config.weight_decay
    larger = {"batch_size": 2 * size, "learning_rate": rate * 1.4}
    return [
        Way("the cpu preset"),
        Way("all taps, as in torchvision", {"live_taps": False}),
        Way("float32", {"amp": "off"}),
        Way("float32, all taps", {"amp": "off", "live_taps": False}),
        Way("batches of half the size, rate over 1.4", {"batch_size": size // 2, "learning_rate": rate / 1.4}),
        Way("batches of twice the size, rate times 1.4", larger),
        Way("twice the learning rate", {"learning_rate": rate * 2}),
        Way("AdamW, rate 0.003", {"optimizer": "adamw", "learning_rate": 0.003, "weight_decay": 0.02}),
        Way("Muon, rate 0.02", {}, muon),
        Way("momentum 0.8", {"momentum": 0.8}),
        Way("four times the weight decay", {"weight_decay": decay * 4}),
        Way("no label smoothing", {"label_smoothing": 0.0}),
        Way("no augmentation", {"augment": False}),
        Way("twice the augmentation", {"shift": config.shift * 2, "rotation": config.rotation * 2}),
        Way("averaged weights", {}, averaged_weights),
        Way("Lookahead, 5 steps, half the way", {}, lookahead),
        Way("batches of twice the size, in halves at first", larger, smaller_batches_first),
        Way("twice the size, four times the weight decay", larger | {"weight_decay": decay * 4}),
        Way("residual blocks begin as the identity", {}, zero_last_gamma),
        Way("3x3 convolutions begin as the identity", {}, dirac_convolutions),
        Way("first layer begins whitened", {}, whitened_stem),
        Way("batch statistics with momentum 0.3", {}, faster_statistics),
        Way("20x20 pixels in the first half", {}, smaller_images_first),
        Way("the harder half of each batch, late", {}, without_easy_images),
    ]


@contextmanager
def changed(way: Way, config: TrainConfig, seed: int) -> Iterator[Session]:
    """A run before its first step, with the way's change made."""
    with Session(replace(config, **way.settings, seed=seed), Reporter(quiet=True)) as session:
        way.change(session.trainer)
        refresh(session.trainer)
        yield session


def accuracy(way: Way, config: TrainConfig, seed: int) -> float:
    with changed(way, config, seed) as session:
        while session.trainer.step < session.trainer.steps:
            session.trainer.run_epoch()
        return session.evaluate(session.loaders.validation).accuracy


def seconds_per_image(way: Way, config: TrainConfig) -> float:
    """Over some steps from four parts of a run."""
    with changed(way, config, 0) as session:
        trainer, taken, seen = session.trainer, 0.0, 0
        size, transforms = trainer.loader.batch_size, trainer.transforms(0)
        batches = trainer.loader.chunks()
        trainer.model.train()
        for part in (0.0, 0.2, 0.55, 0.9):
            trainer.seek(int(part * trainer.steps))
            for at in range(max(1, TIMED_IMAGES // 4 // size) + 1):
                images, labels, rows = next(batches)
                begun = time.perf_counter()
                trainer.load(images, labels, None if transforms is None else transforms.index_select(0, rows), 0)
                trainer.train_step(0)
                trainer.synchronize()
                if at:  # the first step of a part warms up
                    taken += time.perf_counter() - begun
                    seen += size
        return taken / seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with MNIST's four IDX files")
    parser.add_argument("--output", required=True, help="JSON file for the rows")
    parser.add_argument("--table", type=Path, required=True, help="Markdown file for the table")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=TURNS)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache:
        where = {"dataset": "mnist", "data_dir": options.data_dir, "cache_dir": cache, "device": "cpu"}
        config = preset_config("cpu", **where, log_every=2**31)
        some = ways(config)
        timed = in_turns({way.name: partial(seconds_per_image, way, config) for way in some}, options.turns)
        for way in some:
            accuracies = [accuracy(way, config, seed) for seed in range(options.seeds)]
            row = {
                "name": way.name,
                "settings": way.settings,
                "n": len(accuracies),
                "val_accuracy_mean": statistics.fmean(accuracies),
                "val_accuracy_stdev": statistics.stdev(accuracies),
                "val_accuracies": accuracies,
                "seconds_over_preset": ratios(timed[way.name], timed[some[0].name]).to_dict(),
            }
            rows.append(row)
            print(f"{row['val_accuracy_mean']:.3%}  {row['seconds_over_preset']['median']:.2f}  {way.name}", flush=True)
    result = {"preset": "cpu", "config": config.recipe(), "rows": rows, **origin(torch.device("cpu"))}
    write_json(options.output, result)
    write_bytes(options.table, table(result).encode())


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown, with where they come from."""
    rows = result["rows"]
    lines = [
        "# What each way to train faster is worth",
        "",
        "Each row changes one thing in the `cpu` preset. Accuracy: on 5,000 held-out images, mean",
        f"and standard deviation of {rows[0]['n']} seeds. Seconds: per image of a training step, over the preset's,",
        f"median and interval of {rows[0]['seconds_over_preset']['n']} turns. {describe_hardware(result['hardware'])}, "
        "torch",
        f"{result['versions']['torch']}, {result['date'][:10]}; made by `python benchmarks/research/ablation.py`.",
        "",
        "| changed | accuracy | seconds over the preset's |",
        "| --- | ---: | ---: |",
    ]
    for row in rows:
        took = row["seconds_over_preset"]
        spread = "" if row is rows[0] else f" ({took['low']:.2f} to {took['high']:.2f})"
        lines.append(
            f"| {row['name']} | {row['val_accuracy_mean']:.2%} ± {100 * row['val_accuracy_stdev']:.2f} | "
            f"{took['median']:.2f}{spread} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
