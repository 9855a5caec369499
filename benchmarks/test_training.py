"""Training with each loader, as `fastmnist train --loader NAME` sets it up, against training on one fixed batch.

- training step: both step by step in turn. "of_limit" is the fixed batch's time over the loader's, "data_stall" the
  rest to 1: the share of a step that waits for data. On a GPU, where a step ends after the host has gone on, 25 steps
  take turns with 25.
- epoch: the run's own loop, small-cnn on 5,120 images. What hands out bytes is augmented in the training step, the
  plain DataLoader augments image by image. Some steps on a fixed batch right before each epoch are the limit.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch.nn import functional

from fastmnist.baselines.loaders import LOADERS
from fastmnist.config import TrainConfig
from fastmnist.loader.normalise import Normaliser
from fastmnist.measure.step import fixed_batch_seconds
from fastmnist.system.machine import synchronize
from fastmnist.system.statistics import summarise
from fastmnist.training.loop import Trainer
from fastmnist.training.model import build_model
from fastmnist.training.precision import choose_precision
from fastmnist.training.session import loader_arguments

BATCH_SIZE = 128
STEPS = {"small-cnn": 20, "resnet18": 5}  # in a round, about half a second of each on two cores
AT_A_TIME = {"cpu": 1, "cuda": 25}
IMAGES, LIMIT_STEPS, ROUNDS, WARM_UP = 5120, 10, 6, 1  # of "epoch"
# FFCV 1.0 is of 2023: its warnings about today's numpy and numba are known. It changes both for the whole process.
FFCV = [pytest.mark.ffcv, pytest.mark.last, pytest.mark.filterwarnings("ignore")]


def make_model(name: str, data, device: torch.device) -> torch.nn.Module:
    height, width, channels = data.file.image_shape
    torch.manual_seed(0)
    model = build_model(name, in_channels=channels, image_size=(height, width))
    return model.to(device=device, memory_format=torch.channels_last)


@pytest.mark.benchmark(group="training step")
@pytest.mark.parametrize(
    ("name", "model_name"),
    [
        pytest.param(name, model, id=f"{name}, {model}", marks=FFCV if name == "ffcv" else [])
        for model in STEPS
        for name in LOADERS
    ],
)
def test_step(name, model_name, data, device, measure_turns, benchmark):
    model = make_model(model_name, data, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, fused=True)
    normalise, together = Normaliser(*data.moments, device), AT_A_TIME[device.type]
    settings = loader_arguments(TrainConfig(loader=name, augment=False), data.path)

    def step(batch) -> None:
        images, labels = batch
        values = normalise(images) if images.dtype == torch.uint8 else images
        functional.cross_entropy(model(values), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    with LOADERS[name](data.path, BATCH_SIZE, device=device, drop_last=True, **settings) as loader:
        fixed = next(iter(loader))

        def fresh():
            while True:
                yield from loader

        batches = fresh()

        def steps():
            seconds = {True: 0.0, False: 0.0}
            for number in range(STEPS[model_name]):
                for loaded in (True, False) if number % 2 else (False, True):
                    begun = time.perf_counter()
                    for _ in range(together):
                        step(next(batches) if loaded else fixed)
                    synchronize(device)
                    seconds[loaded] += time.perf_counter() - begun
            return seconds[True], seconds[False]

        turns = measure_turns(
            steps,
            images=STEPS[model_name] * together * BATCH_SIZE,
            settings={"batch_size": BATCH_SIZE, "model": model_name, **settings},
            kind="ours" if name == "ours" else "baseline",
        )
        stall = summarise([1 - fixed / loaded for loaded, fixed in turns])
        benchmark.extra_info["data_stall"] = stall.to_dict()
        batches.close()


@pytest.mark.benchmark(group="epoch")
@pytest.mark.parametrize("name", [pytest.param(name, marks=FFCV if name == "ffcv" else []) for name in LOADERS])
def test_epoch(name, data, device, measure):
    # The rate stays small, because the fixed batch comes again and again.
    config = TrainConfig(
        loader=name, model="small-cnn", batch_size=BATCH_SIZE, epochs=ROUNDS + WARM_UP, learning_rate=1e-3, amp="off"
    )
    settings, model = loader_arguments(config, data.path), make_model(config.model, data, device)
    subset = np.arange(IMAGES)
    with LOADERS[name](data.path, BATCH_SIZE, device=device, indices=subset, drop_last=True, **settings) as loader:
        trainer = Trainer(model, loader, config, choose_precision(config.amp, device))
        *fixed, rows = next(loader.chunks())
        table = trainer.transforms(0)
        transforms = None if table is None else table.index_select(0, rows)
        loader.set_epoch(0)

        def step(batch) -> None:
            trainer.seek(0)
            trainer.load(*batch, transforms, 0)
            trainer.train_step(0)

        def limit(images: int) -> float:
            model.train()
            done = trainer.step
            seconds = fixed_batch_seconds(step, fixed, LIMIT_STEPS, device)
            trainer.seek(done)
            return seconds * len(loader)

        measure(
            trainer.run_epoch,
            images=len(loader) * BATCH_SIZE,
            limit=limit,
            rounds=ROUNDS,
            warm_up=WARM_UP,
            settings={"batch_size": BATCH_SIZE, "model": config.model, "subset": IMAGES, "loader": name},
            kind="ours" if name == "ours" else "baseline",
        )
