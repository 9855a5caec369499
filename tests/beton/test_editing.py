"""Appending and relabelling, against files written at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmnist.beton.editing import append_beton, relabel_beton
from fastmnist.beton.reader import Beton
from fastmnist.beton.writer import write_beton
from fastmnist.errors import DataError

TEXTS = {"class_names": "abcde", "dataset": "pets", "split": "train"}


def same_as_at_once(path, images, labels, **texts) -> bool:
    """Whether the file has the bytes that write_beton gives these samples, but for the text `source`."""
    with Beton(path, verify="full") as file:
        source = file.integrity.source
        options = TEXTS | {"source": source, "page_size": file.page_size} | texts
    other = write_beton(path.with_name("other.beton"), images, labels, **options)
    return path.read_bytes() == other.read_bytes()


@settings(max_examples=12)
@given(
    counts=st.lists(st.integers(1, 70), min_size=2, max_size=3),
    shape=st.sampled_from([(5, 4), (5, 4, 1), (3, 4, 3)]),
    page_size=st.sampled_from([64, 256, 4096]),
)
def test_a_file_in_parts_is_the_file_at_once(scratch, random_samples, counts, shape, page_size):
    path = scratch() / "parts.beton"
    parts = [random_samples(count, shape, 5, seed) for seed, count in enumerate(counts)]
    write_beton(path, *parts[0], **TEXTS, page_size=page_size)
    sources = {""}
    for images, labels in parts[1:]:
        append_beton(path, images, labels)
        with Beton(path) as file:
            sources.add(file.integrity.source)
    assert len(sources) == len(parts)  # `compile` sees that these are no longer its bytes
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    assert same_as_at_once(path, images, labels)
    relabel_beton(path, labels[::-1])
    assert same_as_at_once(path, images, labels[::-1])
    relabel_beton(path, labels // 3, class_names="xy")
    assert same_as_at_once(path, images, labels // 3, class_names="xy")


def test_a_dataset_is_appended_at_the_files_size(tmp_path, random_samples):
    path = tmp_path / "a.beton"
    images, labels = random_samples(9, (6, 7), 5)
    write_beton(path, images[:4], labels[:4], **TEXTS)

    class Rest:
        classes = "unknown"

        def __len__(self):
            return 5

        def __getitem__(self, index):
            return images[4 + index], labels[4 + index]

    append_beton(path, Rest())
    assert same_as_at_once(path, images, labels)
    write_beton(path, images[:4, :, :, None], labels[:4], **TEXTS)  # stored as (6, 7, 1)
    append_beton(path, Rest())
    assert same_as_at_once(path, images[..., None], labels)
    Rest.__getitem__ = lambda self, index: (np.zeros((6, 8), np.uint8), 0)
    with pytest.raises(DataError, match="item 0 is 6 x 8"):
        append_beton(path, Rest())
    Rest.__getitem__ = lambda self, index: (images[0], index)  # there are five classes, 0 to 4
    append_beton(path, Rest())
    Rest.__getitem__ = lambda self, index: (images[0], 1 + index)
    before = path.read_bytes()
    with pytest.raises(DataError, match="label 5 of sample 18"):
        append_beton(path, Rest())
    assert path.read_bytes() == before


class Failing:
    """A stream that ends with an error in its second page."""

    shape = (60, 6, 7)

    def __init__(self, error):
        self.error = error

    def blocks(self, rows):
        yield np.zeros((rows, 6, 7), np.uint8)
        raise self.error


@pytest.mark.parametrize(
    "error", [DataError("cut short"), OSError("unreadable"), KeyboardInterrupt(), ZeroDivisionError()]
)
def test_an_end_in_the_middle_leaves_the_old_file(tmp_path, random_samples, error):
    path = tmp_path / "a.beton"
    write_beton(path, *random_samples(50, (6, 7), 5), **TEXTS, page_size=512)
    before = path.read_bytes()
    with pytest.raises((type(error), DataError)):
        append_beton(path, Failing(error), np.zeros(60, int))
    with pytest.raises(KeyboardInterrupt):
        relabel_beton(path, np.zeros(50, int), progress=lambda done, count: (_ for _ in ()).throw(KeyboardInterrupt))
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.beton"]


def test_what_does_not_fit_the_file_is_refused(tmp_path, random_samples):
    path = tmp_path / "a.beton"
    images, labels = random_samples(9, (6, 7), 5)
    write_beton(path, images, labels, **TEXTS)
    before = path.read_bytes()
    wrong = [
        (lambda: append_beton(path, images[:, 1:], labels), r"\(6, 7, 1\).*\(5, 7, 1\)"),
        (lambda: append_beton(path, images[..., None].repeat(3, 3), labels), r"\(6, 7, 3\)"),
        (lambda: append_beton(path, images, labels[:3]), "9 images"),
        (lambda: append_beton(path, images, labels + 5), "out of range; 0 to 4"),
        (lambda: append_beton(path, images), "without labels"),
        (lambda: relabel_beton(path, labels[:3]), "9 images"),
        (lambda: relabel_beton(path, labels - 5), "out of range"),
        (lambda: relabel_beton(path, labels, class_names="a"), "0 to 0"),
        (lambda: append_beton(tmp_path / "missing.beton", images, labels), "no such file"),
    ]
    for call, message in wrong:
        with pytest.raises(DataError, match=message):
            call()
    assert path.read_bytes() == before
    with Beton(path) as file:
        at = int(file.offsets[3])
    damaged = bytearray(before)
    damaged[at] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="page 0"):  # or its new checksum would vouch for the damage
        append_beton(path, images, labels)
