"""Live taps against torch's own convolution: outputs, gradients, what is saved, and a whole training run."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fastmnist.training.live_taps import LiveConv2d, can_be_live, met_taps, use_live_taps
from fastmnist.training.model import count_parameters, resnet18

MNIST = (28, 28, 1)


@given(
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
@settings(deadline=None)
def test_the_same_outputs_and_gradients_as_the_convolution(size, kernel, stride, padding):
    if any(size[i] + 2 * padding[i] < kernel[i] for i in range(2)):
        return  # torch has no output either
    torch.manual_seed(0)
    whole = nn.Conv2d(3, 5, kernel, stride, padding, bias=False, dtype=torch.float64)
    if not can_be_live(whole, size):
        with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}"):
            LiveConv2d(whole, size)
        return
    live = LiveConv2d(whole, size)
    images = torch.randn(4, 3, *size, dtype=torch.float64, requires_grad=True)
    again = images.detach().clone().requires_grad_()
    expected, found = whole(images), live(again)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    torch.testing.assert_close(again.grad, images.grad)
    torch.testing.assert_close(live.whole_of(live.weight.grad), whole.weight.grad)  # dead taps have a gradient of zero


@pytest.mark.parametrize(("size", "live"), [(1, 1), (2, 9), (3, None)])
def test_which_maps_are_small_enough(size, live):
    whole = nn.Conv2d(2, 2, 3, padding=1, bias=False)
    assert can_be_live(whole, (size, size)) == (live is not None)
    if live:
        assert LiveConv2d(whole, (size, size)).weight.shape == (live, 2, 2)


def test_taps_by_laying_the_kernel_on_the_map():
    """functional.unfold lays it too: pixels by number, padding as 0."""
    for size, kernel, stride, padding in [(1, 3, 1, 1), (2, 3, 2, 1), (4, 3, 2, 1), (5, 7, 2, 3)]:
        line = torch.arange(1.0, size + 1).view(1, 1, 1, size)
        columns = functional.unfold(line, (1, kernel), padding=(0, padding), stride=(1, stride))[0]  # (taps, outputs)
        expected = [
            [next((tap for tap in range(kernel) if columns[tap, out] == pixel + 1), None) for pixel in range(size)]
            for out in range(columns.shape[1])
        ]
        assert met_taps(size, kernel, stride, padding) == expected


@pytest.mark.parametrize("plain", [{"groups": 2}, {"dilation": 2, "padding": 2}, {"bias": True}, {"padding": "same"}])
def test_convolutions_that_are_left_as_they_are(plain):
    settings_of = {"padding": 1, "bias": False} | plain
    assert not can_be_live(nn.Conv2d(4, 4, 3, **settings_of), (1, 1))


@pytest.mark.parametrize(("stem", "replaced"), [("imagenet", 7), ("stride2", 3), ("cifar", 0)])
def test_a_resnet_computes_what_it_did(stem, replaced):
    torch.manual_seed(0)
    whole = resnet18(stem).double()
    live = copy.deepcopy(whole)
    parameters = count_parameters(whole)
    assert use_live_taps(live, MNIST) == replaced
    assert count_parameters(live) == parameters
    images = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    for train in (True, False):
        torch.testing.assert_close(live.train(train)(images), whole.train(train)(images))


def test_what_is_saved_is_a_standard_resnet(tmp_path):
    """Names, shapes and function; from it either form goes on, and saving what was loaded gives the same again."""
    torch.manual_seed(0)
    live = resnet18()
    use_live_taps(live, MNIST)
    saved = live.state_dict()
    standard = resnet18()
    assert {name: value.shape for name, value in saved.items()} == {
        name: value.shape for name, value in standard.state_dict().items()
    }
    standard.load_state_dict(saved)
    images = torch.randn(4, 1, 28, 28)
    torch.testing.assert_close(standard.eval()(images), live.eval()(images), atol=1e-5, rtol=1e-5)
    other = resnet18()
    use_live_taps(other, MNIST)
    other.load_state_dict(standard.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), saved.values(), strict=True))


def test_trained_alike_to_the_last_weight():
    """SGD with momentum and decay, begun from the same weights: dead taps stay zero in the whole network too."""
    torch.manual_seed(0)
    live = resnet18().double()
    use_live_taps(live, MNIST)
    whole = resnet18().double()
    whole.load_state_dict(live.state_dict())
    images, labels = torch.randn(8, 1, 28, 28, dtype=torch.float64), torch.arange(8)
    for model in (live, whole):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
        for _ in range(3):
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    expected = whole.state_dict()
    for name, value in live.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_other_maps_are_refused():
    live = LiveConv2d(nn.Conv2d(2, 2, 3, padding=1, bias=False), (2, 2))
    with pytest.raises(ValueError, match=r"2x2.*3x3"):
        live(torch.zeros(1, 2, 3, 3))


def test_statistics_are_not_touched():
    model = resnet18()
    use_live_taps(model, MNIST)
    assert model.training
    assert int(model.bn1.num_batches_tracked) == 0
