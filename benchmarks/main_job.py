"""The main job on this machine: accuracy over seeds, and the training clock against the bare training step.

    python benchmarks/main_job.py --data-dir FOLDER --output benchmarks/results/main_job.json

Each seed trains one epoch on all 60,000 images with the plain defaults. The bare step (one fixed batch of 128 real
images, eager float32 channels_last ResNet-18, SGD, no loader, no augmentation) is timed before and after each run, in
the same process; the limit is the time that it takes for 85,000 images. One epoch is 60,000, so a ratio below 1 says
that all that surrounds the step costs less than 42 % of it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import arguments, report

from fastmnist.config import TrainConfig
from fastmnist.loader.loader import Loader
from fastmnist.prepare.prepare import prepare
from fastmnist.runs.train import train
from fastmnist.training.model import resnet18

LIMIT_IMAGES = 85_000
BATCH_SIZE, WARM_UP, STEPS = 128, 5, 40


def bare_images_per_second(path: Path) -> float:
    """The plain step on one fixed batch, as any eager training loop has it."""
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


def one_seed(seed: int, data_dir: str, cache: Path) -> dict[str, float]:
    path = prepare("mnist", data_dir, str(cache)).train
    before = bare_images_per_second(path)
    result = train(
        TrainConfig(
            dataset="mnist",
            data_dir=data_dir,
            cache_dir=str(cache),
            epochs=1,
            live_taps=False,  # as the bare step
            val_size=0,
            seed=seed,
            quiet=True,
            out=str(cache / f"run-{seed}"),
        )
    ).summary
    after = bare_images_per_second(path)
    limit = LIMIT_IMAGES / statistics.mean((before, after))
    return {
        "seed": seed,
        "test_accuracy": result["test_accuracy"],
        "train_seconds": result["train_seconds"],
        "total_seconds": result["total_seconds"],
        "images_per_second": result["images_per_second"],
        "bare_images_per_second_before": before,
        "bare_images_per_second_after": after,
        "limit_seconds": limit,
        "share_of_limit": result["train_seconds"] / limit,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        rows = [one_seed(seed, str(options.data_dir), Path(cache)) for seed in options.seeds]
    accuracies = [row["test_accuracy"] for row in rows]
    shares = [row["share_of_limit"] for row in rows]
    result = {
        "command": "fastmnist train --preset none --no-live-taps --dataset mnist --epochs 1 --val-size 0 --seed S",
        "n": len(rows),
        "test_accuracy_mean": statistics.mean(accuracies),
        "test_accuracy_stdev": statistics.stdev(accuracies) if len(rows) > 1 else None,
        "share_of_limit_median": statistics.median(shares),
        "share_of_limit_range": [min(shares), max(shares)],
        "rows": rows,
    }
    report(result, options.output)


if __name__ == "__main__":
    main()
