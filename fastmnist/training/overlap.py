"""Weight gradients of convolutions on a second CUDA stream, beside the rest of the backward pass.

Small batches fill only a part of a GPU. A weight's gradient is computed while the pass continues with the gradient of
the layer's input; `join` waits for all of them before the optimizer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastmnist.training.live_taps import is_plain

_streams: dict[torch.device, torch.cuda.Stream] = {}
_in_use: list[tuple[torch.Tensor, torch.Tensor]] = []  # read by the other stream: kept until `join`


class OverlappedConv2d(nn.Conv2d):
    """A convolution whose weight gradient is complete only after `join`; no bias, groups or dilation."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _Convolution.apply(images, self.weight, self.stride, self.padding)
        return found


def overlap(model: nn.Module) -> int:
    """Turns every plain convolution of `model` into an OverlappedConv2d, in place; returns how many."""
    count = 0
    for module in model.modules():
        if type(module) is nn.Conv2d and is_plain(module):
            module.__class__ = OverlappedConv2d
            count += 1
    return count


def join() -> None:
    """Makes the current stream wait for all weight gradients; to be called after each backward pass."""
    for device in {grad.device for grad, _ in _in_use}:
        torch.cuda.current_stream(device).wait_stream(_streams[device])
    _in_use.clear()


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: torch.Tensor, weight: torch.Tensor, stride: tuple[int, int], padding: tuple[int, int]
    ) -> torch.Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = list(stride), list(padding)
        return torch.conv2d(images, weight, None, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None, None]:
        images, weight = ctx.saved_tensors
        of_weight = weight_gradient(grad, images, weight, ctx.stride, ctx.padding)
        of_images = None
        if ctx.needs_input_grad[0]:
            of_images, _ = _gradients(grad, images, weight, ctx.stride, ctx.padding, [True, False, False])
        return of_images, of_weight, None, None


@torch.library.custom_op("fastmnist::weight_gradient", mutates_args=())
def weight_gradient(
    grad: torch.Tensor, images: torch.Tensor, weight: torch.Tensor, stride: list[int], padding: list[int]
) -> torch.Tensor:
    """The weight gradient of a convolution, as a custom operator: torch.compile does not look into it."""
    if not grad.is_cuda:
        return _of_weight(grad, images, weight, stride, padding)
    stream = _streams.get(grad.device)
    if stream is None:
        stream = _streams[grad.device] = torch.cuda.Stream(grad.device)
    stream.wait_stream(torch.cuda.current_stream(grad.device))
    with torch.cuda.stream(stream):
        found = _of_weight(grad, images, weight, stride, padding)
    _in_use.append((grad.detach(), images.detach()))
    return found


@weight_gradient.register_fake
def _(
    grad: torch.Tensor, images: torch.Tensor, weight: torch.Tensor, stride: list[int], padding: list[int]
) -> torch.Tensor:
    return torch.empty_like(weight)


def _of_weight(
    grad: torch.Tensor, images: torch.Tensor, weight: torch.Tensor, stride: list[int], padding: list[int]
) -> torch.Tensor:
    """In the layout of the weight: autograd would copy any other, on the wrong stream and too early."""
    _, found = _gradients(grad, images, weight, stride, padding, [False, True, False])
    return found if found.stride() == weight.stride() else torch.empty_like(weight).copy_(found)


def _gradients(
    grad: torch.Tensor,
    images: torch.Tensor,
    weight: torch.Tensor,
    stride: list[int],
    padding: list[int],
    needed: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    found = torch.ops.aten.convolution_backward(
        grad, images, weight, None, stride, padding, [1, 1], False, [0, 0], 1, needed
    )
    return found[0], found[1]
