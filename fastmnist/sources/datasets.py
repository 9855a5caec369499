"""Datasets by name: MNIST's family in IDX files, CIFAR and SVHN, scikit-learn's digits, and folders of pictures."""

from __future__ import annotations

import socket
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastmnist.beton.writer import ArrayStream
from fastmnist.errors import DataError
from fastmnist.sources.colour import COLOUR, DIGITS, colour_source, missing_files
from fastmnist.sources.idx import IdxFile, checksum
from fastmnist.sources.source import Content, Source

LETTERS = tuple(string.ascii_uppercase)
# "balanced" and "bymerge" count lower-case letters that look like their capitals as these.
MERGED = DIGITS + LETTERS + tuple("abdefghnqrt")
FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")

SPLITS = ("train", "test")
DIGITS_TEST_SHARE = 0.2
DIGITS_SEED = 0
DOWNLOAD_TIMEOUT = 20.0  # seconds without an answer


@dataclass(frozen=True)
class Dataset:
    """A member of the MNIST family: its classes, its files, and torchvision's class for it.

    files: names of the image and the label file by split, without .gz. first_label: the first class's number in the
    label file. transposed: images lie on their side in the file. torchvision_options: one dict per call that a
    complete download takes.
    """

    name: str
    class_names: tuple[str, ...]
    torchvision: str
    files: dict[str, tuple[str, str]]
    torchvision_options: tuple[dict[str, str], ...] = ({},)
    first_label: int = 0
    transposed: bool = False


def _plain(name: str, class_names: tuple[str, ...], torchvision: str) -> Dataset:
    files = {
        split: (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
        for split, prefix in (("train", "train"), ("test", "t10k"))
    }
    return Dataset(name, class_names, torchvision, files)


def _emnist(split: str, class_names: tuple[str, ...]) -> Dataset:
    files = {
        part: (f"emnist-{split}-{part}-images-idx3-ubyte", f"emnist-{split}-{part}-labels-idx1-ubyte")
        for part in SPLITS
    }
    first = 1 if split == "letters" else 0
    return Dataset(f"emnist-{split}", class_names, "EMNIST", files, ({"split": split},), first, transposed=True)


_QMNIST_FILES = {part: (f"qmnist-{part}-images-idx3-ubyte", f"qmnist-{part}-labels-idx2-int") for part in SPLITS}

FAMILY = (
    _plain("mnist", DIGITS, "MNIST"),
    _plain("fashion", FASHION, "FashionMNIST"),
    _plain("kmnist", KUZUSHIJI, "KMNIST"),
    Dataset("qmnist", DIGITS, "QMNIST", _QMNIST_FILES, ({"what": "train"}, {"what": "test"})),
    _emnist("byclass", DIGITS + LETTERS + tuple(string.ascii_lowercase)),
    _emnist("bymerge", MERGED),
    _emnist("balanced", MERGED),
    _emnist("letters", LETTERS),
    _emnist("digits", DIGITS),
    _emnist("mnist", DIGITS),
)
DATASETS = {dataset.name: dataset for dataset in FAMILY}
NAMES = (*DATASETS, *COLOUR, "digits")


def check_name(name: str) -> str:
    """Returns `name`; raises DataError with the known names when it is none of them."""
    if name not in NAMES:
        raise DataError(f"unknown dataset {name!r}; there are {', '.join(NAMES)} and folder:PATH")
    return name


class _IdxImages:
    """An IDX file's images as a stream, upright."""

    def __init__(self, file: IdxFile, transposed: bool) -> None:
        self.file, self.transposed = file, transposed
        count, height, width = file.shape
        self.shape = (count, width, height) if transposed else (count, height, width)

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        for block in self.file.blocks(rows):
            yield block.transpose(0, 2, 1) if self.transposed else block


def folder_of(name: str, folder: Path) -> Path | None:
    """The folder that holds files of `name`: `folder`, for IDX files also its `raw` or `MNIST/raw`; or None."""
    if name in COLOUR:
        every = [file for split in SPLITS for file in COLOUR[name].files(split)]
        return folder if len(missing_files(name, folder)) < len(every) else None
    dataset = DATASETS[name]
    for candidate in (folder, folder / "raw", folder / dataset.torchvision / "raw"):
        if any(_find(candidate, stem) for names in dataset.files.values() for stem in names):
            return candidate
    return None


def _find(folder: Path, stem: str) -> Path | None:
    dotted = stem.replace("-idx", ".idx")  # the name in some copies
    for file in (stem, f"{stem}.gz", dotted, f"{dotted}.gz"):
        if (folder / file).is_file():
            return folder / file
    return None


def from_folder(name: str, split: str, folder: Path) -> Source:
    """The split of `name` from the IDX files in `folder` (see `folder_of`).

    Raises:
        DataError: the folder or a file is missing, or a file is not what its name and header claim.
    """
    dataset = DATASETS[check_name(name)]
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; --data-dir names one that holds the IDX files of {name}")
    raw = folder_of(name, folder) or folder
    paths = []
    for stem in dataset.files[split]:
        path = _find(raw, stem)
        if path is None:
            raise DataError(
                f"{raw}: {stem}(.gz) is not there; --data-dir names a folder that holds the IDX files of {name}"
            )
        paths.append(path)
    images = IdxFile(paths[0], "u1", 3)
    qmnist = name == "qmnist"  # its labels are eight int32 columns; the first is the class
    labels_file = IdxFile(paths[1], ">i4", 2) if qmnist else IdxFile(paths[1], "u1", 1)
    if images.shape[0] != labels_file.shape[0]:
        raise DataError(
            f"{paths[0]} has {images.shape[0]:,} images and {paths[1]} has {labels_file.shape[0]:,} labels; "
            "they do not belong together"
        )
    labels = labels_file.read()[:, 0] if qmnist else labels_file.read()
    content = Content(
        _IdxImages(images, dataset.transposed), _checked_labels(labels, dataset, paths[1]), dataset.class_names
    )
    checksums = f"images {checksum(paths[0])}, labels {checksum(paths[1])}"
    return Source(name, split, f"{name} {split}: {checksums}", lambda: content)


def _checked_labels(labels: np.ndarray, dataset: Dataset, path: Path) -> np.ndarray:
    first, last = dataset.first_label, dataset.first_label + len(dataset.class_names) - 1
    wrong = np.flatnonzero((labels < first) | (labels > last))
    if len(wrong):
        at = int(wrong[0])
        raise DataError(
            f"{path}: label {labels[at]} of sample {at} is out of range; {dataset.name} has {first} to {last}"
        )
    return labels.astype(np.int64) - first


def download(name: str, folder: Path) -> Path:
    """Downloads `name` with torchvision, which checks the checksums; returns the folder of the files.

    Raises:
        DataError: there is no network, or the mirrors do not answer.
    """
    from torchvision import datasets

    check_name(name)
    raw = folder_of(name, folder)
    if raw is not None and _is_complete(name, raw):
        return raw  # an interrupted download leaves fewer files
    if name in COLOUR:
        reader, calls = COLOUR[name].reader, tuple(COLOUR[name].options.values())
    else:
        reader, calls = DATASETS[name].torchvision, DATASETS[name].torchvision_options
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for options in calls:
            getattr(datasets, reader)(str(folder), download=True, **options)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum is a RuntimeError
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{name} could not be downloaded ({reason}); with its files at hand give --data-dir FOLDER, "
            "or train without a network with --dataset digits"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return folder_of(name, folder) or folder


def _is_complete(name: str, folder: Path) -> bool:
    if name in COLOUR:
        return not missing_files(name, folder)
    return all(_find(folder, stem) for names in DATASETS[name].files.values() for stem in names)


def digits(split: str) -> Source:
    """The 1,797 handwritten digits that scikit-learn bundles (E. Alpaydin, C. Kaynak, UCI 1998), at 28x28.

    Their 8x8 pixels of 0 to 16 are scaled to the 20x20 box of MNIST's digits. A fifth, stratified by class, is the
    test split.
    """
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    small = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    images = np.zeros((len(small), 28, 28), np.uint8)
    for image, pixels in zip(images, small, strict=True):
        image[4:24, 4:24] = np.asarray(Image.fromarray(pixels).resize((20, 20), Image.Resampling.BICUBIC))
    parts = train_test_split(
        np.arange(len(images)),
        test_size=DIGITS_TEST_SHARE,
        stratify=bunch.target,
        random_state=DIGITS_SEED,
    )
    chosen = np.sort(parts[SPLITS.index(split)])
    content = Content(ArrayStream(images[chosen]), bunch.target[chosen].astype(np.int64), DIGITS)
    fingerprint = f"digits {split}: scikit-learn, {len(chosen)} of {len(images)}"
    return Source("digits", split, fingerprint, lambda: content)


def open_source(name: str, split: str, folder: Path | None) -> Source:
    """The split of any dataset by name; `folder` holds its files, `digits` needs none."""
    if check_name(name) == "digits":
        return digits(split)
    assert folder is not None
    if name in COLOUR:
        return colour_source(name, split, folder)
    return from_folder(name, split, folder)
