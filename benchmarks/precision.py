"""A training step in bfloat16 against float32 on this CPU, for each stem: what `--amp auto` rests on.

    python benchmarks/precision.py --data-dir FOLDER --output benchmarks/results/precision.json

One fixed batch of 128 real images, channels_last ResNet-18, fused SGD; both sides in turn, the first turn not counted.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import get_args

import torch
from common import arguments, report

from fastmnist.config import Stem
from fastmnist.loader.loader import Batch, Loader
from fastmnist.prepare.prepare import prepare
from fastmnist.system.machine import processor_flags
from fastmnist.training.model import resnet18

BATCH_SIZE = 128
STEPS = {"imagenet": 8, "stride2": 4, "cifar": 2}  # per turn, about a second each


def compare(stem: Stem, batch: Batch, repeats: int) -> dict[str, list[float]]:
    """Images a second of each turn."""
    images, labels = batch
    model = resnet18(stem).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, fused=True)
    rates: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for turn in range(repeats + 1):
        for name in rates:
            begun = time.perf_counter()
            for _ in range(STEPS[stem]):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=name == "bfloat16"):
                    logits = model(images)
                torch.nn.functional.cross_entropy(logits.float(), labels).backward()
                optimizer.step()
            if turn:
                rates[name].append(BATCH_SIZE * STEPS[stem] / (time.perf_counter() - begun))
    return rates


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        path = prepare("mnist", str(options.data_dir), cache).train
        with Loader(path, BATCH_SIZE, device="cpu", dtype=torch.float32) as loader:
            batch = next(iter(loader))
    rows = []
    for stem in get_args(Stem):
        rates = compare(stem, batch, options.repeats)
        ratios = [b / a for a, b in zip(rates["float32"], rates["bfloat16"], strict=True)]
        rows.append(
            {
                "stem": stem,
                "float32_images_per_second_median": statistics.median(rates["float32"]),
                "bfloat16_images_per_second_median": statistics.median(rates["bfloat16"]),
                "bfloat16_over_float32": {"median": statistics.median(ratios), "range": [min(ratios), max(ratios)]},
                "n": len(ratios),
            }
        )
    result = {
        "rows": rows,
        "processor_flags": sorted(flag for flag in processor_flags() if flag.startswith(("avx", "amx"))),
    }
    report(result, options.output)


if __name__ == "__main__":
    main()
