"""Expanded training set: `factor` deformed copies of each image, made by several threads, written in order."""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
from joblib import cpu_count

from fastmnist.beton.layout import Layout, page_size_for
from fastmnist.beton.moments import Moments
from fastmnist.beton.reader import Beton
from fastmnist.beton.writer import Page, Progress, write_pages
from fastmnist.errors import check_limits
from fastmnist.prepare import deform

MAX_THREADS = 8  # beyond it the one thread that writes is the limit


def check_expansion(factor: int, seed: int) -> None:
    """Raises ConfigError naming the flag whose value cannot work."""
    check_limits("--expand", factor, 1, math.inf)
    check_limits("--seed", seed, 0, 2**63 - 1)


def expanded_source(source: str, factor: int, seed: int) -> str:
    """The expanded file's `source` text: all that its bytes depend on, given the original file's `source`."""
    return f"{source}; {factor} times, seed {seed}, deformation {deform.VERSION}"


def write_expanded(
    path: Path,
    original: Beton,
    factor: int,
    seed: int = 0,
    *,
    progress: Progress | None = None,
    threads: int | None = None,
) -> None:
    """Writes N * `factor` samples; sample i is the original's sample i mod N, deformed as (seed, i) says.

    An interrupted call leaves nothing to resume from: the next one writes the file again.

    Args:
        path: the file to write.
        original: a file that fastmnist wrote, of N samples.
        factor, seed: see `check_expansion`.
        progress: called with (samples written, N * factor) after each page.
        threads: number of threads that make pages; by default one per core. It changes no byte.

    Raises:
        ConfigError: see `check_expansion`.
        FastmnistError: the disk is too small or fails.
    """
    check_expansion(factor, seed)
    assert original.integrity is not None
    height, width, channels = original.image_shape
    shape = (height, width) if channels == 1 else original.image_shape
    layout = Layout(
        count=len(original) * factor,
        image_shape=shape,
        page_size=page_size_for(shape),
        dataset=original.integrity.dataset,
        split=f"{original.integrity.split}-x{factor}",
        class_names=original.integrity.class_names,
        source=expanded_source(original.integrity.source, factor, seed),
    )
    deformer = deform.Deformer(original.data, original.offsets, original.image_shape, seed)
    with closing(_pages(deformer, layout, threads or min(cpu_count(), MAX_THREADS))) as pages:
        write_pages(path, layout, original.labels, pages, progress)


def _pages(deformer: deform.Deformer, layout: Layout, threads: int) -> Generator[Page, None, None]:
    """The file's pages in order; each is valid until the next one is taken."""
    ahead = threads + 2  # so that no thread waits while a page is written
    buffers = np.zeros((ahead, layout.page_size), np.uint8)

    def make(number: int) -> Page:
        content = buffers[number % ahead]
        start = number * layout.per_page
        used = min(layout.per_page, layout.count - start) * layout.image_size
        deformer(start, content[:used].reshape(-1, layout.image_size))
        content[used:] = 0
        moments = Moments(layout.channels)
        moments.count = used // layout.channels
        deform.add_up(content[:used], layout.channels, moments.total, moments.squares)
        return Page(content, zlib.crc32(content.data), moments)

    pending: deque[Future[Page]] = deque()
    with ThreadPoolExecutor(threads, "fastmnist-expand") as pool:
        try:
            for number in range(layout.num_pages):
                pending.append(pool.submit(make, number))
                if len(pending) == ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for page in pending:
                page.cancel()
