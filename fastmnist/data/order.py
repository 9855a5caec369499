"""Which sample comes when: a pure function of (seed, epoch), the same on every machine and in every version.

Random bits are Philox's (J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), whose stream numpy
keeps stable; the seed is spread by numpy's SeedSequence. What numpy may change (Generator's methods) is not used.
"""

from __future__ import annotations

import numpy as np

from fastmnist.data.jit import jit

ORDER_STREAM, AUGMENT_STREAM = 0, 1  # one independent stream of bits per use


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


def epoch_order(indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """`indices` (n,) int64 in the random order of this epoch, as a new array.

    >>> epoch_order(np.arange(5), seed=0, epoch=0).tolist() == epoch_order(np.arange(5), seed=0, epoch=0).tolist()
    True
    """
    order = np.array(indices, np.int64)
    _shuffle(order, random_bits(len(order), seed, epoch, ORDER_STREAM))
    return order


def sample_uniforms(count: int, seed: int, epoch: int, draws: int) -> np.ndarray:
    """(count, draws) float64 in [0, 1): row i belongs to the sample of index i, whatever `count` is."""
    bits = random_bits(count * draws, seed, epoch, AUGMENT_STREAM).reshape(count, draws)
    return (bits >> np.uint64(11)) * 2.0**-53
