"""Optimizer and schedule: momenta against torch's own optimizers, the shape of the one-cycle rate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmnist.config import TrainConfig
from fastmnist.training.model import build_model
from fastmnist.training.optimizer import DIV_FACTOR, MixedPrecisionOptimizer, one_cycle
from fastmnist.training.precision import Precision


@pytest.mark.parametrize("warmup", [0.01, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_any_number_of_steps_has_a_schedule(steps: int, warmup: float) -> None:
    rates = one_cycle(steps, 0.4, warmup)
    assert len(rates) == steps
    assert all(0 < rate <= 0.4 + 1e-9 for rate in rates)


def test_one_cycle_rises_to_its_peak_and_falls() -> None:
    rates = one_cycle(50, 0.4, 0.2)
    assert max(rates) == pytest.approx(0.4, rel=0.01)
    assert np.argmax(rates) == pytest.approx(0.2 * 50, abs=1)
    assert rates[0] == pytest.approx(0.4 / DIV_FACTOR)
    assert rates == sorted(rates[: np.argmax(rates)]) + sorted(rates[np.argmax(rates) :], reverse=True)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.0}, {"optimizer": "adamw"}])
def test_momenta_of_zeros_are_those_of_a_new_optimizer(settings: dict) -> None:
    config, model = TrainConfig(**settings), build_model("small-cnn")
    ours = MixedPrecisionOptimizer(model, config, Precision(None, "a test"), torch.device("cpu"))
    parameters, results = list(model.parameters()), []
    plain: torch.optim.Optimizer  # has no momenta yet
    if config.optimizer == "adamw":
        plain = torch.optim.AdamW(parameters, betas=(0.9, 0.999), weight_decay=config.weight_decay, fused=True)
    else:
        plain = torch.optim.SGD(
            parameters,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
            fused=True,
        )
    generator = torch.Generator().manual_seed(0)
    begun = [parameter.detach().clone() for parameter in parameters]
    grads = [[torch.randn(p.shape, generator=generator) for p in parameters] for _ in range(3)]
    for optimizer in (ours.base, plain):
        with torch.no_grad():
            for parameter, value in zip(parameters, begun, strict=True):
                parameter.copy_(value)
        optimizer.param_groups[0]["lr"] = 0.1
        for step in grads:
            for parameter, grad in zip(parameters, step, strict=True):
                parameter.grad = grad.clone()
            optimizer.step()
        results.append([parameter.detach().clone() for parameter in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(results[0], begun, strict=True))
