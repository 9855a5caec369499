"""The models, against torchvision's."""

import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

from fastmnist.config import MODELS
from fastmnist.errors import ConfigError
from fastmnist.training.model import PatchConv2d, build_model, count_parameters, resnet18

STEMS = ("imagenet", "stride2", "cifar")


def reference(in_channels: int, num_classes: int) -> nn.Module:
    """torchvision's own resnet18 with a stem for `in_channels`."""
    model = torchvision.models.resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
    return model


def test_imagenet_stem_has_the_published_number_of_parameters() -> None:
    assert count_parameters(resnet18("imagenet")) == 11_175_370


@pytest.mark.parametrize(("in_channels", "num_classes", "size"), [(1, 10, 28), (3, 47, 32), (1, 62, 17)])
def test_weights_load_into_torchvision_and_give_the_same_logits(in_channels: int, num_classes: int, size: int) -> None:
    torch.manual_seed(1)
    ours = resnet18("imagenet", num_classes, in_channels)
    images = torch.randn(8, in_channels, size, size)
    ours.train()(images)  # running statistics that are not those of a fresh network
    theirs = reference(in_channels, num_classes)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert torch.equal(ours.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("size", [(16, 16), (28, 28), (33, 20)])
def test_any_size_from_16_gives_finite_logits(stem, size: tuple[int, int]) -> None:
    logits = build_model("resnet18", stem=stem, num_classes=7, image_size=size)(torch.randn(4, 1, *size))
    assert logits.shape == (4, 7)
    assert torch.isfinite(logits).all()


def test_stems_see_what_they_are_named_for() -> None:
    first = {stem: resnet18(stem) for stem in STEMS}
    image = torch.randn(1, 1, 28, 28)
    seen = {stem: tuple(m.maxpool(m.conv1(image)).shape[2:]) for stem, m in first.items()}
    assert seen == {"imagenet": (7, 7), "stride2": (14, 14), "cifar": (28, 28)}


@pytest.mark.parametrize(
    "name", ["small-cnn", "patch-cnn", "torchvision:squeezenet1_1", "torchvision:shufflenet_v2_x0_5"]
)
def test_other_models_take_grey_images(name: str) -> None:
    model = build_model(name, num_classes=10, image_size=(28, 28)).train()
    logits = model(torch.randn(4, 1, 28, 28))
    assert logits.shape == (4, 10)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


MINE = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes, in_channels, image_size):
        height, width = image_size
        linear = nn.Linear(in_channels * height * width, num_classes)
        super().__init__(nn.Flatten(), linear, nn.BatchNorm1d(num_classes))

def plain(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))

def wrong():
    return nn.Flatten()
"""


def test_anybodys_model_by_its_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"mine_{tmp_path.name}".replace("-", "_")  # a module of this test alone
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])  # as of an installed command
    before = list(sys.path)
    model = build_model(f"{name}:Net", num_classes=7, in_channels=3, image_size=(20, 18))
    assert not model[2].running_mean.any()  # the trial left no trace
    assert model(torch.randn(4, 3, 20, 18)).shape == (4, 7)
    assert build_model(f"{name}:plain", num_classes=5)(torch.randn(4, 1, 28, 28)).shape == (4, 5)
    with pytest.raises(ConfigError, match=r"wrong .*10 logits"):
        build_model(f"{name}:wrong")
    assert sys.path == before


@pytest.mark.parametrize("size", [(16, 16), (28, 28), (33, 20)])
def test_patch_cnn_takes_any_size_from_16(size: tuple[int, int]) -> None:
    logits = build_model("patch-cnn", num_classes=7, in_channels=3, image_size=size)(torch.randn(4, 3, *size))
    assert logits.shape == (4, 7)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(2, 3), (1, 1), (5, 7)])
def test_a_convolution_over_patches_is_torchs(size: tuple[int, int], layout: torch.memory_format) -> None:
    torch.manual_seed(2)
    ours = PatchConv2d(3, 4, size).to(memory_format=layout)
    images = torch.randn(5, 3, 11, 13).contiguous(memory_format=layout).requires_grad_()
    found, expected = ours(images), functional.conv2d(images, ours.weight, ours.bias, stride=size)
    torch.testing.assert_close(found, expected)
    wanted, seen = torch.randn_like(expected), (images, *ours.parameters())
    for one, other in zip(*(torch.autograd.grad(out, seen, wanted) for out in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_trying_a_model_leaves_its_statistics_fresh() -> None:
    model = build_model("torchvision:shufflenet_v2_x0_5")
    means = [m.running_mean for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert means
    assert all(not mean.any() for mean in means if mean is not None)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("resnet19", (28, 28), rf"{', '.join(MODELS)}, torchvision:<name> .*:<function>"),
        ("nowhere:net", (28, 28), "nowhere"),
        ("math:nothing", (28, 28), "nothing"),
        ("math:pi", (28, 28), "float, not a function"),
        ("os:getcwd", (28, 28), "cannot take images"),
        ("torchvision:nonsense", (28, 28), "torchvision:nonsense"),
        ("torchvision:vgg11", (28, 28), "28x28"),
        ("torchvision:vit_b_16", (28, 28), "28x28"),
        ("resnet18", (15, 28), "16x16"),
    ],
)
def test_what_cannot_work_is_named(name: str, size: tuple[int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(name, image_size=size)
