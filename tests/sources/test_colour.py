"""CIFAR and SVHN in their own formats, through torchvision's readers."""

from __future__ import annotations

import numpy as np
import pytest

from fastmnist.errors import DataError
from fastmnist.sources.colour import COLOUR
from fastmnist.sources.datasets import SPLITS, download, folder_of, open_source


@pytest.mark.parametrize("name", COLOUR)
def test_a_copy_in_torchvisions_layout_is_read(tmp_path, write_colour, any_checksum, name):
    written = write_colour(tmp_path, name)
    for split in SPLITS:
        source = open_source(name, split, tmp_path)
        images, labels = written[split]
        np.testing.assert_array_equal(np.concatenate(list(source.images.blocks(7))), images)
        np.testing.assert_array_equal(source.labels, labels)
        assert len(source.class_names) == (100 if name == "cifar100" else 10)
        assert source.class_names[3] == ("3" if name == "svhn" else "class 3")
    assert download(name, tmp_path) == folder_of(name, tmp_path) == tmp_path  # nothing is fetched
    before = [open_source(name, split, tmp_path).fingerprint for split in SPLITS]
    assert before == [open_source(name, split, tmp_path).fingerprint for split in SPLITS]
    write_colour(tmp_path, name, train=25)
    after = [open_source(name, split, tmp_path).fingerprint for split in SPLITS]
    assert (after[0] != before[0], after[1] == before[1]) == (True, True)


@pytest.mark.parametrize("name", COLOUR)
def test_files_that_are_missing_or_not_torchvisions_are_named(tmp_path, write_colour, name):
    assert folder_of(name, tmp_path) is None
    write_colour(tmp_path, name)
    with pytest.raises(DataError, match=f"{name} differ from torchvision's checksums"):
        _ = open_source(name, "train", tmp_path).images
    file = COLOUR[name].files("test")[0]
    (tmp_path / file).unlink()
    with pytest.raises(DataError, match=file):
        open_source(name, "test", tmp_path)
