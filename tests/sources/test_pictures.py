"""Folders of pictures, against torchvision's ImageFolder on the same files."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from fastmnist.errors import ConfigError, DataError
from fastmnist.sources.pictures import PictureFolder

COUNTS = {"dog": 3, "cat": 4}


def sources(folder, *arguments, **options):
    """{split: source}"""
    return {source.split: source for source in PictureFolder(f"folder:{folder}", *arguments, **options).sources()}


def pixels(source):
    return np.concatenate(list(source.images.blocks(2)))


@pytest.mark.parametrize("test", ["test", "val"])
def test_the_folders_train_and_test_are_what_torchvision_reads(tmp_path, write_pictures, test):
    write_pictures(tmp_path / "train", COUNTS)
    write_pictures(tmp_path / "train" / "cat" / "more", {"": 2}, seed=1)
    write_pictures(tmp_path / test, {"cat": 1, "dog": 2}, seed=2)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no picture")
    theirs = {"train": ImageFolder(tmp_path / "train"), "test": ImageFolder(tmp_path / test)}
    (tmp_path / "train" / ".hidden").mkdir()
    found = sources(tmp_path)
    for split, expected in theirs.items():
        order = [expected.imgs.index((str(path), label)) for path, label in sorted(expected.imgs)]
        np.testing.assert_array_equal(pixels(found[split]), np.stack([np.asarray(expected[i][0]) for i in order]))
        assert found[split].labels.tolist() == [expected.targets[i] for i in order]
        assert (found[split].class_names, found[split].note) == (("cat", "dog"), "")


@pytest.mark.parametrize("below", [".", "train"])
def test_without_a_test_folder_a_fifth_of_each_class_is_the_test_set(tmp_path, write_pictures, below):
    write_pictures(tmp_path / below, {"cat": 25, "dog": 10, "train": 5}, mode="L")
    found = sources(tmp_path)
    assert [len(found[split].labels) for split in ("train", "test")] == [32, 8]
    assert np.bincount(found["test"].labels).tolist() == [5, 2, 1]
    assert found["train"].note == ""
    assert "8 of its 40" in found["test"].note
    every = ImageFolder(tmp_path / below, loader=lambda path: np.asarray(Image.open(path)))
    together = np.concatenate([pixels(source) for source in found.values()])
    assert together.shape == (40, 16, 18)
    assert sorted(map(bytes, together)) == sorted(bytes(image) for image, _ in every)
    assert np.array_equal(pixels(sources(tmp_path)["test"]), pixels(found["test"]))


def test_the_fingerprint_follows_names_sizes_times_and_size(tmp_path, write_pictures):
    write_pictures(tmp_path / "train", COUNTS)
    write_pictures(tmp_path / "test", COUNTS)

    def fingerprints(size=None):
        return [source.fingerprint for source in sources(tmp_path, size).values()]

    seen = [fingerprints()]
    assert fingerprints() == seen[0]
    seen.append(fingerprints((8, 8)))
    os.utime(tmp_path / "train" / "cat" / "0.png", (1, 1))
    seen.append(fingerprints())
    (tmp_path / "train" / "cat" / "0.png").rename(tmp_path / "train" / "cat" / "9.png")
    seen.append(fingerprints())
    assert len({train for train, _ in seen}) == 4
    assert len({test for _, test in seen}) == 2


def test_sizes_and_colours_are_those_of_the_first_training_picture(tmp_path, write_pictures):
    write_pictures(tmp_path / "train", COUNTS)
    write_pictures(tmp_path / "test", COUNTS, mode="L")
    grey = pixels(sources(tmp_path)["test"])
    assert grey.shape == (7, 16, 18, 3)
    assert np.array_equal(grey[..., 0], grey[..., 2])
    write_pictures(tmp_path / "test", {"dog": 1}, size=(20, 10))
    with pytest.raises(DataError, match=r"dog.0\.png.* is 20 x 10 x 3.*16 x 18 x 3.*--image-size"):
        pixels(sources(tmp_path)["test"])
    resized = pixels(sources(tmp_path, (9, 8))["test"])
    expected = Image.open(tmp_path / "test" / "dog" / "0.png").convert("RGB").resize((8, 9), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resized[4], np.asarray(expected))


def test_a_broken_picture_is_named_and_left_out_when_asked(tmp_path, write_pictures):
    written = write_pictures(tmp_path / "train", COUNTS)
    write_pictures(tmp_path / "test", COUNTS)
    cut = tmp_path / "train" / "cat" / "0.png"
    cut.write_bytes(cut.read_bytes()[:200])
    (tmp_path / "train" / "dog" / "1.png").unlink()
    (tmp_path / "train" / "dog" / "1.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"train.cat.0\.png is damaged.*--skip-broken"):
        pixels(sources(tmp_path)["train"])
    found = sources(tmp_path, skip_broken=True)
    kept = [path for path in sorted(written) if path not in ("cat/0.png", "dog/1.png")]
    np.testing.assert_array_equal(pixels(found["train"]), np.stack([written[path] for path in kept]))
    assert found["train"].labels.tolist() == [0] * 3 + [1] * 2
    assert all(name in found["train"].content.note for name in (str(cut), "1.png"))
    assert found["test"].content.note == ""


def test_a_folder_that_is_no_dataset_is_refused(tmp_path, write_pictures):
    with pytest.raises(ConfigError, match="names no folder"):
        PictureFolder("folder:")
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        sources(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no class folders"):
        sources(tmp_path)
    write_pictures(tmp_path, {"cat": 5, "dog": 0})
    with pytest.raises(DataError, match="dog: the class has no pictures"):
        sources(tmp_path)
    write_pictures(tmp_path, {"dog": 1})
    with pytest.raises(DataError, match="a fifth of each class cannot be taken"):
        sources(tmp_path)
    write_pictures(tmp_path / "test", {"cat": 2, "cow": 2})
    with pytest.raises(DataError, match="has test and no train"):
        sources(tmp_path)
    write_pictures(tmp_path / "train", {"cat": 2, "dog": 2})
    with pytest.raises(DataError, match=r"different classes.*cow, dog"):
        sources(tmp_path)
