"""Which sample comes when: a pure function of (seed, epoch), the same on every machine and in every version.

Random bits are Philox's (J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), whose stream numpy
keeps stable; the seed is spread by numpy's SeedSequence. What numpy may change (Generator's methods) is not used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np

from fastmnist.loader.jit import jit

Kind = Literal["random", "quasi_random", "sequential"]
Uneven = Literal["pad", "drop"]

ORDER_STREAM, AUGMENT_STREAM, PAGE_STREAM = 0, 1, 2  # one independent stream of bits per use
BLOCK = 1 << 20  # random numbers that are drawn at a time
WINDOW_PAGES = 32  # that are shuffled together: 64 MB of the files that we write


def random_bits(count: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """(count,) uint64; the first n are the same for every count >= n."""
    bits: np.ndarray = _generator(seed, epoch, stream).random_raw(count)
    return bits


def _generator(seed: int, epoch: int, stream: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence([seed, epoch, stream]))


@jit
def _shuffle(items, bits):  # type: ignore[no-untyped-def]
    """In-place Fisher-Yates shuffle (R. Durstenfeld, Algorithm 235, CACM 1964); 53 bits per draw."""
    for last in range(len(items) - 1, 0, -1):
        other = int(float(bits[last] >> np.uint64(11)) * (2.0**-53) * (last + 1))
        items[last], items[other] = items[other], items[last]


def epoch_order(indices: np.ndarray, seed: int, epoch: int, stream: int = ORDER_STREAM) -> np.ndarray:
    """`indices` (n,) int64 in the random order of this epoch, as a new array.

    >>> epoch_order(np.arange(5), seed=0, epoch=0).tolist() == epoch_order(np.arange(5), seed=0, epoch=0).tolist()
    True
    """
    order = np.array(indices, np.int64)
    _shuffle(order, random_bits(len(order), seed, epoch, stream))
    return order


@dataclass(frozen=True)
class Window:
    """Pages of the file that are shuffled together: `pages` (n,) int64, from position `start` of an epoch's order."""

    start: int
    pages: np.ndarray


def quasi_random_order(
    pages: np.ndarray, seed: int, epoch: int, window: int = WINDOW_PAGES
) -> tuple[np.ndarray, list[Window]]:
    """An order that visits pages in random order, `window` of them at a time, so that a reader keeps few in memory.

    Within a window all positions are shuffled; with as many pages as that or fewer, every order is equally likely.
    With more, benchmarks/research/shuffling.py measures how far it is from that.

    Args:
        pages: (n,) integers of at least 0, the page that each position is on.

    Returns:
        (n,) int64: positions 0 to n - 1; and the windows one after the other.
    """
    lowest = pages.min()
    counts = np.bincount(pages - lowest)
    distinct = np.flatnonzero(counts)
    visited = distinct[epoch_order(np.arange(len(distinct)), seed, epoch, PAGE_STREAM)]
    # Of each page; numpy sorts 16 bits by radix, ten times as fast as more of them.
    turn = np.empty(len(counts), np.uint16 if len(distinct) <= 1 << 16 else np.int32)
    turn[visited] = np.arange(len(distinct))
    order = np.argsort(turn[pages - lowest], kind="stable")
    ends = np.cumsum(counts[visited])
    starts = np.arange(0, len(distinct), window)
    edges = [0, *ends[starts[1:] - 1].tolist(), len(order)]
    generator = _generator(seed, epoch, ORDER_STREAM)
    for start, end in pairwise(edges):
        _shuffle(order[start:end], generator.random_raw(end - start))
    visited += lowest
    windows = [Window(edge, visited[at : at + window]) for edge, at in zip(edges, starts.tolist(), strict=False)]
    return order, windows


@dataclass(frozen=True)
class EpochOrder:
    """The order of `count` samples in each epoch, and the part of it that falls to one of several processes.

    kind: "random"; "quasi_random" (see `quasi_random_order`, which needs `pages`); "sequential".
    rank, world_size: this process takes every world_size-th sample from its rank on, so that one step of all
    processes together takes what one process would take with a batch world_size times as large.
    uneven: when world_size does not divide count, "pad" repeats the first samples of the order, "drop" leaves out its
    last ones; all processes get the same number either way.
    """

    count: int
    kind: Kind
    seed: int
    pages: np.ndarray | None = None
    rank: int = 0
    world_size: int = 1
    uneven: Uneven = "pad"
    _last: dict[int, tuple[np.ndarray, list[Window]]] = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        """Samples that this process gets in each epoch."""
        full, rest = divmod(self.count, self.world_size)
        return full + (rest > 0 and self.uneven == "pad")

    def __call__(self, epoch: int) -> np.ndarray:
        """(len,) int64: positions 0 to count - 1, in the order of that epoch."""
        return self.with_windows(epoch)[0]

    def with_windows(self, epoch: int) -> tuple[np.ndarray, list[Window]]:
        """The same, and which pages of the file are needed from where on in it; no windows unless quasi-random.

        An epoch that is asked for again, by what loads and by what augments, is made once: not to be written to.
        """
        found = self._last.get(epoch)
        if found is None:
            found = self._make(epoch)
            self._last.clear()
            self._last[epoch] = found
        return found

    def _make(self, epoch: int) -> tuple[np.ndarray, list[Window]]:
        order = np.arange(self.count)
        windows: list[Window] = []
        if self.kind == "random":
            order = epoch_order(order, self.seed, epoch)
        elif self.kind == "quasi_random":
            assert self.pages is not None
            order, windows = quasi_random_order(self.pages, self.seed, epoch)
        if self.world_size == 1:
            return order, windows
        everybody = len(self) * self.world_size
        mine = np.ascontiguousarray(np.resize(order, everybody)[self.rank :: self.world_size])
        windows = [Window(self._turn(w.start), w.pages) for w in windows]
        if windows and self._turn(self.count) < len(mine):  # it was padded with what comes first
            again = self._turn(self.count)
            assert self.pages is not None
            windows.append(Window(again, np.unique(self.pages[mine[again:]])))
        return mine, windows

    def _turn(self, place: int) -> int:
        """How many places before `place` in the order of all are this process's."""
        return max(0, -((self.rank - place) // self.world_size))


def sample_uniforms(count: int, seed: int, epoch: int, draws: int) -> np.ndarray:
    """(count, draws) float32 in [0, 1): row i belongs to the sample of index i, whatever `count` is."""
    generator = _generator(seed, epoch, AUGMENT_STREAM)
    uniforms = np.empty(count * draws, np.float32)
    for start in range(0, len(uniforms), BLOCK):
        part = uniforms[start : start + BLOCK]
        part[:] = generator.random_raw(len(part)) >> np.uint64(40)  # 24 bits, all that a float32 holds
    uniforms *= np.float32(2.0**-24)
    return uniforms.reshape(count, draws)
