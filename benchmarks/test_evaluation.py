"""Evaluating a model on all test images, against the same number of forward passes over one fixed batch."""

from __future__ import annotations

import pytest
import torch

from fastmnist.loader.loader import Loader
from fastmnist.loader.normalise import Normaliser
from fastmnist.measure.step import fixed_batch_seconds
from fastmnist.training.evaluate import EVALUATION_BATCH, evaluate_model
from fastmnist.training.model import build_model

LIMIT_BATCHES = 4


@pytest.mark.benchmark(group="evaluation")
@pytest.mark.parametrize("model_name", ["small-cnn"], ids=lambda name: f"fastmnist.evaluate_model, {name}")
def test_evaluation(model_name, data, device, measure):
    height, width, channels = data.file.image_shape
    model = build_model(model_name, in_channels=channels, image_size=(height, width)).to(
        device=device, memory_format=torch.channels_last
    )
    with Loader(data.test_path, EVALUATION_BATCH, device=device, shuffle=False) as loader:
        fixed = Normaliser(*data.moments, device)(next(iter(loader))[0])

        @torch.inference_mode()
        def forward(images: int) -> float:
            model.eval()
            return fixed_batch_seconds(model, fixed, LIMIT_BATCHES, device) * images / len(fixed)

        measure(
            lambda: evaluate_model(model, loader, *data.moments),
            images=len(loader.indices),
            limit=forward,
            settings={"batch_size": EVALUATION_BATCH, "model": model_name},
        )
