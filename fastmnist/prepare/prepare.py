"""From a dataset's name to its compiled files, written where they are missing or their source has changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import platformdirs

from fastmnist.beton.reader import Beton, Verify
from fastmnist.beton.writer import Progress, write_beton
from fastmnist.errors import DataError
from fastmnist.sources import datasets

Status = Literal["written", "current", "replaced: its source changed", "replaced: it was damaged"]
# Called with (path, samples written, samples in all).
CompileProgress = Callable[[Path, int, int], None]

FALLBACK = "digits"


@dataclass(frozen=True)
class CompiledFile:
    """One compiled split: where it is, how many samples, and whether it had to be written.

    split: "train", "test", or "train-x<factor>" for the expanded training set.
    """

    path: Path
    split: str
    samples: int
    status: Status


@dataclass(frozen=True)
class Prepared:
    """A dataset's two files; note: one sentence on why it is this dataset, empty when it was asked for."""

    dataset: str
    train: Path
    test: Path
    note: str = ""


def cache_folder(chosen: str | os.PathLike[str] | None = None) -> Path:
    """Where compiled files and downloads are kept."""
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("fastmnist")


def data_folder(chosen: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder that the user named, by argument or by $FASTMNIST_DATA."""
    named = chosen or os.environ.get("FASTMNIST_DATA")
    return Path(named).expanduser() if named else None


def compiled_path(dataset: str, split: str, folder: Path) -> Path:
    """How a compiled file is called."""
    return folder / f"{dataset}-{split}.beton"


def compile_dataset(
    dataset: str = "mnist",
    data_dir: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    progress: CompileProgress | None = None,
    rewrite_damaged: bool = True,
    expand: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> list[CompiledFile]:
    """Compiles both splits of a dataset; a file that is there, whole and current is left as it is.

    With `expand`, a third file holds that many deformed copies of each training image.

    Args:
        dataset: a name from `datasets.NAMES`.
        data_dir: the folder with the IDX files; by default $FASTMNIST_DATA, then a download into the cache.
        output: the folder for the `.beton` files; by default the cache.
        progress: called after each page.
        rewrite_damaged: replace a file that is damaged; otherwise that is an error, and only sizes are checked.
        expand: copies of each training image, at least 1; None for no third file.
        seed: of the copies' deformations, 0 or more; each is a pure function of (seed, index).
        say: told in a sentence when an interrupted file is gone on with.

    Raises:
        DataError: the source cannot be used. FastmnistError: a file cannot be written. ConfigError: a number of copies
        or a seed that cannot be.
    """
    datasets.check_name(dataset)
    if expand is not None:
        # Here, because it brings numba.
        from fastmnist.prepare import expand as expansion

        expansion.check_expansion(expand, seed)
    folder = cache_folder(output)

    def source_folder() -> Path:
        return data_folder(data_dir) or datasets.download(dataset, cache_folder() / "downloads")

    compiled = []
    for split in datasets.SPLITS:
        source = datasets.open_source(dataset, split, source_folder)
        path = compiled_path(dataset, split, folder)
        status = _status(path, source.fingerprint, rewrite_damaged)
        if status != "current":
            write_beton(
                path,
                source.images,
                source.labels,
                class_names=source.class_names,
                dataset=dataset,
                split=split,
                source=source.fingerprint,
                progress=_report(progress, path),
            )
        compiled.append(CompiledFile(path, split, len(source.labels), status))
    if expand is not None:
        with Beton(compiled[0].path) as train:
            assert train.integrity is not None
            split = f"{compiled[0].split}-x{expand}"
            path = compiled_path(dataset, split, folder)
            fingerprint = expansion.expanded_source(train.integrity.source, expand, seed)
            # The size is enough: to read gigabytes at each call is not worth it, `fastmnist verify` does it.
            status = _status(path, fingerprint, rewrite_damaged, "size")
            if status != "current":
                expansion.write_expanded(path, train, expand, seed, progress=_report(progress, path), say=say)
            else:
                expansion.tidy(path)
            compiled.append(CompiledFile(path, split, len(train) * expand, status))
    return compiled


def _report(progress: CompileProgress | None, path: Path) -> Progress | None:
    return None if progress is None else lambda done, n: progress(path, done, n)


def _status(path: Path, fingerprint: str, rewrite_damaged: bool, verify: Verify = "full") -> Status:
    if not path.exists():
        return "written"
    try:
        with Beton(path, verify=verify if rewrite_damaged else "size") as file:
            current = file.integrity is not None and file.integrity.source == fingerprint
    except DataError:
        if not rewrite_damaged:
            raise
        return "replaced: it was damaged"
    return "current" if current else "replaced: its source changed"


def prepare(
    dataset: str | None,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    *,
    progress: CompileProgress | None = None,
) -> Prepared:
    """The compiled files to train on, in the order that the design names: folder, cache, download, embedded digits.

    Raises:
        DataError: the dataset that was asked for cannot be had, or a file of it is damaged.
    """
    name = datasets.check_name(dataset or "mnist")
    cache = cache_folder(cache_dir)
    folder = data_folder(data_dir)
    if folder is not None and name != FALLBACK:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; --data-dir names one that holds the files of {name}")
        if datasets.folder_of(name, folder) is None:
            return _compiled_in(name, folder)
    elif name != FALLBACK and all(compiled_path(name, split, cache).exists() for split in datasets.SPLITS):
        return _compiled_in(name, cache)
    note = ""
    if folder is None and name != FALLBACK:
        try:
            folder = datasets.download(name, cache / "downloads")
        except DataError as error:
            if dataset is not None:
                raise
            name = FALLBACK
            note = f"No dataset was named and {error.args[0].split(';')[0]}: using the embedded digits instead."
    files = compile_dataset(name, folder, cache, progress=progress, rewrite_damaged=False)
    return Prepared(name, files[0].path, files[1].path, note)


def _compiled_in(name: str, folder: Path) -> Prepared:
    paths = [compiled_path(name, split, folder) for split in datasets.SPLITS]
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"{folder}: holds neither the IDX files of {name} nor {path.name}; give another --data-dir, "
                f"or write that file with fastmnist compile --dataset {name} --output {folder}"
            )
    return Prepared(name, paths[0], paths[1])
