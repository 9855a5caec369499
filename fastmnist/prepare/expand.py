"""Writes `fastmnist compile --expand`'s file: deformed copies of a compiled file's images, as many times as they are.

The pages are made by some threads, written in order beside their file's name, and noted in a journal. What stops the
writing leaves both; the next call checks the pages that were noted against their checksums and goes on from there.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
from joblib import cpu_count

from fastmnist.beton.layout import Layout, page_size_for
from fastmnist.beton.moments import Moments
from fastmnist.beton.reader import Beton
from fastmnist.beton.writer import Progress
from fastmnist.errors import ConfigError, FastmnistError
from fastmnist.files import open_alone
from fastmnist.prepare import deform
from fastmnist.prepare.journal import Journal

if TYPE_CHECKING:
    from typing_extensions import Buffer

MOST_THREADS = 8  # more would wait for the one that writes
PARTIAL, JOURNAL = ".partial", ".journal"  # added to the file's name until it is whole


class Streamed(io.BufferedRandom):
    """A file, made where it is missing, most of which is never in memory: `lag` writes or reads are.

    What is written goes to the system at once, so that a killed process loses none of it, and the disk begins on it
    while more is made. That only little is in memory is faster too, where memory must first be had from elsewhere.
    """

    def __init__(self, path: Path, lag: int = 32) -> None:
        super().__init__(io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+"))
        self._recent: deque[tuple[int, int]] = deque(maxlen=lag)

    def write(self, content: Buffer) -> int:
        start = self.tell()
        size = super().write(content)
        self.flush()
        self._pass(start, size)
        return size

    def read(self, size: int | None = -1) -> bytes:
        start = self.tell()
        content = super().read(size)
        self._pass(start, len(content))
        return content

    def _pass(self, start: int, size: int) -> None:
        if len(self._recent) == self._recent.maxlen:
            self._let_go(*self._recent[0])
        self._recent.append((start, size))
        self._let_go(start, size)

    def _let_go(self, start: int, size: int) -> None:
        """Has the disk begin with what is not on it yet, and the memory freed of what is."""
        with suppress(AttributeError, OSError):  # macOS has no such call, some file systems do not take it
            os.posix_fadvise(self.fileno(), start, size, os.POSIX_FADV_DONTNEED)


class Page(NamedTuple):
    """A page's bytes, their CRC-32, and what its images add to the moments, each (C,) int64."""

    content: np.ndarray
    checksum: int
    total: np.ndarray
    squares: np.ndarray


def check_expansion(factor: int, seed: int) -> None:
    """Raises ConfigError naming the flag whose value cannot work."""
    if factor < 1:
        raise ConfigError(f"--expand {factor}: must be at least 1")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed {seed}: must be 0 to {2**63 - 1}")


def expanded_source(source: str, factor: int, seed: int) -> str:
    """What identifies an expanded file: all that its bytes depend on. `source` is that of the file it is made from."""
    return f"{source}; {factor} times, seed {seed}, deformation {deform.VERSION}"


def write_expanded(
    path: Path,
    source: Beton,
    factor: int,
    seed: int = 0,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    threads: int | None = None,
) -> None:
    """Writes `factor` times as many samples as `source` has; sample i is its sample i mod N, deformed.

    Args:
        path: the file to write; `path`.partial and `path`.journal are beside it until it is whole.
        source: a file of our own writer.
        factor, seed: see `check_expansion`.
        progress: called with (samples written, samples in all) after each page.
        say: told in a sentence when an interrupted file is gone on with.
        threads: that make pages; by default one per core. The file's bytes are the same with any number.

    Raises:
        ConfigError: see `check_expansion`.
        FastmnistError: the disk is too small or fails, or another process is writing the file; what is done is kept.
    """
    check_expansion(factor, seed)
    layout = _layout(source, factor, seed)
    threads = threads or min(cpu_count(), MOST_THREADS)
    partial = path.with_name(path.name + PARTIAL)
    subject = json.dumps({"source": layout.source, "bytes": layout.file_size, "page": layout.page_size})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_room(path, partial, layout)
        with (
            Journal(path.with_name(path.name + JOURNAL), subject) as journal,
            Streamed(partial) as file,
        ):
            sums = Moments(layout.channels)
            done = _keep(file, layout, journal, sums, progress)
            if done and say is not None:
                say(
                    f"{path.name}: going on from {min(done * layout.per_page, layout.count):,} of {layout.count:,} "
                    "samples, which an earlier call wrote and which are whole"
                )
            file.seek(layout.data_start + done * layout.page_size)
            with closing(_pages(source, layout, seed, done, threads)) as pages:
                for page in pages:
                    file.write(page.content.data)
                    journal.add(page.checksum)
                    _add(sums, page)
                    done += 1
                    if progress is not None:
                        progress(min(done * layout.per_page, layout.count), layout.count)
            _finish(file, layout, source.labels, journal.checksums, sums)
            os.replace(partial, path)
            journal.remove()
    except OSError as error:
        raise FastmnistError(
            f"{path}: cannot be written: {error.strerror or error}; {_megabytes(layout.file_size)} are needed there: "
            "make room and give the same command again, which goes on from what is done, or name another folder"
        ) from error


def tidy(path: Path) -> None:
    """Deletes the journal of a whole file: what a process leaves that is killed when it has just given the name."""
    journal, partial = (path.with_name(path.name + end) for end in (JOURNAL, PARTIAL))
    if journal.exists():
        with suppress(FastmnistError, OSError), open_alone(journal, f"{path}: another process is writing it"):
            if not partial.exists():
                journal.unlink()


def _layout(source: Beton, factor: int, seed: int) -> Layout:
    assert source.integrity is not None
    height, width, channels = source.image_shape
    shape = (height, width) if channels == 1 else source.image_shape
    return Layout(
        count=len(source) * factor,
        image_shape=shape,
        page_size=page_size_for(shape),
        dataset=source.integrity.dataset,
        split=f"{source.integrity.split}-x{factor}",
        class_names=source.integrity.class_names,
        source=expanded_source(source.integrity.source, factor, seed),
    )


def _check_room(path: Path, partial: Path, layout: Layout) -> None:
    """Raises FastmnistError when the disk is too small: better now than after gigabytes."""
    there = 0
    with suppress(FileNotFoundError):
        there = partial.stat().st_blocks * 512  # bytes that are written over, or given back
    free = shutil.disk_usage(path.parent).free
    if free + there < layout.file_size:
        raise FastmnistError(
            f"{path}: cannot be written: {_megabytes(layout.file_size)} are needed there, "
            f"{_megabytes(free + there)} are free; make room, name another folder or a smaller --expand"
        )


def _megabytes(size: int) -> str:
    return f"{-(-size // 10**6):,} MB"


def _add(sums: Moments, page: Page) -> None:
    sums.total += page.total
    sums.squares += page.squares


def _summed(content: np.ndarray, channels: int) -> Page:
    total, squares = np.zeros(channels, np.int64), np.zeros(channels, np.int64)
    images = content[: len(content) - len(content) % channels]  # the padding is 0 and adds nothing
    deform.add_up(images, channels, total, squares)
    return Page(content, zlib.crc32(content.data), total, squares)


def _keep(file: BinaryIO, layout: Layout, journal: Journal, sums: Moments, progress: Progress | None) -> int:
    """How many pages from the first one on are what the journal says; they are added up, the rest is forgotten."""
    kept = 0
    file.seek(layout.data_start)
    for expected in journal.checksums[: layout.num_pages]:
        content = np.frombuffer(file.read(layout.page_size), np.uint8)
        if len(content) != layout.page_size:
            break
        page = _summed(content, layout.channels)
        if page.checksum != expected:
            break
        _add(sums, page)
        kept += 1
        if progress is not None:
            progress(min(kept * layout.per_page, layout.count), layout.count)
    journal.keep(kept)
    if not kept:
        file.truncate(0)
    return kept


def _pages(source: Beton, layout: Layout, seed: int, first: int, threads: int) -> Generator[Page, None, None]:
    """The pages from number `first` on, in order; each is valid until the next one is asked for."""
    deformer = deform.Deformer(source.data, source.offsets, source.image_shape, seed)
    ahead = threads + 2  # so that no thread waits while a page is written
    buffers = np.zeros((ahead, layout.page_size), np.uint8)

    def make(number: int) -> Page:
        content = buffers[number % ahead]
        start = number * layout.per_page
        used = min(layout.per_page, layout.count - start) * layout.image_size
        deformer(start, content[:used].reshape(-1, layout.image_size))
        content[used:] = 0
        return _summed(content, layout.channels)

    pending: deque[Future[Page]] = deque()
    with ThreadPoolExecutor(threads, "fastmnist-expand") as pool:
        try:
            for number in range(first, layout.num_pages):
                pending.append(pool.submit(make, number))
                if len(pending) == ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for page in pending:
                page.cancel()


def _finish(file: BinaryIO, layout: Layout, labels: np.ndarray, checksums: list[int], sums: Moments) -> None:
    """Writes what stands around the pages, whatever was there, and waits until all is on the disk."""
    sums.count = layout.count * layout.image_size // layout.channels
    behind_block = layout.block_start + layout.block_size
    file.seek(behind_block)
    file.write(bytes(layout.data_start - behind_block))
    layout.write_around(file, labels, checksums, sums)
    file.truncate(layout.file_size)
    file.flush()
    os.fsync(file.fileno())
