"""Accuracy over seeds with the plain defaults, and the training clock against the bare training step.

    python benchmarks/research/main_job.py --data-dir FOLDER --output benchmarks/results/main_job.json

Evidence for the Trainer: everything around the step (loading, augmentation, logging, checkpoints) may cost at most 42 %
of it. Each seed trains one epoch of 60,000 images. The bare step (one fixed batch of 128 real images, eager float32
channels_last ResNet-18, SGD) is timed before and after each run; the limit is its time for 85,000 images.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from fastmnist.config import TrainConfig
from fastmnist.files import write_json
from fastmnist.loader.loader import Loader
from fastmnist.prepare.prepare import prepare
from fastmnist.runs.train import train
from fastmnist.system.environment import origin
from fastmnist.system.statistics import row
from fastmnist.training.model import resnet18

LIMIT_IMAGES = 85_000
BATCH_SIZE, WARM_UP, STEPS = 128, 5, 40


def bare_images_per_second(path: Path) -> float:
    """Rate of a plain eager step on one fixed batch."""
    with Loader(path, BATCH_SIZE, device="cpu", dtype=torch.float32) as loader:
        images, labels = next(iter(loader))
    model = resnet18().to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            begun = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return STEPS * BATCH_SIZE / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with MNIST's four IDX files")
    parser.add_argument("--output", required=True, help="JSON file for the rows")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    accuracies, seconds, shares = [], [], []
    with tempfile.TemporaryDirectory() as cache:
        where = {"dataset": "mnist", "data_dir": options.data_dir, "cache_dir": cache, "device": "cpu"}
        settings = where | {"epochs": 1, "live_taps": False, "val_size": 0, "quiet": True}
        path = prepare("mnist", options.data_dir, cache).train
        for seed in range(options.seeds):
            before = bare_images_per_second(path)
            summary = train(TrainConfig(**settings, seed=seed, out=f"{cache}/run-{seed}")).summary
            bare = statistics.mean((before, bare_images_per_second(path)))
            accuracies.append(summary["test_accuracy"])
            seconds.append(summary["train_seconds"])
            shares.append(summary["train_seconds"] / (LIMIT_IMAGES / bare))
            print(f"seed {seed}: {accuracies[-1]:.2%}, {seconds[-1]:.1f} s, {shares[-1]:.2f} of the limit", flush=True)
    where = origin(torch.device("cpu"))
    measured = (
        ("test accuracy", accuracies, "share"),
        ("training clock", seconds, "seconds"),
        (f"training clock over {LIMIT_IMAGES:,} images of the bare step", shares, "ratio"),
    )
    write_json(options.output, {"rows": [row("main job", *found, where, settings) for found in measured]})


if __name__ == "__main__":
    main()
