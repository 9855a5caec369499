"""Weights in sixteen bits, which compute, beside those in float32, which learn."""

from __future__ import annotations

import torch
from torch import nn

from fastmnist.training.live_taps import LiveConv2d

LOWERED = (nn.Conv2d, nn.Linear, LiveConv2d)  # what autocast computes in its dtype; normalisation stays in float32


class LowWeights:
    """Copies in `dtype` of a model's weights, for its forward and backward pass; the model's own are what is trained.

    So no step casts them one by one, as autocast does. P. Micikevicius et al., "Mixed precision training", ICLR 2018.

    Attributes:
        tensors: by parameter name, as torch.func.functional_call takes them.
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
        """Moves the gradients of the copies to the model's weights; those that have none stay without."""
        all_of_them = zip(self.tensors.values(), self._whole.values(), self._grads, strict=True)
        used = [(low, whole, grad, low.grad) for low, whole, grad in all_of_them if low.grad is not None]
        torch._foreach_copy_([grad for _, _, grad, _ in used], [found for _, _, _, found in used])
        for low, whole, grad, _ in used:
            low.grad, whole.grad = None, grad

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the model's weights again."""
        torch._foreach_copy_(list(self.tensors.values()), list(self._whole.values()))
