"""Which sample comes when: a pure function of (seed, epoch), the same on every machine and in every version.

Random bits are Philox's (J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), whose stream numpy
keeps stable; the seed is spread by numpy's SeedSequence. What numpy may change (Generator's methods) is not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from fastmnist.data.jit import jit

Kind = Literal["random", "quasi_random", "sequential"]
Uneven = Literal["pad", "drop"]

ORDER_STREAM, AUGMENT_STREAM, PAGE_STREAM = 0, 1, 2  # one independent stream of bits per use
WINDOW_PAGES = 32  # that are shuffled together: 64 MB of the files that we write


def random_bits(count: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """(count,) uint64; the first n are the same for every count >= n."""
    sequence = np.random.SeedSequence([seed, epoch, stream])
    bits: np.ndarray = np.random.Philox(sequence).random_raw(count)
    return bits


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


def quasi_random_order(pages: np.ndarray, seed: int, epoch: int, window: int = WINDOW_PAGES) -> np.ndarray:
    """(n,) int64: positions 0 to n - 1 in an order that visits pages in random order, `window` of them at a time.

    pages: (n,) int64, the page that each position is on. Within a window all positions are shuffled, so that a reader
    touches no more than `window` pages at once; with as many pages as that or fewer, every order is equally likely.
    """
    distinct, page = np.unique(pages, return_inverse=True)
    turn = np.empty(len(distinct), np.int64)  # of each page
    turn[epoch_order(np.arange(len(distinct)), seed, epoch, PAGE_STREAM)] = np.arange(len(distinct))
    turns = turn[page]
    order = np.argsort(turns, kind="stable")
    bits = random_bits(len(order), seed, epoch, ORDER_STREAM)
    edges = np.searchsorted(turns[order], np.arange(0, len(distinct) + window, window))
    for start, end in pairwise(edges):
        _shuffle(order[start:end], bits[start:end])
    return order


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

    def __len__(self) -> int:
        """Samples that this process gets in each epoch."""
        full, rest = divmod(self.count, self.world_size)
        return full + (rest > 0 and self.uneven == "pad")

    def __call__(self, epoch: int) -> np.ndarray:
        """(len,) int64: positions 0 to count - 1, in the order of that epoch."""
        order = np.arange(self.count)
        if self.kind == "random":
            order = epoch_order(order, self.seed, epoch)
        elif self.kind == "quasi_random":
            assert self.pages is not None
            order = quasi_random_order(self.pages, self.seed, epoch)
        everybody = len(self) * self.world_size
        return np.resize(order, everybody)[self.rank :: self.world_size] if self.world_size > 1 else order


def sample_uniforms(count: int, seed: int, epoch: int, draws: int) -> np.ndarray:
    """(count, draws) float64 in [0, 1): row i belongs to the sample of index i, whatever `count` is."""
    bits = random_bits(count * draws, seed, epoch, AUGMENT_STREAM).reshape(count, draws)
    return (bits >> np.uint64(11)) * 2.0**-53
