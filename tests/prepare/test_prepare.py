"""From a dataset's name to its files: written, left alone or replaced, from the folder that comes first."""

from __future__ import annotations

import os
from urllib.error import URLError

import numpy as np
import pytest

from fastmnist.beton.reader import Beton
from fastmnist.errors import DataError, FastmnistError
from fastmnist.prepare.prepare import beton_path, cache_folder, compile_dataset, prepare
from fastmnist.sources import datasets
from fastmnist.sources.datasets import DATASETS, SPLITS


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache for each test; the folder that fastmnist makes in it is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastmnist"


@pytest.fixture(autouse=True)
def downloads(monkeypatch):
    """No test may download: each asks for it by name, and finds the names in this list."""
    asked = []

    def refuse(name, folder):
        asked.append((name, folder))
        raise DataError(f"{name} could not be downloaded (no network); give --data-dir FOLDER")

    monkeypatch.setattr(datasets, "download", refuse)
    return asked


def assert_holds(path, images, labels) -> None:
    with Beton(path, verify="full") as file:
        np.testing.assert_array_equal(file.images(np.arange(len(file)))[..., 0], images)
        np.testing.assert_array_equal(file.labels, labels)


def assert_prepared(prepared, written) -> None:
    for split in SPLITS:
        assert_holds(getattr(prepared, split), *written[split])


def identity(paths) -> list[tuple[int, int]]:
    """What changes when a file is written again."""
    return [(path.stat().st_ino, path.stat().st_mtime_ns) for path in paths]


def flip_a_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# Files under a name of their own


@pytest.mark.parametrize("where", ["folder", "cache"])
def test_files_of_any_name_are_a_dataset(tmp_path, cache, write_small_beton, where):
    folder = tmp_path / "folder" if where == "folder" else cache
    for split in SPLITS:
        write_small_beton(folder / f"pets-{split}.beton", split=split, dataset="cats and dogs")
    found = prepare("pets", str(folder) if where == "folder" else None)
    assert (found.dataset, found.train, found.test) == ("pets", *(folder / f"pets-{split}.beton" for split in SPLITS))


@pytest.mark.parametrize("name", ["pets", "../both"])
def test_a_name_of_no_dataset_and_of_no_files_is_refused_with_what_there_is(tmp_path, write_small_beton, name):
    write_small_beton(tmp_path / "folder" / "pets-train.beton")
    for split in SPLITS:
        write_small_beton(tmp_path / f"both-{split}.beton")
    with pytest.raises(DataError, match=r"mnist.*digits.*-test\.beton"):
        prepare(name, str(tmp_path / "folder"))


# compile_dataset


@pytest.mark.parametrize("name", DATASETS)
def test_compile_writes_both_splits_of_every_dataset(tmp_path, write_dataset, name):
    dataset = DATASETS[name]
    written = write_dataset(tmp_path / "idx", name)
    files = compile_dataset(name, tmp_path / "idx", tmp_path / "out")
    assert [(f.path, f.split, f.samples, f.status) for f in files] == [
        (tmp_path / "out" / f"{name}-{split}.beton", split, len(written[split][1]), "written") for split in SPLITS
    ]
    for file in files:
        images, labels = written[file.split]
        upright = images.transpose(0, 2, 1) if dataset.transposed else images
        assert_holds(file.path, upright, labels - dataset.first_label)
        beton = Beton(file.path)
        assert beton.class_names == dataset.class_names
        assert (beton.integrity.dataset, beton.integrity.split) == (name, file.split)


def test_compile_writes_the_digits_without_any_folder(tmp_path):
    files = compile_dataset("digits", output=tmp_path)
    assert sum(file.samples for file in files) == 1797
    for file in files:
        source = datasets.digits(file.split)
        assert_holds(file.path, source.images.images, source.labels)


def test_compile_leaves_current_files_alone(tmp_path, write_dataset):
    write_dataset(tmp_path / "idx")
    paths = [file.path for file in compile_dataset("mnist", tmp_path / "idx", tmp_path)]
    before = identity(paths)
    assert [file.status for file in compile_dataset("mnist", tmp_path / "idx", tmp_path)] == ["current"] * 2
    assert identity(paths) == before


def test_compile_replaces_what_was_compiled_from_another_source(tmp_path, write_dataset):
    write_dataset(tmp_path / "idx")
    compile_dataset("mnist", tmp_path / "idx", tmp_path)
    written = write_dataset(tmp_path / "idx", train=31, seed=1)
    files = compile_dataset("mnist", tmp_path / "idx", tmp_path)
    assert [file.status for file in files] == ["replaced: its source changed"] * 2
    for file in files:
        assert_holds(file.path, *written[file.split])


def test_compile_replaces_a_split_whose_labels_alone_changed(tmp_path, write_dataset, write_idx):
    written = write_dataset(tmp_path / "idx")
    compile_dataset("mnist", tmp_path / "idx", tmp_path)
    images, labels = written["test"]
    write_idx(tmp_path / "idx" / "t10k-labels-idx1-ubyte", (9 - labels).astype(np.uint8))
    files = compile_dataset("mnist", tmp_path / "idx", tmp_path)
    assert [file.status for file in files] == ["current", "replaced: its source changed"]
    assert_holds(files[1].path, images, 9 - labels)


@pytest.mark.parametrize(
    "damage", [flip_a_bit, lambda path: os.truncate(path, 3000), lambda path: path.write_bytes(b"")]
)
def test_compile_replaces_a_damaged_file(tmp_path, write_dataset, damage):
    written = write_dataset(tmp_path / "idx")
    paths = [file.path for file in compile_dataset("mnist", tmp_path / "idx", tmp_path)]
    damage(paths[0])
    files = compile_dataset("mnist", tmp_path / "idx", tmp_path)
    assert [file.status for file in files] == ["replaced: it was damaged", "current"]
    for file in files:
        assert_holds(file.path, *written[file.split])


def test_compile_keeps_the_older_file_when_the_source_is_damaged(tmp_path, write_dataset):
    written = write_dataset(tmp_path / "idx")
    compile_dataset("mnist", tmp_path / "idx", tmp_path)
    os.truncate(tmp_path / "idx" / "train-images-idx3-ubyte", 5000)
    with pytest.raises(DataError, match="train-images-idx3-ubyte"):
        compile_dataset("mnist", tmp_path / "idx", tmp_path)
    assert_holds(tmp_path / "mnist-train.beton", *written["train"])
    assert {path.name for path in tmp_path.iterdir()} == {"idx", "mnist-train.beton", "mnist-test.beton"}


def test_compile_reports_progress_by_file(tmp_path, write_dataset):
    write_dataset(tmp_path / "idx")
    seen = []
    compile_dataset("mnist", tmp_path / "idx", tmp_path, progress=lambda *step: seen.append(step))
    assert seen == [(tmp_path / "mnist-train.beton", 30, 30), (tmp_path / "mnist-test.beton", 20, 20)]


def test_compile_writes_to_the_cache_from_the_folder_in_the_environment(tmp_path, monkeypatch, write_dataset, cache):
    monkeypatch.setenv("FASTMNIST_DATA", str(tmp_path / "idx"))
    written = write_dataset(tmp_path / "idx")
    files = compile_dataset()
    assert [file.path for file in files] == [cache / "mnist-train.beton", cache / "mnist-test.beton"]
    for file in files:
        assert_holds(file.path, *written[file.split])


def test_compile_downloads_where_no_folder_is_named(downloads, cache):
    with pytest.raises(DataError, match="kmnist"):
        compile_dataset("kmnist")
    assert downloads == [("kmnist", cache / "downloads")]


def test_compile_refuses_an_unknown_dataset_before_anything_else(tmp_path, downloads):
    with pytest.raises(DataError, match=r"cifar.*mnist"):
        compile_dataset("cifar", output=tmp_path / "out")
    assert not downloads
    assert not (tmp_path / "out").exists()


def test_compile_names_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FastmnistError, match="file"):
        compile_dataset("digits", output=tmp_path / "file")


# prepare


def test_prepare_takes_the_folder_that_is_named_before_the_one_in_the_environment(
    tmp_path, monkeypatch, write_dataset, cache, downloads
):
    """Each of argument, environment and cache has data of its own, of other sizes."""
    write_dataset(tmp_path / "cached", train=10)
    compile_dataset("mnist", tmp_path / "cached")
    in_environment = write_dataset(tmp_path / "environment", train=20)
    in_argument = write_dataset(tmp_path / "argument", train=40)

    assert len(Beton(prepare(None).train)) == 10
    monkeypatch.setenv("FASTMNIST_DATA", str(tmp_path / "environment"))
    assert_prepared(prepare("mnist"), in_environment)
    prepared = prepare("mnist", str(tmp_path / "argument"))
    assert_prepared(prepared, in_argument)
    assert (prepared.train, prepared.note) == (beton_path("mnist", "train", cache), "")
    assert not downloads


def test_prepare_takes_the_cache_before_it_downloads(tmp_path, write_dataset, downloads):
    written = write_dataset(tmp_path / "idx", "fashion")
    compile_dataset("fashion", tmp_path / "idx", tmp_path / "chosen")
    prepared = prepare("fashion", cache_dir=str(tmp_path / "chosen"))
    assert_prepared(prepared, written)
    assert not downloads


def test_prepare_downloads_and_compiles_what_the_cache_lacks(tmp_path, monkeypatch, write_dataset, cache):
    written = write_dataset(tmp_path / "downloaded", "kmnist")
    asked = []
    monkeypatch.setattr(datasets, "download", lambda *call: asked.append(call) or tmp_path / "downloaded")
    prepared = prepare("kmnist")
    assert_prepared(prepared, written)
    assert asked == [("kmnist", cache / "downloads")]
    assert (prepared.dataset, prepared.note) == ("kmnist", "")
    assert prepare("kmnist") == prepared  # now from the cache
    assert len(asked) == 1


def test_prepare_finishes_a_cache_that_holds_one_split(tmp_path, monkeypatch, write_dataset, cache):
    """As a process leaves it that was ended between the two files."""
    written = write_dataset(tmp_path / "downloaded")
    monkeypatch.setattr(datasets, "download", lambda *call: tmp_path / "downloaded")
    prepare("mnist").test.unlink()
    assert_prepared(prepare("mnist"), written)


def test_prepare_falls_back_on_the_digits_with_a_note_when_no_dataset_was_named(downloads, cache):
    prepared = prepare(None)
    assert prepared.dataset == "digits"
    assert prepared.train == cache / "digits-train.beton"
    assert "no network" in prepared.note
    assert downloads == [("mnist", cache / "downloads")]
    source = datasets.digits("train")
    assert_holds(prepared.train, source.images.images, source.labels)


def test_prepare_falls_back_when_torchvision_finds_no_network(monkeypatch, cache):
    """With the real download, of which torchvision's part alone is replaced."""
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))

    def unreachable(*args, **options):
        raise URLError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.MNIST", unreachable)
    prepared = prepare(None)
    assert prepared.dataset == "digits"
    assert "Name or service not known" in prepared.note


def test_prepare_does_not_fall_back_when_the_dataset_was_named(cache):
    with pytest.raises(DataError, match=r"mnist.*no network"):
        prepare("mnist")
    assert not list(cache.glob("*.beton"))


def test_prepare_of_digits_that_were_asked_for_has_no_note_and_looks_nowhere(tmp_path, monkeypatch, downloads):
    monkeypatch.setenv("FASTMNIST_DATA", str(tmp_path / "missing"))
    prepared = prepare("digits")
    assert (prepared.dataset, prepared.note) == ("digits", "")
    assert not downloads


def test_prepare_leaves_current_files_alone_and_rewrites_changed_ones(tmp_path, write_dataset):
    written = write_dataset(tmp_path / "idx")
    first = prepare("mnist", str(tmp_path / "idx"))
    assert_prepared(first, written)
    before = identity([first.train, first.test])
    assert prepare("mnist", str(tmp_path / "idx")) == first
    assert identity([first.train, first.test]) == before
    changed = write_dataset(tmp_path / "idx", seed=3)
    assert_prepared(prepare("mnist", str(tmp_path / "idx")), changed)


def test_prepare_does_not_replace_a_damaged_file(tmp_path, write_dataset):
    """Compile does; a training run stops and says so."""
    write_dataset(tmp_path / "idx")
    train = prepare("mnist", str(tmp_path / "idx")).train
    os.truncate(train, train.stat().st_size - 1)
    before = identity([train])
    with pytest.raises(DataError, match=r"mnist-train\.beton.*fastmnist compile"):
        prepare("mnist", str(tmp_path / "idx"))
    assert identity([train]) == before


def test_prepare_takes_a_folder_of_compiled_files_as_it_is(tmp_path, write_dataset, cache, downloads):
    written = write_dataset(tmp_path / "idx")
    compile_dataset("mnist", tmp_path / "idx", tmp_path / "compiled")
    prepared = prepare(None, str(tmp_path / "compiled"))
    assert (prepared.train, prepared.test) == tuple(tmp_path / "compiled" / f"mnist-{split}.beton" for split in SPLITS)
    assert_prepared(prepared, written)
    assert not cache.exists()
    assert not downloads


@pytest.mark.parametrize("split", SPLITS)
def test_prepare_names_the_compiled_file_that_a_folder_lacks(tmp_path, write_dataset, split):
    write_dataset(tmp_path / "idx")
    compile_dataset("mnist", tmp_path / "idx", tmp_path / "compiled")
    (tmp_path / "compiled" / f"mnist-{split}.beton").unlink()
    with pytest.raises(DataError) as error:
        prepare("mnist", str(tmp_path / "compiled"))
    for text in (str(tmp_path / "compiled"), f"mnist-{split}.beton", "--data-dir", "fastmnist compile"):
        assert text in str(error.value)


def test_prepare_names_a_folder_that_is_missing_and_an_unknown_dataset(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        prepare(None, str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="cifar"):
        prepare("cifar")


def test_cache_is_the_users_unless_another_is_chosen(tmp_path, cache):
    assert cache_folder() == cache
    assert cache_folder(tmp_path / "other") == tmp_path / "other"
