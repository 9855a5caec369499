"""Evaluation against a plain loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastmnist.loader.loader import Loader
from fastmnist.training.evaluate import StopRequested, evaluate_model
from fastmnist.training.model import build_model


def test_evaluation_equals_a_plain_loop_and_can_be_stopped(tmp_path: Path, write_small_beton) -> None:
    write_small_beton(beton := tmp_path / "a.beton", 100)
    model = build_model("small-cnn").train()
    loader = Loader(beton, 32, shuffle=False, device="cpu")
    mean, std = loader.file.moments
    result = evaluate_model(model, loader, mean, std)
    images = torch.from_numpy(loader.file.images(np.arange(100))).permute(0, 3, 1, 2).float()
    model.eval()
    with torch.no_grad():
        logits = model((images / 255 - mean[0]) / std[0])
    expected = logits.argmax(1).numpy()
    assert np.allclose(result.probabilities, logits.softmax(1).numpy(), atol=1e-4)
    assert result.accuracy == pytest.approx((expected == loader.file.labels).mean())
    assert result.loss == pytest.approx(
        float(nn.functional.cross_entropy(logits, torch.from_numpy(loader.file.labels))), abs=1e-3
    )
    confusion = np.zeros((10, 10), np.int64)
    np.add.at(confusion, (loader.file.labels, expected), 1)
    assert np.array_equal(result.confusion(), confusion)
    model.train()
    with pytest.raises(StopRequested):
        evaluate_model(model, loader, mean, std, stop=lambda: True)
    assert model.training
