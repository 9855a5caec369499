"""Models: a ResNet-18 of torchvision's blocks, two small CNNs, torchvision's classifiers and anybody's by name."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock, ResNet

from fastmnist.config import MODELS, Stem
from fastmnist.errors import ConfigError

SMALLEST = 16  # pixels; below, ResNet-18's last stages see less than one pixel of image


def build_model(
    name: str = "resnet18",
    *,
    stem: Stem = "imagenet",
    num_classes: int = 10,
    in_channels: int = 1,
    image_size: tuple[int, int] = (28, 28),
) -> nn.Module:
    """A classifier with fresh weights: float images (B, in_channels, H, W) to logits (B, num_classes).

    >>> model = build_model("resnet18", stem="imagenet")
    >>> model(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    >>> count_parameters(model)
    11175370
    >>> build_model("small-cnn", num_classes=26, in_channels=3, image_size=(32, 32))(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 26])

    Args:
        name: a key of `config.MODELS`; "torchvision:<name>"; or "<package.module>:<function>", also of a module in the
            working directory. The function returns the model; it is called with those of `stem`, `num_classes`,
            `in_channels` and `image_size` that it has parameters for.
        stem: first layers of resnet18, see `resnet18`.
        image_size: (H, W), each at least 16.

    Raises:
        ConfigError: the name is unknown, or the model cannot take images of this size.
    """
    if min(image_size) < SMALLEST:
        raise ConfigError(f"images of {image_size[0]}x{image_size[1]} are too small; at least {SMALLEST}x{SMALLEST}")
    prefix, colon, rest = MODELS.get(name, name).partition(":")
    if prefix == "torchvision" and rest in torchvision.models.list_models(module=torchvision.models):
        return _tried(
            lambda: _from_torchvision(rest, num_classes, in_channels), name, num_classes, in_channels, image_size
        )
    if prefix == "torchvision" or not colon:
        raise ConfigError(
            f"--model {name}: there are {', '.join(MODELS)}, torchvision:<name> (torchvision.models.list_models() "
            "names them) and <package.module>:<function>"
        )
    function = _function(prefix, rest, name)
    offered = {"stem": stem, "num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    taken = inspect.signature(function).parameters
    arguments = {key: value for key, value in offered.items() if key in taken}
    if name in MODELS:
        built: nn.Module = function(**arguments)
        return built
    return _tried(lambda: function(**arguments), name, num_classes, in_channels, image_size)


def _function(module: str, name: str, model: str) -> Callable[..., nn.Module]:
    """`name` of `module`, which may also be in the working directory; raises ConfigError where there is none."""
    here = os.getcwd()
    sys.path.append(here)  # an installed command does not look there
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"--model {model}: {error}; name an importable <package.module>:<function>") from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise ConfigError(f"--model {model}: it is a {type(found).__name__}, not a function that returns a model")
    function: Callable[..., nn.Module] = found
    return function


def resnet18(stem: Stem = "imagenet", num_classes: int = 10, in_channels: int = 1) -> ResNet:
    """ResNet-18 (K. He et al., "Deep residual learning for image recognition", CVPR 2016) for small images.

    Args:
        stem: "imagenet", 7x7 stride 2 and max-pool, with torchvision's state dict; "stride2", 3x3 stride 2, or
            "cifar", 3x3 stride 1, both without max-pool.
    """
    model = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
    kernel, stride = {"imagenet": (7, 2), "stride2": (3, 2), "cifar": (3, 1)}[stem]
    model.conv1 = nn.Conv2d(in_channels, 64, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if stem != "imagenet":
        model.maxpool = nn.Identity()
    return model


def small_cnn(num_classes: int = 10, in_channels: int = 1) -> nn.Sequential:
    """Three 3x3 convolutions with batch normalisation, global pooling and a linear layer: a quick start."""
    layers: list[nn.Module] = []
    width_before = in_channels
    for width in (32, 64, 128):
        layers += [
            nn.Conv2d(width_before, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        ]
        width_before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width_before, num_classes))


class PatchConv2d(nn.Conv2d):
    """A convolution over patches that do not overlap, without padding, as one matrix product.

    On a CPU in bfloat16, forward and backward take half the time of oneDNN's convolution.

    Args:
        size: of a patch, (height, width), in pixels.
    """

    def __init__(self, in_channels: int, out_channels: int, size: tuple[int, int]) -> None:
        super().__init__(in_channels, out_channels, size, stride=size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, O, H // height, W // width), in channels_last; what fills no patch is left out."""
        batch, channels, height, width = images.shape
        high, wide = self.kernel_size
        rows, columns = height // high, width // wide
        pixels = images.permute(0, 2, 3, 1)[:, : rows * high, : columns * wide]
        patches = pixels.reshape(batch, rows, high, columns, wide, channels).transpose(2, 3)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (O, high wide C)
        values = functional.linear(patches.reshape(batch * rows * columns, -1), weight, self.bias)
        return values.view(batch, rows, columns, -1).permute(0, 3, 1, 2)


def patch_cnn(num_classes: int = 10, in_channels: int = 1, image_size: tuple[int, int] = (28, 28)) -> nn.Sequential:
    """A 5x5 convolution with stride 2, two over patches, and a linear layer.

    Made for a CPU: 16 channels of 12x12, then 2x2 patches to 32 of 6x6, then 128 features of the whole map. Batch
    normalisation for these features alone: on the larger maps it cost time and accuracy (docs/ablation.md).
    """
    height, width = ((pixels - 3) // 4 for pixels in image_size)  # after both strides
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 5, stride=2),
        nn.ReLU(inplace=True),
        PatchConv2d(16, 32, (2, 2)),
        nn.ReLU(inplace=True),
        PatchConv2d(32, 128, (height, width)),
        nn.Flatten(),
        nn.BatchNorm1d(128),
        nn.ReLU(inplace=True),
        nn.Linear(128, num_classes),
    )


def _from_torchvision(name: str, num_classes: int, in_channels: int) -> nn.Module:
    builder = torchvision.models.get_model_builder(name)
    options = {"num_classes": num_classes}
    if "init_weights" in inspect.signature(builder).parameters:
        options["init_weights"] = True
    model: nn.Module = builder(weights=None, **options)
    _replace_first_convolution(model, in_channels)
    return model


def _tried(
    build: Callable[[], nn.Module], name: str, num_classes: int, in_channels: int, image_size: tuple[int, int]
) -> nn.Module:
    """The model, once it has given logits for images of this size; raises ConfigError where it does not."""
    size = f"{image_size[0]}x{image_size[1]}"
    try:
        model = build()
        with torch.no_grad():
            logits = model.train()(torch.zeros(2, in_channels, *image_size))
    except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"--model {name} cannot take images of {size}: {reason}") from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, num_classes):
        raise ConfigError(f"--model {name} does not give one row of {num_classes} logits per image; name another")
    model.apply(_reset_statistics)
    return model


def _replace_first_convolution(model: nn.Module, in_channels: int) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.in_channels != in_channels:
                parent, _, leaf = name.rpartition(".")
                changed = nn.Conv2d(
                    in_channels,
                    module.out_channels,
                    module.kernel_size,  # type: ignore[arg-type]
                    module.stride,  # type: ignore[arg-type]
                    module.padding,  # type: ignore[arg-type]
                    bias=module.bias is not None,
                )
                nn.init.kaiming_normal_(changed.weight, mode="fan_out", nonlinearity="relu")
                setattr(model.get_submodule(parent), leaf, changed)
            return


def _reset_statistics(module: nn.Module) -> None:
    """Removes the trial with an empty image from the running statistics."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.reset_running_stats()


def stop_counting(model: nn.Module) -> None:
    """Stops batch normalisation from counting its batches, a kernel per layer; the count is saved as 0.

    Where `momentum` is None the count is used, and stays.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None:
            module.num_batches_tracked = None
            module.register_state_dict_post_hook(_add_count)
            module.register_load_state_dict_pre_hook(_leave_out_count)


def _add_count(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    state[f"{prefix}num_batches_tracked"] = torch.zeros((), dtype=torch.int64)


def _leave_out_count(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    state.pop(f"{prefix}num_batches_tracked", None)


def count_parameters(model: nn.Module) -> int:
    """Number of saved parameters: dead taps, which are not trained, count too."""
    saved = model.state_dict()
    return sum(saved[name].numel() for name, _ in model.named_parameters())
