"""From a dataset's name to its `.beton` files, written where they are missing or their source has changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import platformdirs

from fastmnist.beton.reader import Beton, Verify
from fastmnist.beton.writer import Progress, write_beton
from fastmnist.config import parse_size
from fastmnist.errors import ConfigError, DataError
from fastmnist.sources import datasets
from fastmnist.sources.pictures import PREFIX, PictureFolder
from fastmnist.sources.source import Source

Status = Literal["written", "current", "replaced: its source changed", "replaced: it was damaged"]
PrepareProgress = Callable[[Path, int, int], None]  # (file, samples written, samples in all)

FALLBACK = "digits"


@dataclass(frozen=True)
class SplitFile:
    """One split's file; status: whether it had to be written.

    split: "train", "test", or "train-x<factor>" for the expanded training set. note: one sentence on how it came about,
    or empty.
    """

    path: Path
    split: str
    samples: int
    status: Status
    note: str = ""


@dataclass(frozen=True)
class Prepared:
    """A dataset's two files; note: one sentence on why it is this dataset or how it was split, or empty."""

    dataset: str
    train: Path
    test: Path
    note: str = ""


def cache_folder(chosen: str | os.PathLike[str] | None = None) -> Path:
    """The folder for `.beton` files and downloads: `chosen`, or the user's cache."""
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("fastmnist")


def data_folder(chosen: str | os.PathLike[str] | None = None) -> Path | None:
    """The source folder that the user named, by argument or by $FASTMNIST_DATA."""
    named = chosen or os.environ.get("FASTMNIST_DATA")
    return Path(named).expanduser() if named else None


def beton_path(dataset: str, split: str, folder: Path) -> Path:
    return folder / f"{dataset}-{split}.beton"


def prepare(
    dataset: str | None,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    *,
    image_size: str | None = None,
    progress: PrepareProgress | None = None,
) -> Prepared:
    """The files to train on: from the named folder, the cache, a download, or the embedded digits, in this order.

    dataset: a name from `datasets.NAMES`, or of files <dataset>-train.beton and <dataset>-test.beton in the folder; or
        "folder:" and the path of a folder of pictures, which are resized to `image_size`, N or HxW.

    Raises:
        DataError: the dataset that was asked for cannot be had, or a file of it is damaged.
    """
    if dataset is not None and dataset.startswith(PREFIX):
        pictures = _picture_folder(dataset, data_dir, image_size)
        train, test = _write_splits(pictures.sources(), cache_folder(cache_dir), progress, repair=False)
        return Prepared(pictures.dataset, train.path, test.path, test.note)
    name, cache, folder, note = dataset or "mnist", cache_folder(cache_dir), data_folder(data_dir), ""
    if name not in datasets.NAMES:
        return _from_own_files(name, folder or cache)
    if name != FALLBACK:
        if folder is not None:
            if not folder.is_dir():
                raise DataError(f"{folder}: no such folder; --data-dir names one that holds the files of {name}")
            if datasets.folder_of(name, folder) is None:
                return _from_beton_files(name, folder)
        elif all(beton_path(name, split, cache).exists() for split in datasets.SPLITS):
            return _from_beton_files(name, cache)
        else:
            try:
                folder = datasets.download(name, cache / "downloads")
            except DataError as error:
                if dataset is not None:
                    raise
                name = FALLBACK
                note = f"No dataset was named and {error.args[0].split(';')[0]}: using the embedded digits instead."
    sources = (datasets.open_source(name, split, folder) for split in datasets.SPLITS)
    train, test = _write_splits(sources, cache, progress, repair=False)
    return Prepared(name, train.path, test.path, note)


def _picture_folder(
    dataset: str, data_dir: str | os.PathLike[str] | None, image_size: str | None, skip_broken: bool = False
) -> PictureFolder:
    if data_dir is not None:
        raise ConfigError(f"--data-dir {data_dir} has no effect with --dataset {dataset}; leave it out")
    size = None if image_size is None else parse_size(image_size)
    pictures = PictureFolder(dataset, size, skip_broken=skip_broken)
    if pictures.name in datasets.NAMES:  # its files must not be taken for that dataset's
        pictures.name += "-pictures"
    return pictures


def compile_dataset(
    dataset: str = "mnist",
    data_dir: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    progress: PrepareProgress | None = None,
    expand: int | None = None,
    seed: int = 0,
    image_size: str | None = None,
    skip_broken: bool = False,
) -> list[SplitFile]:
    """Writes both splits of a dataset as `.beton` files; one that is whole and current is left as it is.

    With `expand`, a third file holds that many deformed copies of each training image.

    Args:
        dataset: a name from `datasets.NAMES`; or "folder:" and the path of a folder of pictures (see `PictureFolder`).
        data_dir: the folder with the dataset's files; by default $FASTMNIST_DATA, then a download into the cache.
        output: the folder for the `.beton` files; by default the cache.
        progress: called with (file, samples written, samples in all) after each page.
        expand: copies of each training image, at least 1; None for no third file.
        seed: of the copies' deformations, 0 or more; each is a pure function of (seed, index).
        image_size: of a folder's pictures, N or HxW; None where all have one size.
        skip_broken: leave out a folder's pictures that cannot be decoded.

    Raises:
        DataError: the source cannot be used.
        FastmnistError: a file cannot be written.
        ConfigError: `expand` or `seed` is out of range; an option does not go with this dataset.
    """
    of_pictures = dataset.startswith(PREFIX)
    if not of_pictures:
        datasets.check_name(dataset)
        for given, option in ((image_size, "--image-size"), (skip_broken, "--skip-broken")):
            if given:
                raise ConfigError(f"{option} has no effect without --dataset folder:PATH; leave it out")
    if expand is not None:
        # Imported here, because it brings numba.
        from fastmnist.prepare.expand import check_expansion, expanded_source, write_expanded

        check_expansion(expand, seed)
    folder = cache_folder(output)
    source_folder = None
    if of_pictures:
        sources = _picture_folder(dataset, data_dir, image_size, skip_broken).sources()
    else:
        if dataset != FALLBACK:
            source_folder = data_folder(data_dir) or datasets.download(dataset, cache_folder() / "downloads")
        sources = (datasets.open_source(dataset, split, source_folder) for split in datasets.SPLITS)
    files = _write_splits(sources, folder, progress, repair=True)
    if expand is not None:
        with Beton(files[0].path) as train:
            assert train.integrity is not None
            split = f"train-x{expand}"
            path = beton_path(train.integrity.dataset, split, folder)
            for suffix in (".partial", ".journal"):  # left by an interrupted writer of earlier versions
                with suppress(OSError):
                    path.with_name(path.name + suffix).unlink()
            # The size is enough: reading gigabytes at each call is left to `fastmnist verify`.
            status = _status(path, expanded_source(train.integrity.source, expand, seed), verify="size")
            if status != "current":
                write_expanded(path, train, expand, seed, progress=_of_file(progress, path))
            files.append(SplitFile(path, split, len(train) * expand, status))
    return files


def _from_beton_files(name: str, folder: Path) -> Prepared:
    paths = [beton_path(name, split, folder) for split in datasets.SPLITS]
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"{folder}: holds neither the files of {name} nor {path.name}; give another --data-dir, "
                f"or write that file with fastmnist compile --dataset {name} --output {folder}"
            )
    return Prepared(name, paths[0], paths[1])


def _from_own_files(name: str, folder: Path) -> Prepared:
    """Files that `write_beton` wrote under a name that is no dataset's."""
    paths = [beton_path(name, split, folder) for split in datasets.SPLITS]
    if Path(name).name != name or not all(path.is_file() for path in paths):
        raise DataError(
            f"unknown dataset {name!r}: there are {', '.join(datasets.NAMES)} and folder:PATH, and {folder} does not "
            f"hold {' and '.join(path.name for path in paths)}; --data-dir names the folder of such files"
        )
    return Prepared(name, paths[0], paths[1])


def _write_splits(
    sources: Iterable[Source], folder: Path, progress: PrepareProgress | None, *, repair: bool
) -> list[SplitFile]:
    """Writes the splits that are missing or not current; `repair` replaces a damaged file, else that is an error."""
    files = []
    for source in sources:
        path, note = beton_path(source.dataset, source.split, folder), source.note
        status = _status(path, source.fingerprint, "full" if repair else "size", repair)
        if status != "current":
            write_beton(
                path,
                source.images,
                source.labels,
                class_names=source.class_names,
                dataset=source.dataset,
                split=source.split,
                source=source.fingerprint,
                progress=_of_file(progress, path),
            )
            note = f"{note} {source.content.note}".strip()
        with Beton(path) as file:
            files.append(SplitFile(path, source.split, len(file), status, note))
    return files


def _status(path: Path, source: str, verify: Verify, repair: bool = True) -> Status:
    if not path.exists():
        return "written"
    try:
        with Beton(path, verify=verify) as file:
            current = file.integrity is not None and file.integrity.source == source
    except DataError:
        if not repair:
            raise
        return "replaced: it was damaged"
    return "current" if current else "replaced: its source changed"


def _of_file(progress: PrepareProgress | None, path: Path) -> Progress | None:
    return None if progress is None else lambda done, count: progress(path, done, count)
