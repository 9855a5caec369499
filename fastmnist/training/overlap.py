"""The gradients of convolutions' weights on a second CUDA stream: nothing else in a backward pass waits for them.

Small batches fill a part of a GPU. So a weight's gradient is computed while the pass goes on with the gradient of the
layer's input; `join` brings both together before the optimizer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_streams: dict[torch.device, torch.cuda.Stream] = {}
_in_use: list[tuple[torch.Tensor, torch.Tensor]] = []  # what the other stream reads: not to be written to meanwhile


class OverlappedConv2d(nn.Conv2d):
    """A convolution whose weight has its gradient only after `join`; without bias, groups or dilation."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _Convolution.apply(images, self.weight, self.stride, self.padding)
        return found


def overlap(model: nn.Module) -> int:
    """Makes every convolution of `model` that can be an OverlappedConv2d one, in place: how many there are."""
    count = 0
    for module in model.modules():
        if type(module) is nn.Conv2d and _is_plain(module):
            module.__class__ = OverlappedConv2d
            count += 1
    return count


def join() -> None:
    """From here on the current stream has the gradients of all weights. To be called after each backward pass."""
    for device in {grad.device for grad, _ in _in_use}:
        torch.cuda.current_stream(device).wait_stream(_streams[device])
    _in_use.clear()


def _is_plain(module: nn.Conv2d) -> bool:
    rest = module.bias is None and module.groups == 1 and module.dilation == (1, 1)
    return rest and module.padding_mode == "zeros" and not isinstance(module.padding, str)


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
    """Of a convolution: an operator of its own, so that torch.compile leaves the stream to it."""
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
    """Laid out as the weight: autograd would copy any other, before it is there."""
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
