"""A training step with each loader's batches against the same step on one fixed batch, step by step in turn.

"of_limit" is the fixed batch's time over the loader's, "data_stall" what is left to 1: the share of a step that passes
because batches are loaded. On a GPU, where a step ends after the host has gone on, some steps at a time take turns.
"""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn import functional

from fastmnist.baselines.loaders import LOADERS
from fastmnist.config import TrainConfig
from fastmnist.loader.normalise import Normaliser
from fastmnist.system.statistics import summarise
from fastmnist.training.model import build_model
from fastmnist.training.session import loader_arguments

BATCH_SIZE = 128
STEPS = {"small-cnn": 20, "resnet18": 5}  # in a round, about half a second of each on two cores
AT_A_TIME = {"cpu": 1, "cuda": 25}
# FFCV 1.0 is of 2023: what it says of today's numpy and numba is known. It changes both for the whole process.
FFCV = [pytest.mark.ffcv, pytest.mark.last, pytest.mark.filterwarnings("ignore")]


def training_step(model_name: str, data, device: torch.device):
    height, width, channels = data.file.image_shape
    model = build_model(model_name, in_channels=channels, image_size=(height, width)).to(
        device=device, memory_format=torch.channels_last
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, fused=True)
    normalise = Normaliser(*data.moments, device)

    def step(batch) -> None:
        images, labels = batch
        values = normalise(images) if images.dtype == torch.uint8 else images
        functional.cross_entropy(model(values), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


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
    step = training_step(model_name, data, device)
    together = AT_A_TIME[device.type]
    settings = loader_arguments(TrainConfig(loader=name, augment=False))
    with LOADERS[name](data.path, BATCH_SIZE, device=device, drop_last=True, **settings) as loader:
        fixed = next(iter(loader))

        def fresh():
            while True:
                yield from loader

        batches = fresh()

        def seconds(next_batch) -> float:
            begun = time.perf_counter()
            for _ in range(together):
                step(next_batch())
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - begun

        def steps():
            real = bare = 0.0
            for number in range(STEPS[model_name]):
                for loaded in (True, False) if number % 2 else (False, True):
                    if loaded:
                        real += seconds(lambda: next(batches))
                    else:
                        bare += seconds(lambda: fixed)
            return real, bare

        turns = measure_turns(
            steps,
            images=STEPS[model_name] * together * BATCH_SIZE,
            settings={"batch_size": BATCH_SIZE, "model": model_name, **settings},
            kind="ours" if name == "ours" else "baseline",
        )
        stall = summarise([1 - bare / real for real, bare in turns])
        benchmark.extra_info["data_stall"] = stall.to_dict()
        batches.close()
