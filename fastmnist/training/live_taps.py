"""Live taps: convolutions over maps of a few pixels as one matrix product, without the taps that only meet padding.

On images of 28x28 with the imagenet stem the last stage of a ResNet-18 sees maps of one pixel, where eight of the nine
weights of a 3x3 kernel only multiply zeros, and the stage before it maps of 2x2, where each output meets four of nine.
A tap that meets nothing but padding changes no output and has a gradient of zero: it needs neither arithmetic nor
optimizer state. The function stays the same, and so do the names and shapes of the saved weights.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional


def met_taps(size: int, kernel: int, stride: int, padding: int) -> list[list[int | None]]:
    """Kernel tap by which each output sees each input pixel, along one axis: (outputs, pixels), None for no tap.

    >>> met_taps(size=1, kernel=3, stride=1, padding=1)
    [[1]]
    >>> met_taps(size=2, kernel=3, stride=1, padding=1)
    [[1, 2], [0, 1]]
    >>> met_taps(size=3, kernel=3, stride=1, padding=1)
    [[1, 2, None], [0, 1, 2], [None, 0, 1]]
    """
    outputs = (size + 2 * padding - kernel) // stride + 1
    taps = [[pixel + padding - output * stride for pixel in range(size)] for output in range(outputs)]
    return [[tap if 0 <= tap < kernel else None for tap in row] for row in taps]


class LiveConv2d(nn.Module):
    """The convolution `whole` on maps of (H, W) = size, where every output sees every pixel.

    `weight` holds the live taps alone: (live taps, O, C). The state dict has the weights of `whole`, (O, C, kernel,
    kernel), with zeros for dead taps; loading such weights keeps the live ones.

    Raises:
        ValueError: some output does not see all of the map, or `whole` has groups, a dilation or a bias.
    """

    def __init__(self, whole: nn.Conv2d, size: tuple[int, int]) -> None:
        super().__init__()
        if not can_be_live(whole, size):
            raise ValueError(f"{whole} on maps of {size[0]}x{size[1]}: no matrix product of its live taps")
        rows, columns = (met_taps(size[axis], *_along(whole, axis)) for axis in range(2))
        width = whole.kernel_size[1]
        # (outputs, pixels): number of the tap, row by row, by which each output sees each pixel.
        table = [
            [cast(int, a) * width + cast(int, b) for a in row for b in column] for row in rows for column in columns
        ]
        self.live = sorted({tap for row in table for tap in row})
        self.table = [[self.live.index(tap) for tap in row] for row in table]
        self.size, self.outputs, self.whole_shape = size, (len(rows), len(columns)), whole.weight.shape
        self.weight = nn.Parameter(self._live_of(whole.weight.detach()))
        self.register_state_dict_post_hook(_make_whole)
        self.register_load_state_dict_pre_hook(_keep_live)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, O, outputs, outputs), in channels_last."""
        batch, channels, height, width = images.shape
        if (height, width) != self.size:
            raise ValueError(f"made for maps of {self.size[0]}x{self.size[1]}, not {height}x{width}")
        taps = self.weight.to(images.dtype).unbind()
        matrix = torch.cat([torch.cat([taps[tap] for tap in row], 1) for row in self.table])  # (outputs O, pixels C)
        rows = functional.linear(images.permute(0, 2, 3, 1).reshape(batch, height * width * channels), matrix)
        return rows.view(batch, *self.outputs, -1).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        taps, out, channels = self.weight.shape
        return (
            f"{channels}, {out}, live taps {taps} of {self.whole_shape[2] * self.whole_shape[3]}, maps of {self.size}"
        )

    def _live_of(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.flatten(2)[:, :, self.live].permute(2, 0, 1).contiguous()

    def whole_of(self, live: torch.Tensor) -> torch.Tensor:
        """(live taps, O, C) to (O, C, kernel, kernel), dead taps zero."""
        whole = live.new_zeros(self.whole_shape).flatten(2)
        whole[:, :, self.live] = live.permute(1, 2, 0)
        return whole.view(self.whole_shape)


def _make_whole(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    state[f"{prefix}weight"] = cast(LiveConv2d, module).whole_of(state[f"{prefix}weight"])


def _keep_live(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    live, key = cast(LiveConv2d, module), f"{prefix}weight"
    if key in state and state[key].shape == live.whole_shape:
        state[key] = live._live_of(state[key])


def _along(convolution: nn.Conv2d, axis: int) -> tuple[int, int, int]:
    """Kernel, stride and padding."""
    return convolution.kernel_size[axis], convolution.stride[axis], cast(int, convolution.padding[axis])


def is_plain(convolution: nn.Conv2d) -> bool:
    """Whether it has zero padding, and neither bias, groups nor dilation."""
    return (
        convolution.groups == 1
        and convolution.dilation == (1, 1)
        and convolution.bias is None
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
    )


def can_be_live(convolution: nn.Conv2d, size: tuple[int, int]) -> bool:
    """Whether the convolution is plain, and each output sees every pixel of a map of (H, W) = size."""
    return is_plain(convolution) and all(
        None not in row for axis in range(2) for row in met_taps(size[axis], *_along(convolution, axis))
    )


def use_live_taps(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Replaces, in place, every convolution whose outputs see all of its input, for images of (H, W, C).

    The model computes the same function, and its state dict keeps names and shapes; dead taps become zero.

    >>> model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.Flatten())
    >>> use_live_taps(model, (1, 1, 1)), model[0].weight.shape, model.state_dict()["0.weight"].shape
    (1, torch.Size([1, 8, 1]), torch.Size([8, 1, 3, 3]))

    Returns:
        The number of replaced convolutions; 0 where maps stay large.
    """
    sizes: dict[str, tuple[int, int]] = {}

    def note_size(name: str) -> Any:
        return lambda module, inputs: sizes.__setitem__(name, tuple(inputs[0].shape[2:]))

    handles = [
        module.register_forward_pre_hook(note_size(name))
        for name, module in model.named_modules()
        if type(module) is nn.Conv2d and module.kernel_size != (1, 1)
    ]
    was_training = model.training
    try:
        weight = next(model.parameters())
        height, width, channels = image_shape
        with torch.no_grad():
            model.eval()(torch.zeros(1, channels, height, width, device=weight.device, dtype=weight.dtype))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    found = {name: size for name, size in sizes.items() if can_be_live(_convolution(model, name), size)}
    for name, size in found.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LiveConv2d(_convolution(model, name), size))
    return len(found)


def _convolution(model: nn.Module, name: str) -> nn.Conv2d:
    return cast(nn.Conv2d, model.get_submodule(name))
