"""Sources, against torchvision's readers on the same files."""

from __future__ import annotations

import gzip
import shutil
import socket
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from sklearn.datasets import load_digits

from fastmnist.errors import DataError
from fastmnist.sources import datasets
from fastmnist.sources.datasets import DATASETS, NAMES, SPLITS, download, folder_of, from_folder, open_source

EMNIST = [name for name in DATASETS if name.startswith("emnist-")]
WITH_MNIST_LAYOUT = ["mnist", "fashion", "kmnist"]
TORCHVISION_CLASS = {"mnist": "MNIST", "fashion": "FashionMNIST", "kmnist": "KMNIST", "qmnist": "QMNIST"}


def images_of(source, rows: int = 7) -> np.ndarray:
    images = np.concatenate(list(source.images.blocks(rows)))
    assert images.shape == source.images.shape
    return images


def assert_source_holds(source, images, labels) -> None:
    np.testing.assert_array_equal(images_of(source), np.asarray(images))
    np.testing.assert_array_equal(source.labels, np.asarray(labels))
    assert source.labels.dtype == np.int64


@pytest.fixture(scope="session")
def torchvision_root(mnist_folder, tmp_path_factory):
    """The real files in the layout that torchvision reads: unzipped in MNIST/raw."""
    root = tmp_path_factory.mktemp("torchvision")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in mnist_folder.glob("*ubyte*"):
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as packed, open(raw / path.name.removesuffix(".gz"), "wb") as file:
            shutil.copyfileobj(packed, file)
    return root


@pytest.mark.parametrize("split", SPLITS)
def test_real_mnist_is_what_torchvision_reads(mnist_folder, torchvision_root, split):
    expected = torchvision.datasets.MNIST(torchvision_root, train=split == "train")
    for folder in (mnist_folder, torchvision_root):
        assert_source_holds(from_folder("mnist", split, folder), expected.data, expected.targets)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", WITH_MNIST_LAYOUT)
def test_small_files_are_what_torchvision_reads(tmp_path, write_dataset, name, split):
    torchvision_class = getattr(torchvision.datasets, TORCHVISION_CLASS[name])
    write_dataset(tmp_path / TORCHVISION_CLASS[name] / "raw", name)
    expected = torchvision_class(tmp_path, train=split == "train")
    assert_source_holds(from_folder(name, split, tmp_path), expected.data, expected.targets)


def test_class_names_are_torchvisions():
    assert list(DATASETS["fashion"].class_names) == torchvision.datasets.FashionMNIST.classes
    assert list(DATASETS["kmnist"].class_names) == torchvision.datasets.KMNIST.classes


@pytest.mark.parametrize("split", SPLITS)
def test_qmnist_takes_the_first_of_eight_label_columns(tmp_path, write_dataset, split):
    write_dataset(tmp_path / "QMNIST" / "raw", "qmnist")
    expected = torchvision.datasets.QMNIST(tmp_path, train=split == "train")
    assert expected.targets.shape[1] == 8
    assert_source_holds(from_folder("qmnist", split, tmp_path), expected.data, expected.targets[:, 0])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", EMNIST)
def test_emnist_is_upright_with_labels_from_zero(tmp_path, write_dataset, name, split):
    write_dataset(tmp_path / "EMNIST" / "raw", name)
    part = name.removeprefix("emnist-")
    expected = torchvision.datasets.EMNIST(tmp_path, split=part, train=split == "train")
    first = 1 if part == "letters" else 0
    source = from_folder(name, split, tmp_path)
    assert_source_holds(source, expected.data.transpose(1, 2), expected.targets - first)
    assert list(source.class_names) == [c.upper() if part == "letters" else c for c in expected.classes[first:]]


def test_emnist_of_other_height_than_width_is_transposed_in_shape_too(tmp_path, write_idx):
    images = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    image_name, label_name = DATASETS["emnist-mnist"].files["train"]
    write_idx(tmp_path / image_name, images)
    write_idx(tmp_path / label_name, np.zeros(2, np.uint8))
    assert_source_holds(from_folder("emnist-mnist", "train", tmp_path), images.transpose(0, 2, 1), [0, 0])


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("below", [".", "raw", "MNIST/raw"])
def test_every_layout_of_a_folder_is_found(tmp_path, write_dataset, below, suffix):
    written = write_dataset(tmp_path / below, suffix=suffix)
    assert folder_of("mnist", tmp_path) == tmp_path / below
    for split in SPLITS:
        assert_source_holds(from_folder("mnist", split, tmp_path), *written[split])


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_names_with_a_dot_are_found(tmp_path, write_dataset, suffix):
    written = write_dataset(tmp_path, suffix=suffix)
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    assert (tmp_path / f"t10k-labels.idx1-ubyte{suffix}").exists()
    for split in SPLITS:
        assert_source_holds(from_folder("mnist", split, tmp_path), *written[split])


def test_fingerprint_follows_images_and_labels(tmp_path, write_dataset, write_idx):
    images, labels = write_dataset(tmp_path)["train"]

    def fingerprint() -> str:
        return from_folder("mnist", "train", tmp_path).fingerprint

    seen = [fingerprint()]
    assert seen == [fingerprint()]
    write_idx(tmp_path / "train-images-idx3-ubyte", 255 - images)
    seen.append(fingerprint())
    write_idx(tmp_path / "train-labels-idx1-ubyte", (9 - labels).astype(np.uint8))
    seen.append(fingerprint())
    assert len(set(seen)) == 3


def test_images_and_labels_of_different_length_name_both_files_and_counts(tmp_path, write_dataset, write_idx):
    write_dataset(tmp_path, train=30)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(29, np.uint8))
    with pytest.raises(DataError) as error:
        from_folder("mnist", "train", tmp_path)
    for text in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "30 images", "29 labels"):
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("name", "wrong", "wanted"),
    [
        ("mnist", 10, "0 to 9"),
        ("emnist-letters", 0, "1 to 26"),
        ("emnist-letters", 27, "1 to 26"),
        ("emnist-balanced", 47, "0 to 46"),
    ],
)
def test_a_label_out_of_range_is_refused_naming_file_sample_and_range(
    tmp_path, write_dataset, write_idx, name, wrong, wanted
):
    _, labels = write_dataset(tmp_path, name)["train"]
    labels[17] = wrong
    label_name = DATASETS[name].files["train"][1]
    write_idx(tmp_path / label_name, labels.astype(np.uint8))
    with pytest.raises(DataError) as error:
        from_folder(name, "train", tmp_path)
    assert all(text in str(error.value) for text in (label_name, f"label {wrong} of sample 17", wanted))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=str(tmp_path / "nowhere")):
        from_folder("mnist", "train", tmp_path / "nowhere")


@pytest.mark.parametrize("name", DATASETS)
def test_a_missing_file_is_named(tmp_path, write_dataset, name):
    write_dataset(tmp_path, name)
    missing = DATASETS[name].files["test"][1]
    (tmp_path / missing).unlink()
    from_folder(name, "train", tmp_path)
    with pytest.raises(DataError, match=missing):
        from_folder(name, "test", tmp_path)


def test_an_unknown_dataset_is_refused_with_the_names_there_are(tmp_path):
    for call in (
        lambda: from_folder("cifar", "train", tmp_path),
        lambda: open_source("cifar", "train", tmp_path),
    ):
        with pytest.raises(DataError, match="cifar") as error:
            call()
        assert all(name in str(error.value) for name in NAMES)


# The digits of scikit-learn


@pytest.fixture(scope="module")
def digits():
    return {split: (images_of(source), source.labels) for split in SPLITS for source in [datasets.digits(split)]}


def shrunk(images: np.ndarray) -> np.ndarray:
    """The 20x20 box as 8x8, each pixel the mean of the area that it covers (2.5 pixels wide)."""
    cover = np.array([[max(0, min((i + 1) * 2.5, j + 1) - max(i * 2.5, j)) for j in range(20)] for i in range(8)]) / 2.5
    return np.einsum("ai,nij,bj->nab", cover, images[:, 4:24, 4:24].astype(float), cover)


def test_digits_are_all_of_scikit_learns_each_in_one_split(digits):
    """Each image is matched to the original that it correlates with best."""
    bunch = load_digits()
    images = np.concatenate([digits[split][0] for split in SPLITS])
    labels = np.concatenate([digits[split][1] for split in SPLITS])
    assert images.shape == (1797, 28, 28)
    assert images.dtype == np.uint8
    ours, theirs = (
        (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)
        for values in (shrunk(images).reshape(-1, 64), bunch.images.reshape(-1, 64))
    )
    correlation = ours @ theirs.T / 64
    original = correlation.argmax(axis=1)
    assert sorted(original) == list(range(1797))  # all of them, none twice, so the splits are disjoint
    assert correlation.max(axis=1).min() > 0.95
    np.testing.assert_array_equal(labels, bunch.target[original])


def test_digits_stand_in_a_box_of_20_pixels(digits):
    for images, _ in digits.values():
        outside = images.copy()
        outside[:, 4:24, 4:24] = 0
        assert not outside.any()
        assert images.max() > 240  # the 16 of the original is white


def test_digits_splits_are_stratified(digits):
    (_, train), (_, test) = digits["train"], digits["test"]
    assert len(test) == 360
    share = np.bincount(test, minlength=10) / np.bincount(np.concatenate([train, test]))
    np.testing.assert_allclose(share, 0.2, atol=0.01)


def test_digits_are_the_same_each_time(digits):
    for split in SPLITS:
        again = open_source("digits", split, None)
        assert_source_holds(again, *digits[split])
        assert again.fingerprint == datasets.digits(split).fingerprint


# Download, without a network


def answer_with(monkeypatch, name: str, act) -> list:
    """Puts `act(root, **options)` in the place of torchvision's class; returns the list of its calls."""
    calls = []

    def stand_in(root, *, download, **options):
        assert download
        calls.append((root, options))
        act(root, **options)

    monkeypatch.setattr(torchvision.datasets, DATASETS[name].torchvision, stand_in)
    return calls


@pytest.mark.parametrize("before", [None, 7.5])
@pytest.mark.parametrize(
    "error", [URLError("no route"), RuntimeError("checksum wrong"), TimeoutError("timed out"), RuntimeError("")]
)
def test_a_failed_download_tells_the_way_out_and_restores_the_timeout(tmp_path, monkeypatch, error, before):
    during = []

    def fail(root, **options):
        during.append(socket.getdefaulttimeout())
        raise error

    answer_with(monkeypatch, "mnist", fail)
    at_start = socket.getdefaulttimeout()
    socket.setdefaulttimeout(before)
    try:
        with pytest.raises(DataError) as raised:
            download("mnist", tmp_path / "cache")
        assert socket.getdefaulttimeout() == before
    finally:
        socket.setdefaulttimeout(at_start)
    assert during == [datasets.DOWNLOAD_TIMEOUT]
    for text in ("mnist", str(error), "--data-dir", "--dataset digits"):
        assert text in str(raised.value)


@pytest.mark.parametrize("name", ["mnist", "fashion", "kmnist", "emnist-letters", "emnist-byclass"])
def test_a_download_is_asked_of_torchvision_once(tmp_path, monkeypatch, write_dataset, name):
    kind = DATASETS[name].torchvision
    calls = answer_with(monkeypatch, name, lambda root, **options: write_dataset(tmp_path / kind / "raw", name))
    for _ in range(2):
        assert download(name, tmp_path) == tmp_path / kind / "raw"
    assert calls == [(str(tmp_path), {"split": name.removeprefix("emnist-")} if kind == "EMNIST" else {})]


def test_a_download_that_stopped_half_way_is_taken_up_again(tmp_path, monkeypatch, write_dataset):
    raw = tmp_path / "MNIST" / "raw"
    write_dataset(raw)
    for path in raw.glob("t10k*"):
        path.unlink()
    calls = answer_with(monkeypatch, "mnist", lambda root, **options: write_dataset(raw))
    from_folder("mnist", "test", download("mnist", tmp_path))
    assert len(calls) == 1


def test_a_download_of_qmnist_asks_for_both_splits(tmp_path, monkeypatch, write_dataset):
    """Torchvision's QMNIST fetches no more than the split that it is made for."""

    def fetch(root, *, train=True, what=None, **options):
        made = tmp_path / "made"
        write_dataset(made, "qmnist")
        raw = tmp_path / "QMNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for path in made.glob(f"qmnist-{what or ('train' if train else 'test')}-*"):
            path.rename(raw / path.name)

    answer_with(monkeypatch, "qmnist", fetch)
    folder = download("qmnist", tmp_path)
    for split in SPLITS:
        from_folder("qmnist", split, folder)
