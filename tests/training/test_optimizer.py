"""Optimizer and schedule: momenta against torch's own optimizers, the shape of the one-cycle rate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError
from fastmnist.training.model import build_model
from fastmnist.training.optimizer import DIV_FACTOR, NEWTON_SCHULZ, MixedPrecisionOptimizer, Muon, one_cycle
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


@pytest.mark.parametrize("shape", [(8, 3), (3, 8), (4, 5, 2, 3), (3, 4, 5)])
def test_muon_on_matrices_is_torchs_and_sgd_on_the_rest(shape: tuple[int, ...]) -> None:
    """Of convolutions (out, in, height, width) and live taps (taps, out, in) too."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in (shape, (6,), (2, 6))]
    matrix = torch.nn.Parameter(as_matrix(weights[0].detach()).clone())
    rest = [torch.nn.Parameter(weight.detach().clone()) for weight in weights[1:]]
    ours = Muon(weights, torch.tensor(0.1), momentum=0.8, weight_decay=0.3)
    theirs = torch.optim.Muon([matrix], lr=0.1, momentum=0.8, weight_decay=0.3, ns_steps=NEWTON_SCHULZ)
    sgd = torch.optim.SGD(rest, lr=0.1, momentum=0.8, nesterov=True)
    for _ in range(3):
        for weight, twin in zip(weights, [None, *rest], strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator)
            if twin is not None:
                twin.grad = weight.grad.clone()
                with torch.no_grad():
                    twin.mul_(1 - 0.1 * 0.3)
        matrix.grad = as_matrix(weights[0].grad).clone()
        for optimizer in (ours, theirs, sgd):
            optimizer.step()
    torch.testing.assert_close(as_matrix(weights[0].detach()), matrix.detach(), atol=0.02, rtol=0)  # bfloat16
    for weight, twin in zip(weights[1:], rest, strict=True):
        torch.testing.assert_close(weight.detach(), twin.detach())


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    return (weight.transpose(0, 1) if weight.ndim == 3 else weight).flatten(1)


def test_muon_leaves_the_weights_alone_without_a_gradient() -> None:
    weights = [torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    optimizer = Muon(weights, torch.tensor(0.1), momentum=0.9, weight_decay=0.0)
    optimizer.step()
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert all(torch.equal(weight, torch.ones(3, 4)) for weight in weights)


def test_muon_refuses_a_gradient_scaler() -> None:
    config, precision = TrainConfig(optimizer="muon"), Precision(torch.float16, "a test")
    with pytest.raises(ConfigError, match="--optimizer muon"):
        MixedPrecisionOptimizer(build_model("patch-cnn"), config, precision, torch.device("cpu"))
