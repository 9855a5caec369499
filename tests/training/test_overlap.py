"""Convolutions with weight gradients on a second stream, against torch's own."""

import copy

import pytest
import torch
from torch import nn

from fastmnist.training.model import build_model
from fastmnist.training.overlap import OverlappedConv2d, join, overlap

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def gradients(model: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(images).square().sum().backward()
    join()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_the_same_outputs_and_gradients(device: str, stem: str) -> None:
    torch.manual_seed(0)
    # In float64, where the order of additions does not show.
    plain = build_model(stem=stem).to(device=device, dtype=torch.float64, memory_format=torch.channels_last)
    ours = copy.deepcopy(plain)
    assert overlap(ours) == 20
    images = torch.randn(8, 1, 28, 28, device=device, dtype=torch.float64)
    images = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(images), plain(images))
    for _ in range(3):
        expected, found = gradients(plain, images), gradients(ours, images)
        assert len(found) == len(expected) == 62
        for a, b, parameter in zip(found, expected, ours.parameters(), strict=True):
            torch.testing.assert_close(a, b)
            assert a.stride() == parameter.stride()
    assert ours.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, bias=False, groups=2),
        nn.Conv2d(4, 4, 3, bias=False, dilation=2),
        nn.Conv2d(4, 4, 3, bias=False, padding="same"),
        nn.Conv2d(4, 4, 3, bias=False, padding_mode="reflect"),
    ],
)
def test_what_is_not_plain_stays(layer: nn.Conv2d) -> None:
    assert overlap(nn.Sequential(layer)) == 0
    assert not isinstance(layer, OverlappedConv2d)
