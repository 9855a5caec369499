"""Sampling: which samples an epoch has, and how often: each once, drawn by weights, or in an order of the caller's."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fastmnist.errors import ConfigError, whole_number
from fastmnist.loader.arrays import Arrays, Samples, on_host
from fastmnist.loader.kernels import jit
from fastmnist.loader.order import ORDER_STREAM, Draw, Kind, bit_generator, random_bits

Numbers = Sequence[float] | np.ndarray | torch.Tensor
Rows = Sequence[int] | np.ndarray | torch.Tensor
OrderFunction = Callable[[int, np.random.Generator], Rows]  # (epoch, generator) -> the epoch's samples in order


class Sampling:
    """A loader's settings of what an epoch holds; see `Loader`.

    Raises:
        ConfigError: weights or epoch_samples that no samples could have.
    """

    def __init__(
        self,
        weights: Numbers | None = None,
        balanced: bool = False,
        replacement: bool = True,
        epoch_samples: int | None = None,
        order: OrderFunction | None = None,
        mix: Sequence[float] | None = None,
    ) -> None:
        self.mix = None if mix is None else checked_mix(mix)
        self.order = order
        self.weights = None if weights is None else checked_weights(weights)
        self.balanced, self.replacement = balanced, replacement
        self.epoch_samples = None if epoch_samples is None else whole_number("epoch_samples", epoch_samples, 1)

    def draw(self, file: Samples, samples: np.ndarray, kind: Kind) -> Draw | None:
        """The rule that draws an epoch's rows among `samples` (n,); None: each at most once, ordered by `kind`.

        Raises:
            ConfigError: the settings cannot work for these samples, or not together.
        """
        weighted = self.weights is not None or self.balanced or self.mix is not None
        if self.order is not None:
            if weighted:
                raise ConfigError(
                    "an order of your own chooses the samples itself: leave out weights, balanced and mix"
                )
            return OwnOrder(self.order, len(file), self.epoch_samples)
        if not weighted:
            self._check_subset(len(samples), kind)
            return None
        if kind != "random":
            raise ConfigError(
                f"weights, balanced and mix draw each sample from all of them, which order {kind!r} cannot; "
                "take order='random'"
            )
        weights = np.ones(len(samples)) if self.weights is None else self.weights
        if len(weights) != len(samples):
            raise ConfigError(
                f"weights must be one for each of the {len(samples)} indices, in their order; got {len(weights)}"
            )
        if self.balanced:
            _, classes = np.unique(file.labels[samples], return_inverse=True)
            weights = in_shares(weights, classes, np.ones(classes.max() + 1))
        if self.mix is not None:
            weights = self._mixed(file, samples, weights)
        count = len(samples) if self.epoch_samples is None else self.epoch_samples
        return Weighted(weights, count, self.replacement)

    def _mixed(self, file: Samples, samples: np.ndarray, weights: np.ndarray) -> np.ndarray:
        parts = file.parts if isinstance(file, Arrays) else (len(file),)
        if self.balanced:
            raise ConfigError("balanced and mix contradict each other: give weights, which count within each file")
        if len(self.mix or ()) != len(parts):
            raise ConfigError(f"mix {self.mix} must have one share for each file: {len(parts)}")
        files, shares = np.searchsorted(np.cumsum(parts), samples, side="right"), np.array(self.mix)
        sums = np.bincount(files, weights, minlength=len(shares))
        if (empty := np.flatnonzero((sums == 0) & (shares > 0))).size:
            raise ConfigError(f"mix gives file {empty[0]} a share of {shares[empty[0]]}, but it has no sample to draw")
        return in_shares(weights, files, shares)

    def _check_subset(self, samples: int, kind: Kind) -> None:
        if self.epoch_samples is None or self.epoch_samples == samples:
            return
        if self.epoch_samples > samples:
            raise ConfigError(
                f"epoch_samples {self.epoch_samples} are more than the {samples} samples; with weights= (equal ones, "
                "if you like) a sample may come more than once"
            )
        if kind == "sequential":
            raise ConfigError(
                f"epoch_samples {self.epoch_samples} of {samples} would be the same in each sequential epoch; "
                "name them by indices=, or shuffle"
            )


class Weighted:
    """Samples drawn at random in proportion to weights.

    With replacement: inversion of the cumulative weights, with a guide table that says where a search begins (H. Chen
    and Y. Asau, "On generating random variates from an empirical distribution", AIIE Transactions 6, 1974), two steps
    on average. Without replacement: the smallest of exponentially distributed keys, whose rates are the weights (P.
    Efraimidis and P. Spirakis, "Weighted random sampling with a reservoir", Information Processing Letters 97, 2006),
    in the order of the keys, as if each next sample were drawn by weight among those left. Keys that differ in the last
    bit of a logarithm alone may change places on another machine.

    Args:
        weights: (n,) float64, at least 0, one of each sample.
        count: samples to draw.

    Raises:
        ConfigError: without replacement, `count` is more than the weights above 0.

    >>> Weighted(np.array([0.0, 1.0]), count=3, replacement=True)(np.array([70, 80]), seed=0, epoch=0)
    array([80, 80, 80])
    """

    def __init__(self, weights: np.ndarray, count: int, replacement: bool) -> None:
        self.count, self.replacement = count, replacement
        self.identity: dict[str, Any] = {
            "order": "weighted",
            "weights": f"{zlib.crc32(np.ascontiguousarray(weights).data):08x}",
            "replacement": replacement,
        }
        if replacement:
            cumulative = np.cumsum(weights / weights.max())
            self._cumulative = cumulative / cumulative[-1]
            self._first = np.searchsorted(self._cumulative, np.arange(len(weights)) / len(weights), side="right")
            return
        self._places = np.flatnonzero(weights)
        self._weights = weights[self._places]
        if count > len(self._places):
            raise ConfigError(
                f"{count} samples an epoch, but {len(self._places)} of {len(weights)} weights are above 0: without "
                "replacement give epoch_samples of at most that"
            )

    def __call__(self, samples: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        if self.replacement:
            places = np.empty(self.count, np.int64)
            _invert(self._cumulative, self._first, random_bits(self.count, seed, epoch, ORDER_STREAM), places)
        else:
            uniforms = (random_bits(len(self._places), seed, epoch, ORDER_STREAM) >> np.uint64(11)) + 1.0
            with np.errstate(over="ignore"):  # infinite keys come last
                keys = -np.log(uniforms * 2.0**-53) / self._weights
            places = self._places[np.argsort(keys, kind="stable")[: self.count]]
        rows: np.ndarray = samples[places]
        return rows


class OwnOrder:
    """An epoch's rows as the caller's function returns them, checked.

    Args:
        function: gets the epoch and a generator, numpy's default kind, seeded by (seed, epoch).
        file_samples: rows are below that.
        count: samples of an epoch; None: each of the loader's once.

    >>> backwards = OwnOrder(lambda epoch, generator: [8, 5, 3], file_samples=10)
    >>> backwards(np.array([3, 5, 8]), seed=0, epoch=0)
    array([8, 5, 3])
    """

    def __init__(self, function: OrderFunction, file_samples: int, count: int | None = None) -> None:
        self._function, self._file_samples, self._count = function, file_samples, count
        self.identity = {"order": "own"}

    def __call__(self, samples: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """`EpochOrder`'s rows; ConfigError, with the first numbers that are wrong, where they are not as promised."""
        generator = np.random.Generator(bit_generator(seed, epoch, ORDER_STREAM))
        name = f"the rows that order= returned for epoch {epoch}"
        rows = checked_rows(self._function(epoch, generator), self._file_samples, name)
        due, times = (np.bincount(numbers, minlength=self._file_samples) for numbers in (samples, rows))
        if self._count is None:
            wrong = {"missing": times < due, "too often": times > due}
        else:
            wrong = {"not of indices": (times > 0) & (due == 0)}
            if len(rows) != self._count:
                raise ConfigError(f"{name} are {len(rows)}; epoch_samples asks for {self._count}")
        found = [f"{what}: {_some(np.flatnonzero(which))}" for what, which in wrong.items() if which.any()]
        if found:
            advice = "return each of indices once, or set epoch_samples" if self._count is None else "leave them out"
            raise ConfigError(f"{name} do not fit; {'; '.join(found)}; {advice}")
        return rows


def _some(numbers: np.ndarray) -> str:
    return ", ".join(map(str, numbers[:5].tolist())) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")


@jit
def _invert(cumulative, first, bits, places):  # type: ignore[no-untyped-def]
    """places[i] = the first place whose cumulative weight, (n,) float64 up to 1, is above the i-th uniform number.

    first (n,) int64: that place for each k / n, where a search begins. bits: uint64, 53 of them a number in [0, 1).
    """
    for i in range(len(places)):
        uniform = float(bits[i] >> np.uint64(11)) * (2.0**-53)
        place = first[int(uniform * len(first))]
        while cumulative[place] <= uniform:  # the last one is 1
            place += 1
        places[i] = place


def in_shares(weights: np.ndarray, groups: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """`weights` (n,) scaled so that those of each group k, of `groups` (n,), add up to shares[k], or stay 0.

    >>> in_shares(np.ones(5), np.array([0, 1, 1, 1, 1]), np.array([0.6, 0.4]))
    array([0.6, 0.1, 0.1, 0.1, 0.1])
    """
    weights = weights / weights.max()  # whose sums are finite
    sums = np.bincount(groups, weights, minlength=len(shares))
    scaled: np.ndarray = weights / np.where(sums > 0, sums, 1.0)[groups] * shares[groups]
    return scaled


def checked_mix(mix: Sequence[float]) -> tuple[float, ...]:
    """The shares of an epoch that several files have; ConfigError where they are negative or do not add up to 1."""
    try:
        shares = np.array(mix, np.float64)
    except (TypeError, ValueError):
        shares = np.empty(0)
    if shares.ndim != 1 or not (shares >= 0).all() or not math.isclose(shares.sum(), 1, abs_tol=1e-6):
        raise ConfigError(f"mix {mix} must be shares of at least 0, one for each file, that add up to 1")
    return tuple(shares.tolist())


def checked_weights(weights: Numbers) -> np.ndarray:
    """(n,) float64, a copy; ConfigError where some are no numbers, negative or not finite, or all are 0."""
    wanted = "weights must be a list of finite numbers of at least 0, one for each of indices"
    try:
        found = np.array(on_host(weights), np.float64)
    except (TypeError, ValueError):
        raise ConfigError(f"{wanted}; got a {type(weights).__name__} of something else") from None
    if found.ndim != 1:
        raise ConfigError(f"{wanted}; got shape {found.shape}")
    wrong = np.flatnonzero(~(np.isfinite(found) & (found >= 0)))
    if len(wrong):
        raise ConfigError(f"{wanted}; number {wrong[0]} is {found[wrong[0]]}")
    if not found.any():
        raise ConfigError(f"{wanted}; all are 0")
    return found


def checked_rows(indices: Rows, samples: int, name: str = "indices") -> np.ndarray:
    """(n,) int64, a copy, which the kernels rely on; ConfigError where some are no row of a file of `samples`."""
    chosen = np.array(on_host(indices))
    if chosen.size and not np.issubdtype(chosen.dtype, np.integer):
        raise ConfigError(f"{name} must be whole numbers, not {chosen.dtype}; for a mask use np.flatnonzero(mask)")
    chosen = chosen.astype(np.int64)
    if chosen.ndim != 1 or not len(chosen) or chosen.min() < 0 or chosen.max() >= samples:
        raise ConfigError(
            f"{name} must be a list of at least one sample, each 0 to {samples - 1}; "
            f"got shape {chosen.shape}, values {chosen.min(initial=0)} to {chosen.max(initial=0)}"
        )
    return chosen
