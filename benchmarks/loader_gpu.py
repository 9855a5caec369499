"""The Loader on a GPU: a training step fed by it against the same step on one fixed batch, and copies to the device.

    taskset -c 0,1 python benchmarks/loader_gpu.py --data-dir FOLDER --output benchmarks/results/loader_gpu.json

Two cores stand for Colab's. The step is ResNet-18 (imagenet stem) under AMP with its normalisation and its
augmentation, forward, backward and SGD; both sides in turn. A copy is what the Loader moves in "stream" without a
model, against copies of the same bytes from one pinned buffer; both by the clock of the host around a synchronised
epoch. With --device cpu it only shows that it runs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import arguments, report, summarise
from torch.nn import functional

from fastmnist.data.augment import Augmentation, warp_on_device
from fastmnist.data.datasets import from_folder
from fastmnist.data.loader import Loader
from fastmnist.data.normalise import Normaliser
from fastmnist.data.writer import write_beton
from fastmnist.training.model import build_model
from fastmnist.training.precision import choose_precision

MOVES = Augmentation(shift=2.0, rotation=8.0, scale=0.08)
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    begun = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begun


def steps(
    path: Path, placement: str, batch_size: int, device: torch.device, count: int, repeats: int
) -> dict[str, Any]:
    """Seconds per step with the loader's batches over those with a fixed one."""
    precision = choose_precision("auto", device)
    model = build_model().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    with Loader(path, batch_size, device=device, placement=placement, drop_last=True) as loader:
        normalise = Normaliser(*loader.file.moments, device)
        draws = MOVES.draw(batch_size, 0, 0)
        matrices = torch.from_numpy(MOVES.matrices(draws, loader.file.image_shape[:2])).to(device)

        def train(batches: Batches) -> None:
            for _ in range(count):
                images, labels = next(batches)
                values = normalise(warp_on_device(images.float(), matrices)).to(memory_format=torch.channels_last)
                amp = precision.amp
                with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
                    logits = model(values)
                functional.cross_entropy(logits.float(), labels).backward()
                optimizer.step()
                optimizer.zero_grad()

        def fresh() -> Batches:
            while True:
                yield from loader

        fixed_batch = next(iter(loader))

        def fixed() -> Batches:
            while True:
                yield fixed_batch

        both = {"fixed batch": fixed(), "loader": fresh()}
        times: dict[str, list[float]] = {name: [] for name in both}
        for turn in range(repeats + 1):
            for name in list(both) if turn % 2 else reversed(list(both)):
                found = seconds(lambda batches=both[name]: train(batches), device) / count
                if turn:
                    times[name].append(found)
    ratios = [a / b for a, b in zip(times["loader"], times["fixed batch"], strict=True)]
    return {
        "placement": placement,
        "batch_size": batch_size,
        "amp": precision.name,
        **{f"seconds_with_{name.replace(' ', '_')}": summarise(values) for name, values in times.items()},
        "loader_over_fixed": summarise(ratios),
    }


def copies(path: Path, batch_size: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """Bytes/s of a "stream" epoch without a model over those of plain pinned copies of the same sizes."""
    with Loader(path, batch_size, device=device, placement="stream", drop_last=True) as loader:
        size, count = loader.file.image_size, len(loader)
        pinned = torch.empty((batch_size, size), dtype=torch.uint8, pin_memory=device.type == "cuda")
        target = torch.empty((batch_size, size), dtype=torch.uint8, device=device)

        def plain() -> None:
            for _ in range(count):
                target.copy_(pinned, non_blocking=True)

        def stream() -> None:
            for _ in loader:
                pass

        rates: dict[str, list[float]] = {"plain": [], "stream": []}
        for turn in range(repeats + 1):
            for name, work in (("plain", plain), ("stream", stream)):
                found = batch_size * size * count / seconds(work, device)
                if turn:
                    rates[name].append(found)
    ratios = [a / b for a, b in zip(rates["stream"], rates["plain"], strict=True)]
    return {
        "batch_size": batch_size,
        **{f"{name}_bytes_per_second": summarise(values) for name, values in rates.items()},
        "stream_over_plain": summarise(ratios),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 512, 2048], help="of the steps")
    options = parser.parse_args()
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.beton"
        source = from_folder("mnist", "train", options.data_dir)
        write_beton(path, source.images, source.labels, source=source.fingerprint)
        result = {
            "steps": [
                steps(path, placement, batch_size, device, options.steps, options.repeats)
                for batch_size in options.batch_sizes
                for placement in ("resident", "stream")
            ],
            "copies": [copies(path, batch_size, device, options.repeats) for batch_size in (512, 2048, 8192)],
        }
    report(result, options.output, device)


if __name__ == "__main__":
    main()
