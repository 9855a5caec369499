"""The compiled file in both directions between fastmnist and FFCV itself."""

from __future__ import annotations

import os
import warnings

import numpy as np
import pytest

from fastmnist.beton.editing import append_beton
from fastmnist.beton.reader import Beton
from fastmnist.beton.writer import PAGE_SIZE
from fastmnist.errors import DataError
from fastmnist.loader.loader import Loader

# FFCV 1.0 is of 2023: what it says at every import and every fork is not about us.
pytestmark = [pytest.mark.ffcv, pytest.mark.filterwarnings("ignore")]

SHAPES = [(28, 28), (9, 7), (5, 4, 3)]


@pytest.fixture(scope="module")
def ours(scratch, write_small_beton):
    """Our files: (path, images, labels) by shape. The first is of more than two pages, the last one not full.

    The last one was appended to.
    """
    made = {}
    for shape in SHAPES:
        path = scratch() / "ours.beton"
        made[shape] = (path, *write_small_beton(path, 2 * PAGE_SIZE // 784 + 30 if shape == (28, 28) else 333, shape))
    path, images, labels = made[SHAPES[-1]]
    append_beton(path, images[:100], labels[:100])
    made[SHAPES[-1]] = path, np.concatenate([images, images[:100]]), np.concatenate([labels, labels[:100]])
    return made


@pytest.fixture(scope="module")
def write_with_ffcv(scratch):
    """(samples, fields, num_workers) -> path of the file that FFCV's writer makes of them."""

    def write(samples, fields, num_workers: int = 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from ffcv.writer import DatasetWriter

            path = scratch() / "ffcv.beton"
            DatasetWriter(str(path), fields, page_size=PAGE_SIZE, num_workers=num_workers).from_indexed_dataset(
                samples, chunksize=50
            )
        return path

    return write


@pytest.fixture(scope="module")
def theirs(write_with_ffcv, random_samples):
    """FFCV's files of 500 samples: (path, images, labels) by (first field, writer processes)."""
    from ffcv.fields import IntField, NDArrayField

    images, labels = random_samples(500)
    made = {}
    for first, num_workers in (("image", 1), ("image", 2), ("label", 1), ("label", 2)):
        fields = {"image": NDArrayField(np.dtype("u1"), (28, 28)), "label": IntField()}
        samples = list(zip(images, labels.tolist(), strict=True))
        if first == "label":
            fields = dict(reversed(fields.items()))
            samples = [(label, image) for image, label in samples]
        made[first, num_workers] = write_with_ffcv(samples, fields, num_workers), images, labels
    return made


def all_batches(loader) -> tuple[np.ndarray, np.ndarray]:
    """An epoch's images and labels as two arrays; copies, for FFCV uses its buffers again."""
    images, labels = zip(*((np.array(images), np.array(labels)) for images, labels in loader), strict=True)
    return np.concatenate(images), np.concatenate(labels)


@pytest.mark.parametrize("shape", SHAPES)
def test_ffcvs_reader_reads_header_fields_metadata_and_allocation_table(ours, shape):
    from ffcv.fields import IntField, NDArrayField
    from ffcv.reader import Reader

    path, images, labels = ours[shape]
    reader, file = Reader(str(path)), Beton(path)
    assert (reader.num_samples, reader.page_size, reader.num_fields) == (len(images), PAGE_SIZE, 2)
    assert reader.field_names == ["image", "label"]
    image_field, label_field = reader.handlers.values()
    assert type(image_field) is NDArrayField
    assert type(label_field) is IntField
    assert (image_field.dtype, tuple(image_field.shape)) == (np.dtype("u1"), shape)
    np.testing.assert_array_equal(reader.metadata["f0"], file.offsets)
    np.testing.assert_array_equal(reader.metadata["f1"], labels)
    np.testing.assert_array_equal(reader.alloc_table["ptr"], file.offsets)
    np.testing.assert_array_equal(reader.alloc_table["sample_id"], np.arange(len(images)))
    assert set(reader.alloc_table["size"].tolist()) == {images[0].size}


@pytest.mark.parametrize("os_cache", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_ffcvs_loader_gives_our_images_and_labels(ours, shape, os_cache):
    from ffcv.fields.decoders import IntDecoder, NDArrayDecoder
    from ffcv.loader import Loader as FfcvLoader
    from ffcv.loader import OrderOption

    path, images, labels = ours[shape]
    loader = FfcvLoader(
        str(path),
        batch_size=100,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        os_cache=os_cache,
        drop_last=False,
        pipelines={"image": [NDArrayDecoder()], "label": [IntDecoder()]},
    )
    read_images, read_labels = all_batches(loader)
    np.testing.assert_array_equal(read_images, images)
    np.testing.assert_array_equal(read_labels, labels[:, None])


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("first", ["image", "label"])
def test_ffcvs_file_is_read_by_beton(theirs, first, num_workers):
    path, images, labels = theirs[first, num_workers]
    with Beton(path, verify="full") as file:
        np.testing.assert_array_equal(file.images(np.arange(len(file)))[..., 0], images)
        np.testing.assert_array_equal(file.labels, labels)
        assert file.integrity is None
        assert (file.image_field, file.label_field) == ("image", "label")
        assert file.class_names == tuple("0123456789")
        mean, std = file.moments
        np.testing.assert_allclose([*mean, *std], [(images / 255).mean(), (images / 255).std()], rtol=1e-9)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("first", ["image", "label"])
def test_ffcvs_file_is_loaded_by_our_loader(theirs, first, num_workers):
    path, images, labels = theirs[first, num_workers]
    with Loader(path, 64, shuffle=False, device="cpu") as loader:
        read_images, read_labels = all_batches(loader)
    np.testing.assert_array_equal(read_images[:, 0], images)
    np.testing.assert_array_equal(read_labels, labels)


def test_a_file_of_three_channels_and_other_field_names_is_read(write_with_ffcv, random_samples):
    from ffcv.fields import IntField, NDArrayField

    images, labels = random_samples(40, (6, 5, 3))
    fields = {"picture": NDArrayField(np.dtype("u1"), (6, 5, 3)), "class": IntField()}
    file = Beton(write_with_ffcv(list(zip(images, labels.tolist(), strict=True)), fields), verify="full")
    np.testing.assert_array_equal(file.images(np.arange(40)), images)
    assert (file.image_field, file.label_field) == ("picture", "class")


def test_ffcvs_file_can_be_appended_to(theirs, scratch):
    path, images, labels = theirs["label", 1]
    copy = scratch() / "copy.beton"
    copy.write_bytes(path.read_bytes())
    append_beton(copy, images[:3], labels[:3])
    with Beton(copy, verify="full") as file:
        np.testing.assert_array_equal(file.images(np.arange(503))[..., 0], np.concatenate([images, images[:3]]))
        np.testing.assert_array_equal(file.labels, np.concatenate([labels, labels[:3]]))


def test_verify_content_says_that_there_are_no_checksums(theirs):
    assert "no checksums" in Beton(theirs["image", 1][0]).verify_content()


def other_fields():
    from ffcv.fields import FloatField, IntField, NDArrayField, RGBImageField

    image = np.zeros((8, 8, 3), np.uint8)
    images = NDArrayField(np.dtype("u1"), image.shape)
    return {
        "float label": ({"image": images, "label": FloatField()}, (image, 0.5), "NDArrayField, FloatField"),
        "encoded image": ({"image": RGBImageField(), "label": IntField()}, (image, 1), "RGBImageField, IntField"),
        "no label": ({"image": images}, (image,), "holds NDArrayField;"),
        "two labels": ({"image": images, "a": IntField(), "b": IntField()}, (image, 1, 2), "IntField, IntField"),
        "float image": (
            {"image": NDArrayField(np.dtype("f4"), (8, 8)), "label": IntField()},
            (np.zeros((8, 8), np.float32), 1),
            r"\(8, 8\) of <f4",
        ),
        "a vector": (
            {"image": NDArrayField(np.dtype("u1"), (8,)), "label": IntField()},
            (np.zeros(8, np.uint8), 1),
            r"\(8,\) of \|u1",
        ),
    }


@pytest.mark.parametrize("case", ["float label", "encoded image", "no label", "two labels", "float image", "a vector"])
def test_a_file_with_other_fields_is_refused_naming_them(write_with_ffcv, case):
    fields, sample, said = other_fields()[case]
    path = write_with_ffcv([sample] * 3, fields)
    with pytest.raises(DataError, match=said) as error:
        Beton(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("first", ["image", "label"])
def test_ffcvs_file_cut_short_is_refused(theirs, scratch, first):
    content = theirs[first, 1][0].read_bytes()
    path = scratch() / "cut.beton"
    path.write_bytes(content)
    for length in [*range(len(content) - 1, 0, -len(content) // 97), *range(30, -1, -1), len(content) - 1]:
        path.write_bytes(content[:length]) if length > path.stat().st_size else os.truncate(path, length)
        with pytest.raises(DataError, match=r"cut\.beton"):
            Beton(path)


@pytest.mark.parametrize("first", ["image", "label"])
def test_ffcvs_file_with_an_address_changed_is_refused(theirs, scratch, first):
    """No checksum tells, but the allocation table and the metadata no longer agree."""
    content = bytearray(theirs[first, 1][0].read_bytes())
    at = 24 + 2 * 1041 + 16 * 7 + (0 if first == "image" else 8)
    content[at] ^= 1
    path = scratch() / "changed.beton"
    path.write_bytes(content)
    Beton(path)
    with pytest.raises(DataError, match="different places"):
        Beton(path, verify="full")
