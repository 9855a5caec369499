"""A whole epoch of a run's own training loop, small-cnn with augmentation, on a subset of 5,120 images.

Each loader as `fastmnist train --loader NAME` sets it up: what hands out bytes is augmented in the training step, the
plain DataLoader augments image by image. The limit is as many steps on one fixed batch, of which some are made right
before each epoch.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from fastmnist.baselines.loaders import LOADERS
from fastmnist.config import TrainConfig
from fastmnist.training.loop import Trainer
from fastmnist.training.model import build_model
from fastmnist.training.precision import choose_precision
from fastmnist.training.session import loader_arguments

BATCH_SIZE, IMAGES, MODEL = 128, 5120, "small-cnn"
LIMIT_STEPS = 10
ROUNDS, WARM_UP = 6, 1
# FFCV 1.0 is of 2023: what it says of today's numpy and numba is known. It changes both for the whole process.
FFCV = [pytest.mark.ffcv, pytest.mark.last, pytest.mark.filterwarnings("ignore")]


@pytest.mark.benchmark(group="epoch")
@pytest.mark.parametrize("name", [pytest.param(name, marks=FFCV if name == "ffcv" else []) for name in LOADERS])
def test_epoch(name, data, device, measure):
    # The rate stays small, for the fixed batch comes again and again.
    config = TrainConfig(
        loader=name, model=MODEL, batch_size=BATCH_SIZE, epochs=ROUNDS + WARM_UP, learning_rate=1e-3, amp="off"
    )
    settings = loader_arguments(config)
    height, width, channels = data.file.image_shape
    torch.manual_seed(0)
    model = build_model(MODEL, in_channels=channels, image_size=(height, width)).to(
        device=device, memory_format=torch.channels_last
    )
    subset = np.arange(IMAGES)
    with LOADERS[name](data.path, BATCH_SIZE, device=device, indices=subset, drop_last=True, **settings) as loader:
        trainer = Trainer(model, loader, config, choose_precision(config.amp, device))
        images, labels, rows = next(loader.chunks())
        table = trainer.transforms(0)
        transforms = None if table is None else table.index_select(0, rows)
        loader.set_epoch(0)

        def bare(count: int) -> float:
            model.train()
            step = trainer.step
            trainer.synchronize()
            begun = time.perf_counter()
            for _ in range(LIMIT_STEPS):
                trainer.load(images, labels, transforms, 0)
                trainer.train_step(0)
                trainer.seek(step)  # there is no step of the epoch that these are
            trainer.synchronize()
            return (time.perf_counter() - begun) / LIMIT_STEPS * len(loader)

        measure(
            trainer.run_epoch,
            images=len(loader) * BATCH_SIZE,
            limit=bare,
            rounds=ROUNDS,
            warm_up=WARM_UP,
            settings={"batch_size": BATCH_SIZE, "model": MODEL, "subset": IMAGES, "loader": name},
            kind="ours" if name == "ours" else "baseline",
        )
