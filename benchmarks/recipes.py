"""Training without fastmnist's Trainer: the recipes that presets are held against, by the same clocks.

The training clock runs from the request of a batch to the end of its step, and stands still during evaluation. Images
come from the loaders of `fastmnist.baselines`: what notebooks have (torchvision's transforms, sample by sample), or the
fastest that plain tensors allow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fastmnist.baselines.loaders import PlainDataLoader, TensorLoader
from fastmnist.beton.reader import Beton
from fastmnist.loader.augment import Augmentation, warp_on_device
from fastmnist.loader.loader import Loader
from fastmnist.loader.normalise import Normaliser
from fastmnist.system.machine import synchronize
from fastmnist.training.evaluate import EVALUATION_BATCH, evaluate_model
from fastmnist.training.model import resnet18

BATCH_SIZE = 128


@dataclass
class Trained:
    """Clocks and test accuracy of one run.

    looks: per epoch, its number, the training seconds until then and the test accuracy.
    mlperf_seconds: from the first touch of the data to the end of the evaluation; None where it is not measured.
    """

    seed: int
    train_seconds: float = 0.0
    mlperf_seconds: float | None = None
    test_accuracy: float = 0.0
    looks: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plain_recipe(train: Beton, test: Beton, device: torch.device, seed: int) -> Trained:
    """One epoch, batch 128, SGD with Nesterov momentum, OneCycle up to 0.1, shifts of up to 2 pixels.

    Eager float32 in channels_last, from a tensor in memory: what a person who knows PyTorch writes.
    """
    torch.manual_seed(seed)
    model: nn.Module = resnet18().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    augmentation = Augmentation(shift=2, rotation=0, scale=0)
    normalise = Normaliser(*train.moments, device)
    with TensorLoader(train, BATCH_SIZE, seed=seed, device=device, drop_last=True, rank=0, world_size=1) as loader:
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=len(loader) + 1)
        moves = augmentation.matrices(augmentation.draw(len(train), seed, 0), train.image_shape[:2])
        transforms = torch.from_numpy(moves).to(device)

        def steps() -> Iterator[None]:
            for images, labels, rows in loader.chunks():
                moved = warp_on_device(images.float(), transforms.index_select(0, rows))
                values = normalise(moved).contiguous(memory_format=torch.channels_last)
                functional.cross_entropy(model(values), labels).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                yield

        return _epochs(model, steps, test, train.moments, seed, most=1, until=1.0)


def notebook_recipe(
    train: Beton,
    test: Beton,
    device: torch.device,
    seed: int,
    *,
    until: float = 0.99,
    most: int = 6,
    batches: int | None = None,
) -> Trained:
    """The usual notebook: a DataLoader with 2 workers over torchvision's MNIST, Adam 1e-3, batch 128.

    Eager float32, no schedule, no augmentation. It ends with the first epoch whose test accuracy is at least `until`,
    or after `most` epochs (of `batches` each, if given). Stopping by the test set is in its favour.
    """
    torch.manual_seed(seed)
    model: nn.Module = resnet18().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with PlainDataLoader(train, BATCH_SIZE, workers=2, seed=seed, device=device, rank=0, world_size=1) as loader:

        def steps() -> Iterator[None]:
            for images, labels in islice(loader, batches):
                optimizer.zero_grad()
                functional.cross_entropy(model(images.contiguous()), labels).backward()
                optimizer.step()
                yield

        return _epochs(model, steps, test, train.moments, seed, most=most, until=until)


def small_cnn_recipe(train: Beton, test: Beton, device: torch.device, seed: int) -> Trained:
    """The fastest published recipe that we know: a small CNN, one epoch, Adam up to 0.01, all images on the device.

    99.04 % in 0.762 s on a GTX 1660 Ti, evaluation included (github.com/tuomaso/train_mnist_fast); written anew. Eager
    float32, no augmentation.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 24, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(800, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    ).to(device)
    size, count = 256, len(train)
    steps = -(-count // size)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.7, 0.9))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps, cycle_momentum=False)
    synchronize(device)
    begun = time.perf_counter()
    (images, labels), (test_images, test_labels) = (_on_device(file, device) for file in (train, test))
    normalise = Normaliser(*train.moments, device)
    images, test_images = normalise(images), normalise(test_images)
    synchronize(device)
    trained, started = Trained(seed), time.perf_counter()
    for batch in torch.randperm(count, device=device).split(size):
        functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    synchronize(device)
    trained.train_seconds = time.perf_counter() - started
    with torch.no_grad():
        right = torch.cat([model(part).argmax(1) for part in test_images.split(5000)]) == test_labels
    trained.test_accuracy = right.float().mean().item()
    trained.mlperf_seconds = time.perf_counter() - begun
    return trained


def _on_device(file: Beton, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    with Loader(file, len(file), shuffle=False, device=device, rank=0, world_size=1) as loader:
        images, labels = next(iter(loader))
    return images.contiguous(), labels


def _epochs(
    model: nn.Module,
    steps: Callable[[], Iterator[None]],
    test: Beton,
    moments: tuple[tuple[float, ...], tuple[float, ...]],
    seed: int,
    *,
    most: int,
    until: float,
) -> Trained:
    device = next(model.parameters()).device
    trained = Trained(seed)
    with Loader(test, EVALUATION_BATCH, shuffle=False, device=device, rank=0, world_size=1) as loader:
        for epoch in range(most):
            model.train()
            begun = time.perf_counter()
            for _ in steps():
                pass
            synchronize(device)
            trained.train_seconds += time.perf_counter() - begun
            trained.test_accuracy = evaluate_model(model, loader, *moments).accuracy
            look = {"epoch": epoch + 1, "seconds": trained.train_seconds, "test_accuracy": trained.test_accuracy}
            trained.looks.append(look)
            if trained.test_accuracy >= until:
                break
    return trained
