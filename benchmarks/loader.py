"""The Loader on this machine: against a plain copy of memory, against torch's own gather, and against other loaders.

    python benchmarks/loader.py --data-dir FOLDER --output benchmarks/results/loader.json

All sides read MNIST's 60,000 training images from one compiled file, shuffled, on the CPU, in one process, in turn.
Each turn of a side begins with epochs that are not timed, for a quarter of a second: so that it finds in the caches
what its own epochs leave there, and that the processor is past its first burst (two threads slow down after some 50 ms
here). One value is then the median of all epochs in half a second, at least one. Ratios are taken turn by turn, of
rates in images/s. What stands against what:

- copy: `copy_` of the whole output from one dense tensor into another, as bytes or as float32: the memory's limit.
- index_select: `torch.index_select(out=)` of images and labels by slices of a ready permutation, into one pair of
  tensors again and again: such a batch cannot be kept, and the permutation costs nothing.
- ffcv: FFCV's Loader over the same file; the epochs that its own JIT takes are not timed.
- batched: a DataLoader over a dataset with `__getitems__`, as they are usually written (the sampler's list of numbers
  indexes a tensor); tuned: the same made as fast as it gets (`TunedDataLoader`); both without workers.
- plain: torchvision's MNIST with ToTensor and Normalize
  (with RandomAffine and two workers against augmented images).
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, report, summarise
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms
from torchvision.transforms import v2

from fastmnist.baselines.loaders import FFCVLoader, TunedDataLoader
from fastmnist.beton.reader import Beton
from fastmnist.beton.writer import write_beton
from fastmnist.loader.augment import Augmentation
from fastmnist.loader.loader import Loader
from fastmnist.loader.normalise import Normaliser
from fastmnist.sources.datasets import DATASETS, from_folder
from fastmnist.training.model import build_model

BATCH_SIZES = (512, 2048)
COUNT, SIZE = 60_000, 784
MOVES = Augmentation(shift=2.0, rotation=8.0, scale=0.08)
SLOW_SHARE = 6  # of the samples, one in so many for the loader that takes longest
STEPS = {"resnet18": 30, "small-cnn": 150}  # in each turn
Epoch = Callable[[], int]


class Batched(Dataset[Any]):
    """A whole batch at a time from tensors."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[indices], self.labels[indices]


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


def copying(dense: torch.Tensor) -> Epoch:
    target = torch.empty_like(dense)

    def epoch() -> int:
        target.copy_(dense)
        return len(dense)

    return epoch


def selecting(images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> Epoch:
    out = torch.empty((batch_size, SIZE), dtype=torch.uint8), torch.empty(batch_size, dtype=torch.int64)

    def prepared() -> Iterator[torch.Tensor]:
        return iter(torch.randperm(COUNT)[: COUNT // batch_size * batch_size].split(batch_size))

    ready = [prepared()]

    def epoch() -> int:
        for part in ready[0]:
            torch.index_select(images, 0, part, out=out[0])
            torch.index_select(labels, 0, part, out=out[1])
        return COUNT // batch_size * batch_size

    def timed() -> int:
        return epoch()

    timed.prepare = lambda: ready.__setitem__(0, prepared())  # type: ignore[attr-defined]
    return timed


def rate(epoch: Epoch, at_least: float = 0.5) -> float:
    """Images/s, the median of the epochs that fit into `at_least` seconds."""
    rates: list[float] = []
    ends = time.perf_counter() + at_least
    while not rates or time.perf_counter() < ends:
        getattr(epoch, "prepare", lambda: None)()
        begun = time.perf_counter()
        count = epoch()
        rates.append(count / (time.perf_counter() - begun))
    return statistics.median(rates)


def compare(sides: dict[str, Epoch], ours: str, repeats: int, slow: tuple[str, ...] = ()) -> dict[str, Any]:
    """Rates of all sides in turn, and what `ours` is of each of the others."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, epoch in sides.items():
            if name not in slow or not turn:
                rate(epoch, 0.25)
            if turn:
                rates[name].append(rate(epoch))
        print(f"turn {turn} of {repeats}: " + ", ".join(f"{n} {v[-1]:,.0f}" for n, v in rates.items() if v), flush=True)
    return {
        "images_per_second": {name: summarise(values) for name, values in rates.items()},
        f"{ours}_over": {
            name: summarise([a / b for a, b in zip(rates[ours], values, strict=True)])
            for name, values in rates.items()
            if name != ours
        },
    }


def of_loader(loader: Iterable[Any]) -> Epoch:
    return lambda: drain(loader)


FIRST_BATCH = """
import time
begun = time.perf_counter()
import json, sys
import torch
from fastmnist import Loader
from fastmnist.loader.augment import Augmentation
kind, path = sys.argv[1:]
options = {"dtype": torch.uint8 if kind == "uint8" else torch.float32}
if kind == "augmented":
    options["augment"] = Augmentation(2.0, 8.0, 0.08)
imported = time.perf_counter()
loader = Loader(path, 512, device="cpu", **options)
next(iter(loader))
print(json.dumps([imported - begun, time.perf_counter() - imported]))
"""


def first_batch(path: Path, repeats: int) -> dict[str, Any]:
    """Seconds from the Loader's construction to its first batch in a new process, numba's cache empty or filled.

    And those of the imports before it, torch among them.
    """
    found: dict[str, Any] = {}
    importing = []
    for kind in ("uint8", "float32", "augmented"):
        times: dict[str, list[float]] = {"cold": [], "warm": []}
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm"):
                    command = [sys.executable, "-c", FIRST_BATCH, kind, str(path)]
                    environment = os.environ | {"NUMBA_CACHE_DIR": cache}
                    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                    imported, first = json.loads(done.stdout)
                    times[state].append(first)
                    importing.append(imported)
        found[kind] = {state: summarise(values) for state, values in times.items()}
        print(f"first batch, {kind}: {json.dumps(found[kind])}", flush=True)
    found["imports"] = summarise(importing)
    return found


def training_step(path: Path, model_name: str, repeats: int) -> dict[str, Any]:
    """Seconds per step of training with the loader's batches over those with one fixed batch, both cores in use."""
    with Loader(path, 128, device="cpu", drop_last=True) as loader:
        moments = loader.file.moments
        model = build_model(model_name).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
        normalise = Normaliser(*moments)
        fixed = next(iter(loader))

        def step(batch: Any) -> float:
            begun = time.perf_counter()
            images, labels = next(loaded) if batch is None else batch
            functional.cross_entropy(model(normalise(images)), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            return time.perf_counter() - begun

        loaded = itertools.chain.from_iterable(itertools.repeat(loader))
        times: dict[str, list[float]] = {"fixed batch": [], "loader": []}
        for turn in range(repeats + 1):
            found: dict[str, list[float]] = {"fixed batch": [], "loader": []}
            for _ in range(STEPS[model_name]):  # step by step in turn: what else runs here meets both
                found["fixed batch"].append(step(fixed))
                found["loader"].append(step(None))
            if turn:
                for name, values in found.items():
                    times[name].append(statistics.mean(values))
    ratios = [a / b for a, b in zip(times["loader"], times["fixed batch"], strict=True)]
    result = {name: summarise(values) for name, values in times.items()} | {"loader_over_fixed": summarise(ratios)}
    print(f"step of {model_name}: {json.dumps(result)}", flush=True)
    return result


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    repeats = options.repeats
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.beton"
        source = from_folder("mnist", "train", options.data_dir)
        write_beton(path, source.images, source.labels, source=source.fingerprint)
        with Beton(path) as file:
            images = torch.from_numpy(file.images(np.arange(COUNT))).view(COUNT, SIZE)
            labels, moments = torch.from_numpy(file.labels.copy()), file.moments
        root = str(torchvision_copy(options.data_dir, Path(folder)))
        ends = [transforms.ToTensor(), transforms.Normalize(*moments)]
        moving = v2.RandomAffine(
            MOVES.rotation,
            (MOVES.shift / 28, MOVES.shift / 28),
            (1 - MOVES.scale, 1 + MOVES.scale),
            interpolation=v2.InterpolationMode.BILINEAR,
        )
        plain_data = datasets.MNIST(root, transform=transforms.Compose(ends))
        moved_data = datasets.MNIST(
            root,
            transform=v2.Compose([moving, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*moments)]),
        )
        some = torch.utils.data.Subset(moved_data, range(0, COUNT, SLOW_SHARE))
        result: dict[str, Any] = {"first_batch_seconds": first_batch(path, repeats)}
        result["training_step_seconds"] = {name: training_step(path, name, repeats) for name in STEPS}
        for batch_size in BATCH_SIZES:
            make = {"batch_size": batch_size, "device": "cpu"}
            usual = {"batch_size": batch_size, "shuffle": True}
            plain = of_loader(DataLoader(plain_data, **usual))
            floats = {"dtype": torch.float32}
            as_float = images.to(torch.float32)
            print(f"uint8, batch {batch_size}", flush=True)
            result[f"uint8_{batch_size}"] = compare(
                {
                    "loader": of_loader(Loader(path, **make)),
                    "loader, 1 thread": of_loader(Loader(path, **make, threads=1)),
                    "index_select": selecting(images, labels, batch_size),
                    "copy": copying(images),
                    "ffcv": of_loader(FFCVLoader(path, **make)),
                    "batched": of_loader(DataLoader(Batched(images, labels), collate_fn=lambda b: b, **usual)),
                    "tuned": of_loader(TunedDataLoader(path, **make, workers=0)),
                    "plain": plain,
                },
                "loader",
                repeats,
                slow=("plain",),
            )
            print(f"float32, batch {batch_size}", flush=True)
            result[f"float32_{batch_size}"] = compare(
                {
                    "loader": of_loader(Loader(path, **make, **floats)),
                    "loader, 1 thread": of_loader(Loader(path, **make, **floats, threads=1)),
                    "copy": copying(as_float),
                    "plain": plain,
                },
                "loader",
                repeats,
                slow=("plain",),
            )
            print(f"augmented, batch {batch_size}", flush=True)
            workers = DataLoader(some, **usual, num_workers=2, persistent_workers=True)
            result[f"augmented_{batch_size}"] = compare(
                {
                    "loader": of_loader(Loader(path, **make, **floats, augment=MOVES)),
                    "loader, 1 thread": of_loader(Loader(path, **make, **floats, augment=MOVES, threads=1)),
                    "plain, 2 workers": of_loader(workers),
                },
                "loader",
                repeats,
                slow=("plain, 2 workers",),
            )
            del workers
        report(result, options.output)


if __name__ == "__main__":
    main()
