"""Order of an epoch's samples: a pure function of (seed, epoch), the same on every machine and in every version.

Random bits are Philox's (J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), whose stream numpy
keeps stable; the seed is spread by numpy's SeedSequence. What numpy may change (Generator's methods) is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from fastmnist.loader.kernels import jit

Kind = Literal["random", "quasi_random", "sequential"]
Uneven = Literal["pad", "drop"]

ORDER_STREAM, AUGMENT_STREAM, PAGE_STREAM, FLIP_STREAM = 0, 1, 2, 3  # one independent stream of bits per use
VIEW_STREAMS = 8  # from the streams of one view of an image to those of the next
BLOCK = 1 << 20  # random numbers drawn at a time
WINDOW_PAGES = 32  # shuffled together: 64 MB of the files that we write


def random_bits(count: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """(count,) uint64; the first n are the same for every count >= n."""
    bits: np.ndarray = bit_generator(seed, epoch, stream).random_raw(count)
    return bits


def bit_generator(seed: int, epoch: int, stream: int) -> np.random.Philox:
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
    """Pages of the file, (n,) int64, whose samples are shuffled together, from position `start` of an epoch on."""

    start: int
    pages: np.ndarray


def quasi_random_order(
    pages: np.ndarray, seed: int, epoch: int, window_pages: int = WINDOW_PAGES
) -> tuple[np.ndarray, list[Window]]:
    """Pages in random order, shuffled `window_pages` at a time, so that a reader keeps few of them in memory.

    All positions within a window are shuffled. With one window every order is equally likely;
    benchmarks/research/shuffling.py measures how far from that several windows are.

    Args:
        pages: (n,) integers of at least 0, the page of each position.

    Returns:
        (n,) int64, positions 0 to n - 1; and the windows in order.
    """
    lowest = pages.min()
    counts = np.bincount(pages - lowest)
    distinct = np.flatnonzero(counts)
    visited = distinct[epoch_order(np.arange(len(distinct)), seed, epoch, PAGE_STREAM)]
    # Each page's turn. numpy sorts 16-bit integers by radix, ten times as fast as wider ones.
    turn = np.empty(len(counts), np.uint16 if len(distinct) <= 1 << 16 else np.int32)
    turn[visited] = np.arange(len(distinct))
    order = np.argsort(turn[pages - lowest], kind="stable")
    ends = np.cumsum(counts[visited])
    starts = np.arange(0, len(distinct), window_pages)
    edges = [0, *ends[starts[1:] - 1].tolist(), len(order)]
    generator = bit_generator(seed, epoch, ORDER_STREAM)
    for start, end in pairwise(edges):
        _shuffle(order[start:end], generator.random_raw(end - start))
    visited += lowest
    windows = [Window(edge, visited[at : at + window_pages]) for edge, at in zip(edges, starts.tolist(), strict=False)]
    return order, windows


class EpochPlan(NamedTuple):
    """One epoch of one process, made once and passed down.

    Attributes:
        epoch: its number.
        rows: (n,) int64, the samples' numbers in the file, in order.
        windows: pages of the file and where in `rows` they are needed from; only of a quasi-random order.
        draws: (n, 4 or 5) float32, `Augmentation.draw` of each row, or (n, views, 4 or 5) of several views; None where
            the loader does not augment.
    """

    epoch: int
    rows: np.ndarray
    windows: Sequence[Window] = ()
    draws: np.ndarray | None = None


class Draw(Protocol):
    """An epoch's rows of all processes, chosen another way than each of `samples` once."""

    def __call__(self, samples: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """(count,) int64 of `samples` (n,), a pure function of the arguments."""

    @property
    def identity(self) -> dict[str, Any]:
        """Entries of a loader's state, which must agree for the state to be resumed."""


@dataclass(frozen=True)
class EpochOrder:
    """The order of `samples` in each epoch, and the share of one of several processes.

    Attributes:
        samples: (n,) int64, numbers of samples in the file.
        kind: "random"; "quasi_random" (see `quasi_random_order`, which needs `pages`); "sequential".
        pages: (n,) integers, the page of each of `samples`.
        rank, world_size: this process takes every world_size-th sample from its rank on, so that one step of all
            processes together takes what one process would take with a batch world_size times as large.
        uneven: when world_size does not divide n, "pad" repeats the first samples of the order, "drop" leaves out its
            last ones; all processes get the same number either way.
        count: samples of an epoch over all processes, the first ones of its order; None takes all.
        draw: chooses these `count` itself; takes the place of "random".

    >>> orders = [EpochOrder(np.arange(5), "random", seed=0, rank=rank, world_size=2) for rank in range(2)]
    >>> [len(order) for order in orders]
    [3, 3]
    >>> sorted({*orders[0].plan(epoch=7).rows.tolist(), *orders[1].plan(epoch=7).rows.tolist()})
    [0, 1, 2, 3, 4]
    """

    samples: np.ndarray
    kind: Kind
    seed: int
    pages: np.ndarray | None = None
    rank: int = 0
    world_size: int = 1
    uneven: Uneven = "pad"
    count: int | None = None
    draw: Draw | None = None

    @property
    def total(self) -> int:
        """Samples of all processes in each epoch."""
        return len(self.samples) if self.count is None else self.count

    def __len__(self) -> int:
        """Samples of this process in each epoch."""
        full, rest = divmod(self.total, self.world_size)
        return full + (rest > 0 and self.uneven == "pad")

    def plan(self, epoch: int, start: int = 0) -> EpochPlan:
        """The plan of an epoch from position `start` of the order of all processes on, without draws."""
        if self.kind == "quasi_random":
            assert self.pages is not None
            places, windows = quasi_random_order(self.pages, self.seed, epoch, WINDOW_PAGES)
            windows = [window for window in windows if window.start < self.total]
            shared = self._share(places[: self.count], start)
            return EpochPlan(epoch, self.samples[shared], self._share_of_windows(shared, windows, start))
        if self.kind == "sequential":
            rows = self.samples.copy()
        else:
            rows = (self.draw or epoch_order)(self.samples, self.seed, epoch)
        return EpochPlan(epoch, self._share(rows[: self.count], start))

    def _share(self, order: np.ndarray, start: int) -> np.ndarray:
        """This process's part of the order of all, dealt out from position `start` on."""
        rest, missing = order[start:], -(len(order) - start) % self.world_size
        if missing and self.uneven == "pad":
            rest = np.concatenate([rest, np.resize(order, missing)])
        return np.ascontiguousarray(rest[self.rank : len(rest) - len(rest) % self.world_size : self.world_size])

    def _share_of_windows(self, shared: np.ndarray, windows: list[Window], start: int) -> list[Window]:
        if self.world_size == 1 and not start:
            return windows
        assert self.pages is not None
        moved = [Window(self._count_before(window.start - start), window.pages) for window in windows]
        padding = self._count_before(self.total - start)
        if padding < len(shared):  # padded with the order's first samples
            moved.append(Window(padding, np.unique(self.pages[shared[padding:]])))
        return moved

    def _count_before(self, position: int) -> int:
        """This process's samples among `position` that are dealt out."""
        return max(0, -((self.rank - position) // self.world_size))


def sample_uniforms(count: int, seed: int, epoch: int, draws: int, stream: int = AUGMENT_STREAM) -> np.ndarray:
    """(count, draws) float32 in [0, 1): row i belongs to the sample of index i, whatever `count` is."""
    generator = bit_generator(seed, epoch, stream)
    uniforms = np.empty(count * draws, np.float32)
    for start in range(0, len(uniforms), BLOCK):
        block = uniforms[start : start + BLOCK]
        block[:] = generator.random_raw(len(block)) >> np.uint64(40)  # the 24 bits that a float32 holds
    uniforms *= np.float32(2.0**-24)
    return uniforms.reshape(count, draws)
