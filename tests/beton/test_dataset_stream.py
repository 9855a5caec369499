"""write_beton from map-style datasets, against the items themselves and against torchvision's Resize."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset, Subset, TensorDataset
from torchvision.transforms import InterpolationMode, ToTensor
from torchvision.transforms.functional import resize

from fastmnist.beton.reader import Beton
from fastmnist.beton.writer import write_beton
from fastmnist.errors import ConfigError, DataError
from tests.conftest import skip_or_fail

COLOURS = np.random.default_rng(0).integers(0, 256, (5, 12, 9, 3), np.uint8)
LABELS = [2, 0, 1, 1, 0]


class Items:
    """A dataset of given items; counts how often each is read."""

    def __init__(self, *items, **attributes):
        self.items, self.read = items, [0] * len(items)
        vars(self).update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.read[index] += 1
        if isinstance(self.items[index], BaseException):
            raise self.items[index]
        return self.items[index]


def picture(*size, mode="RGB", seed=0):
    """A picture of `mode`, which has 8 bits per value."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def written(path, dataset, **options):
    with Beton(write_beton(path / "a.beton", dataset, **options), verify="full") as file:
        return file.images(np.arange(len(file))), file.labels.tolist(), file.class_names


KINDS = {
    "PIL": lambda image: Image.fromarray(image),
    "array": lambda image: image,
    "tensor": lambda image: torch.from_numpy(image).permute(2, 0, 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset_is_written_item_by_item_in_one_pass(tmp_path, kind):
    pairs = [(KINDS[kind](image), label) for image, label in zip(COLOURS, LABELS, strict=True)]
    dataset = Items(*pairs, classes=["cat", "cow", "dog"])
    images, labels, names = written(tmp_path, dataset, page_size=512)  # one image on a page
    np.testing.assert_array_equal(images, COLOURS)
    assert (labels, names) == (LABELS, ("cat", "cow", "dog"))
    assert dataset.read == [1] * 5
    images, labels, _ = written(tmp_path, Subset(dataset, [3, 1]), class_names="abc")
    np.testing.assert_array_equal(images, COLOURS[[3, 1]])
    assert labels == [LABELS[3], LABELS[1]]


def test_tensors_without_channels_and_labels_of_any_integer_type(tmp_path):
    dataset = TensorDataset(torch.from_numpy(COLOURS[..., 0]), torch.tensor(LABELS, dtype=torch.int16))
    images, labels, _ = written(tmp_path, dataset)
    np.testing.assert_array_equal(images[..., 0], COLOURS[..., 0])
    assert labels == LABELS
    assert written(tmp_path, Items((COLOURS[0], np.uint8(3)), (COLOURS[1], 0)))[1] == [3, 0]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_resized_picture_is_torchvisions(tmp_path, mode):
    pictures = [picture(40, 31, mode=mode), picture(12, 60, mode=mode, seed=1), picture(16, 20, mode=mode, seed=2)]
    expected = [np.asarray(resize(each, (16, 20), InterpolationMode.BILINEAR)) for each in pictures]
    for items in (pictures, [np.asarray(each) for each in pictures]):
        images, _, _ = written(tmp_path, Items(*[(item, 0) for item in items]), resize=(16, 20))
        np.testing.assert_array_equal(images.squeeze(), expected)


def test_grey_pictures_among_coloured_ones_become_colour(tmp_path):
    grey, palette = picture(4, 5, mode="L", seed=1), picture(4, 5, mode="P", seed=2)
    images, _, _ = written(tmp_path, Items((picture(4, 5), 0), (grey, 1), (palette, 2)))
    np.testing.assert_array_equal(images[1], np.asarray(grey)[..., None].repeat(3, 2))
    np.testing.assert_array_equal(images[2], np.asarray(palette.convert("RGB")))


def beside(*items, **attributes):
    """The items behind a good one of 12 x 9 in colour."""
    return Items((COLOURS[0], 0), *items, **attributes)


REFUSED = {
    "another size": (beside((COLOURS[1, :11], 0)), r"item 1 is 11 x 9 x 3.*12 x 9 x 3; resize=\(H, W\)"),
    "another number of channels": (beside((COLOURS[1, ..., 0], 0)), "item 1 is 12 x 9,"),
    "float tensors": (beside((ToTensor()(COLOURS[1]), 0)), "item 1 is float32.*leave ToTensor"),
    "colour after grey": (Items((picture(4, 5, mode="L"), 0), (picture(4, 5), 0)), "item 1 is in colour.*RGB"),
    "16 bits": (Items((Image.new("I;16", (5, 4)), 0)), "item 0 .*8 bits.*I;16"),
    "no image": (beside(("a.png", 0)), "item 1 has no image"),
    "no pair": (beside(COLOURS[1]), "item 1 is ndarray"),
    "three": (beside((COLOURS[1], 0, 0)), "item 1 is tuple"),
    "broken": (beside(OSError("image file is truncated")), "item 1 cannot be read.*image file is truncated"),
    "broken, with its path": (
        beside(OSError("cut"), samples=[("a.png", 0), ("b.png", 0)]),
        r"item 1 \(b\.png\) cannot be read",
    ),
    "a float label": (beside((COLOURS[1], 1.5)), "item 1 has a label of float"),
    "a text": (beside((COLOURS[1], "cat")), "item 1 has a label of str"),
    "a label without a class": (beside((COLOURS[1], 0), (COLOURS[2], 2), classes="ab"), "label 2 of sample 2.*0 to 1"),
    "a negative label": (beside((COLOURS[1], -1)), "label -1 of sample 1"),
    "other columns": (Items({"img": COLOURS[0], "label": 0}), "columns img, label.*rename"),
    "nothing": (Items(), "empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_named_and_leaves_no_file(tmp_path, case):
    dataset, message = REFUSED[case]
    with pytest.raises(DataError, match=rf"a\.beton: .*{message}|a\.beton: {message}"):
        write_beton(tmp_path / "a.beton", dataset)
    assert not list(tmp_path.iterdir())


def test_what_is_no_map_style_dataset_is_refused(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    for images in (Stream(), {"image": COLOURS}, "photos"):
        with pytest.raises(DataError, match="give an array, a dataset"):
            write_beton(tmp_path / "a.beton", images)
    with pytest.raises(ConfigError, match="resize"):
        write_beton(tmp_path / "a.beton", COLOURS, LABELS, resize=(8, 8))
    for size in (8, (8,), (0, 8), (8, 2.5), (8, 2**16)):
        with pytest.raises(ConfigError, match="resize"):
            write_beton(tmp_path / "a.beton", beside(), resize=size)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_hugging_faces_rows_bring_images_labels_and_names(tmp_path):
    try:
        import datasets
    except ImportError:
        skip_or_fail("peers", "datasets is not installed; pip install '.[peers]'")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [Image.fromarray(image) for image in COLOURS], "label": [1, 0, 0, 1, 1]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    for each in (dataset, dataset.with_format("torch")):
        images, labels, names = written(tmp_path, each)
        np.testing.assert_array_equal(images, COLOURS)
        assert (labels, names) == ([1, 0, 0, 1, 1], ("cat", "dog"))
    with pytest.raises(DataError, match="picture, label"):
        write_beton(tmp_path / "b.beton", dataset.rename_column("image", "picture"))
