"""Optimizer: fused SGD, AdamW or Muon with 16-bit weight copies, a loss scaler and a one-cycle learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError
from fastmnist.system.processes import world_size
from fastmnist.training.live_taps import LiveConv2d
from fastmnist.training.overlap import join
from fastmnist.training.precision import Precision

DEFAULT_RATES = {"sgd": 0.1, "adamw": 0.003, "muon": 0.1}
DIV_FACTOR, FINAL_DIV_FACTOR = 25.0, 1e4  # peak rate / first rate, first rate / last rate
INITIAL_SCALE = 2.0**10  # of float16 gradients: at torch's default of 2**16 the first step overflows
NEWTON_SCHULZ = 3  # iterations of Muon; more gave no more accuracy here
QUINTIC = 3.4445, -4.7750, 2.0315  # coefficients of x, x^3 and x^5
LOWERED = (nn.Conv2d, nn.Linear, LiveConv2d)  # what autocast computes in its dtype; normalisation stays in float32


def one_cycle(steps: int, peak: float, warmup: float) -> list[float]:
    """The learning rate of each step, by torch's OneCycleLR (L. Smith, N. Topin: "Super-convergence", 2017).

    >>> [round(rate, 3) for rate in one_cycle(6, peak=0.1, warmup=0.5)]
    [0.004, 0.037, 0.091, 0.095, 0.061, 0.019]

    Args:
        warmup: the share of the steps over which the rate rises to `peak`.
    """
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=peak)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        peak,
        total_steps=steps + 1,
        pct_start=warmup,
        cycle_momentum=False,
        div_factor=DIV_FACTOR,
        final_div_factor=FINAL_DIV_FACTOR,
    )
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return rates


class LowWeights:
    """Copies of a model's float32 weights in a 16-bit dtype, for the forward and backward pass.

    A step then has no cast per weight, as autocast has. P. Micikevicius et al., "Mixed precision training", ICLR 2018.

    Attributes:
        tensors: the copies by parameter name, as torch.func.functional_call takes them.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._whole = {
            f"{name}.{leaf}" if name else leaf: parameter
            for name, module in model.named_modules()
            if isinstance(module, LOWERED)
            for leaf, parameter in module.named_parameters(recurse=False)
        }
        self.tensors = {name: whole.detach().to(dtype).requires_grad_() for name, whole in self._whole.items()}
        self._grads = [torch.zeros_like(whole) for whole in self._whole.values()]

    @torch.no_grad()
    def hand_over_gradients(self) -> None:
        """Moves the copies' gradients to the float32 weights; a weight whose copy has none keeps none."""
        everything = zip(self.tensors.values(), self._whole.values(), self._grads, strict=True)
        used = [(low, whole, grad, low.grad) for low, whole, grad in everything if low.grad is not None]
        torch._foreach_copy_([grad for _, _, grad, _ in used], [found for _, _, _, found in used])
        for low, whole, grad, _ in used:
            low.grad, whole.grad = None, grad

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the float32 weights again."""
        torch._foreach_copy_(list(self.tensors.values()), list(self._whole.values()))


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum, and the updates of matrices replaced by the nearest orthogonal ones.

    K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. A convolution's weight is the
    matrix (out, in x kernel); the last one, the classifier's, is left to SGD. Weight decay is decoupled. torch has a
    Muon from 2.9 on, for matrices alone, whose every iteration meets the long side.

    Args:
        parameters: all of a model's, in its order.
        rate: () float32, the learning rate.
    """

    def __init__(
        self, parameters: list[nn.Parameter], rate: torch.Tensor, *, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(parameters, {"lr": rate, "momentum": momentum, "weight_decay": weight_decay})
        self._matrices = {id(parameter) for parameter in [each for each in parameters if each.ndim > 1][:-1]}
        for parameter in parameters:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        used = [(weight, weight.grad) for weight in group["params"] if weight.grad is not None]
        if not used:
            return
        weights, grads = [weight for weight, _ in used], [grad for _, grad in used]
        momenta = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, grads)
        updates = list(torch._foreach_add(grads, momenta, alpha=group["momentum"]))
        for at, weight in enumerate(weights):
            if id(weight) in self._matrices:
                updates[at] = _orthogonalised(updates[at])
        torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        torch._foreach_mul_(updates, group["lr"])
        torch._foreach_sub_(weights, updates)


def _orthogonalised(update: torch.Tensor) -> torch.Tensor:
    """`update` of a weight as a matrix with all singular values near 1, times sqrt(rows / columns) where it is tall.

    Newton-Schulz iterations with K. Jordan's quintic, on the Gram matrix of the shorter side: the long side meets two
    products, however many iterations there are.
    """
    live = update.ndim == 3  # live taps are (taps, out, in)
    spread = update.transpose(0, 1) if live else update.movedim(1, -1)  # as it lies in memory in channels_last
    matrix = spread.flatten(1)
    rows, columns = matrix.shape
    wide = (matrix.T if rows > columns else matrix).to(torch.bfloat16)
    gram = (wide @ wide.T).float()
    norm = gram.trace().sqrt() + 1e-12  # at least the largest singular value
    gram = gram / norm**2
    product = factor = _quintic(gram)
    for _ in range(NEWTON_SCHULZ - 1):
        gram = factor @ gram @ factor
        factor = _quintic(gram)
        product = factor @ product
    found = (product.to(torch.bfloat16) @ wide).float() * (max(1, rows / columns) ** 0.5 / norm)
    found = (found.T if rows > columns else found).reshape(spread.shape)
    return found.transpose(0, 1) if live else found.movedim(-1, 1)


def _quintic(gram: torch.Tensor) -> torch.Tensor:
    """The matrix that takes X with gram = X X^T one iteration on: a + b gram + c gram^2."""
    found = torch.addmm(gram, gram, gram, beta=QUINTIC[1], alpha=QUINTIC[2])
    found.diagonal().add_(QUINTIC[0])
    return found


class MixedPrecisionOptimizer:
    """From a loss to new weights: backward pass, loss scaling, and torch's optimizer on the float32 weights.

    Every tensor keeps its place in memory, so that a recorded step stays valid.

    Attributes:
        rate: () float32 on the device, the learning rate of the next step.
        base: torch's optimizer.
        scaler: scales float16 gradients; disabled in other dtypes.
        low: 16-bit copies of the weights; None in float32, and with several processes, since
            DistributedDataParallel averages the gradients of a model's own weights.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, precision: Precision, device: torch.device) -> None:
        self._parameters = list(model.parameters())
        if config.optimizer == "muon" and precision.scaled:
            raise ConfigError("--optimizer muon has no gradient scaler, which --amp fp16 needs; say --amp off or bf16")
        self.rate = torch.zeros((), device=device)
        self.base = _torch_optimizer(self._parameters, config, self.rate, device)
        self._create_momenta()
        self.low = None if precision.amp is None or world_size() > 1 else LowWeights(model, precision.amp)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=INITIAL_SCALE, enabled=precision.scaled)
        self.scaler.scale(torch.zeros((), device=device))  # creates its tensors

    def _create_momenta(self) -> None:
        """Creates momenta of zeros by a step at rate 0.

        Left to the first step, fused SGD takes uninitialised memory, and leaves it so when the scaler skips that step.
        """
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.base.step()
        self.base.zero_grad(set_to_none=True)
        for value in self._momenta():
            value.zero_()

    def _momenta(self) -> list[torch.Tensor]:
        values = [value for state in self.base.state.values() for value in state.values()]
        return [value for value in values if isinstance(value, torch.Tensor)]

    def backward(self, loss: torch.Tensor) -> None:
        """Computes the gradients of a mean loss ()."""
        self.scaler.scale(loss).backward()
        join()

    def step(self) -> None:
        """Updates the weights at `rate` and drops their gradients; nothing in it waits for the device."""
        if self.low is not None:
            self.low.hand_over_gradients()
        self.scaler.step(self.base)
        self.scaler.update()
        self.base.zero_grad(set_to_none=True)
        self.refresh()

    def refresh(self) -> None:
        """Renews the 16-bit copies; to be called when the weights changed by other means than `step`."""
        if self.low is not None:
            self.low.refresh()

    def drop_gradients(self) -> None:
        """Forgets the gradients of a backward pass that no step follows."""
        self.base.zero_grad(set_to_none=True)
        for tensor in () if self.low is None else self.low.tensors.values():
            tensor.grad = None

    def reset(self) -> None:
        """Momenta of zeros and the initial scale, for weights that are new."""
        with torch.no_grad():
            for value in self._momenta():
                value.zero_()
        if self.scaler.is_enabled():
            fresh = torch.amp.GradScaler(self.rate.device.type, init_scale=INITIAL_SCALE)
            self.scaler.load_state_dict(fresh.state_dict())
        self.refresh()

    def tensors(self) -> list[torch.Tensor]:
        """All that `step` changes but the scaler's state: weights, their copies, momenta."""
        low = [] if self.low is None else list(self.low.tensors.values())
        return [*self._parameters, *low, *self._momenta()]

    def state_dict(self) -> dict[str, Any]:
        """{"optimizer": …, "scaler": …}, as torch gives them."""
        return {"optimizer": self.base.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a checked `state_dict`, but for the settings of the optimizer; the weights are loaded before."""
        with torch.no_grad():
            for number, saved in state["optimizer"]["state"].items():
                for name, value in saved.items():
                    self.base.state[self._parameters[number]][name].copy_(value)
        self.scaler.load_state_dict(state["scaler"])
        self.refresh()


def _torch_optimizer(
    parameters: list[nn.Parameter], config: TrainConfig, rate: torch.Tensor, device: torch.device
) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=rate,
            betas=(config.momentum, 0.999),
            weight_decay=config.weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
    if config.optimizer == "muon":
        return Muon(parameters, rate, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=rate,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
        fused=True,
    )
