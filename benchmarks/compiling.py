"""Loading and compiling on this machine: the Loader against a plain DataLoader, compiling against reading.

    python benchmarks/loading.py --data-dir FOLDER --output benchmarks/results/loading.json

Both sides run in turn in one process, after a warm-up, on all 60,000 training images of MNIST, shuffled, in batches of
512. The plain DataLoader is what notebooks write: torchvision's MNIST with ToTensor and Normalize, no workers.
"""

from __future__ import annotations

import gzip
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from common import arguments, report
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from fastmnist.data.beton import Beton
from fastmnist.data.datasets import DATASETS, from_folder
from fastmnist.data.loader import Loader
from fastmnist.data.writer import write_beton

BATCH_SIZE = 512


def seconds(action: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def drain(batches: Iterable[Any]) -> int:
    return sum(len(labels) for _, labels in batches)


def torchvision_copy(source: Path, root: Path) -> Path:
    """The four files unzipped in the layout that torchvision.datasets.MNIST reads."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem in [stem for names in DATASETS["mnist"].files.values() for stem in names]:
        with gzip.open(source / f"{stem}.gz") as packed, open(raw / stem, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return root


def summarise(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "train.beton"
        reading, beyond, rates, ratios = [], [], {}, {}
        for repeat in range(options.repeats + 1):
            read = seconds(lambda: list(from_folder("mnist", "train", options.data_dir).images.blocks(4096)))

            def compile_source() -> None:
                source = from_folder("mnist", "train", options.data_dir)
                write_beton(target, source.images, source.labels, source=source.fingerprint)

            both = seconds(compile_source)
            if repeat:  # the first one warms the caches
                reading.append(read)
                beyond.append(both - read)
        mean, std = Beton(target).moments
        plain_data = datasets.MNIST(
            str(torchvision_copy(options.data_dir, Path(folder))),
            transform=transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)]),
        )
        plain = DataLoader(plain_data, BATCH_SIZE, shuffle=True)
        loaders = {
            "uint8": Loader(target, BATCH_SIZE, device="cpu"),
            "float32": Loader(target, BATCH_SIZE, device="cpu", dtype=torch.float32),
        }
        for loader in loaders.values():
            drain(loader)
        plain_rates: list[float] = []
        for _ in range(options.repeats):
            plain_rates.append(60_000 / seconds(lambda: drain(plain)))
            for name, loader in loaders.items():
                rates.setdefault(name, []).append(60_000 / seconds(lambda loader=loader: drain(loader)))
                ratios.setdefault(name, []).append(rates[name][-1] / plain_rates[-1])
    result = {
        "compile_seconds_beyond_reading": summarise(beyond),
        "reading_seconds": summarise(reading),
        "plain_dataloader_images_per_second": summarise(plain_rates),
        "loader_images_per_second": {name: summarise(values) for name, values in rates.items()},
        "loader_over_plain_dataloader": {name: summarise(values) for name, values in ratios.items()},
        "batch_size": BATCH_SIZE,
    }
    report(result, options.output)


if __name__ == "__main__":
    main()
