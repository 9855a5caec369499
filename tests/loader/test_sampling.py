"""What an epoch holds other than each sample once: drawn by weights, a part of the samples, an order of one's own."""

from __future__ import annotations

import itertools
import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.utils.data import WeightedRandomSampler

from fastmnist.errors import ConfigError, DataError
from fastmnist.loader.loader import Loader
from fastmnist.loader.order import ORDER_STREAM, epoch_order, quasi_random_order, random_bits
from fastmnist.loader.sampling import Weighted
from tests.loader.batches import COUNT, MOVES, assert_same_batches, copied, joined

WEIGHTS = st.lists(st.sampled_from([0.0, 1e-310, 0.1, 1.0, 3.0, 1e300]), min_size=1, max_size=60).filter(any)
FIVE = np.array([1.0, 0.0, 2.0, 4.0, 0.5])


def rows_of(loader: Loader) -> np.ndarray:
    return joined(loader.chunks())[2].numpy()


# Weights


@given(weights=WEIGHTS, count=st.integers(1, 300), seed=st.integers(0, 2**64), epoch=st.integers(0, 99))
def test_draws_with_replacement_invert_the_cumulative_weights(weights, count, seed, epoch):
    weights = np.array(weights)
    uniforms = (random_bits(count, seed, epoch, ORDER_STREAM) >> np.uint64(11)) * 2.0**-53
    cumulative = np.cumsum(weights / weights.max())
    expected = np.searchsorted(cumulative / cumulative[-1], uniforms, side="right")
    samples = np.arange(len(weights)) * 3 + 1
    found = Weighted(weights, count, replacement=True)(samples, seed, epoch)
    np.testing.assert_array_equal(found, samples[expected])
    assert weights[expected].all()


@given(weights=WEIGHTS, part=st.floats(0, 1), seed=st.integers(0, 2**64))
def test_draws_without_replacement_come_once_and_never_with_weight_0(weights, part, seed):
    weights = np.array(weights)
    most = np.count_nonzero(weights)
    count = max(1, int(part * most))
    found = Weighted(weights, count, replacement=False)(np.arange(len(weights)), seed, 0)
    assert len(set(found.tolist())) == len(found) == count
    assert weights[found].all()


@pytest.mark.parametrize("replacement", [True, False])
def test_the_draws_have_the_distribution_of_torchs_sampler(replacement):
    """Chi-square of the first two draws of 6,000 epochs against torch's and against the exact probabilities."""
    epochs, chances = 6000, FIVE / FIVE.sum()
    ours = Weighted(FIVE, 2, replacement)
    found = np.array([ours(np.arange(5), 0, epoch) for epoch in range(epochs)])
    generator = torch.Generator().manual_seed(0)
    torchs = np.array([list(WeightedRandomSampler(FIVE, 2, replacement, generator=generator)) for _ in range(epochs)])
    cells = [(a, b) for a in (0, 2, 3, 4) for b in (0, 2, 3, 4) if replacement or a != b]

    def counted(draws: np.ndarray) -> list[int]:
        return [int(np.sum((draws == cell).all(1))) for cell in cells]

    exact = [chances[a] * chances[b] / (1 if replacement else 1 - chances[a]) for a, b in cells]
    assert sum(counted(found)) == sum(counted(torchs)) == epochs
    assert stats.chisquare(counted(found), np.array(exact) * epochs).pvalue > 1e-3
    assert stats.chi2_contingency([counted(found), counted(torchs)]).pvalue > 1e-3


def test_weighted_draws_are_those_of_every_version():
    """Pinned: a change here would give every run and every saved position another meaning."""
    found = [Weighted(FIVE, 4, replacement)(np.arange(5), 0, 0).tolist() for replacement in (True, False)]
    assert found == [[0, 2, 3, 0], [3, 2, 0, 4]]


def test_a_loader_draws_its_indices_by_their_weights(open_loader):
    indices = np.arange(100, 0, -10)
    weights = np.where(indices > 50, 1, 0)
    loader = open_loader(indices=indices, weights=torch.tensor(weights), seed=3)
    rows = rows_of(loader)
    np.testing.assert_array_equal(rows, Weighted(weights.astype(float), 10, True)(indices, 3, 0))
    assert rows.min() > 50
    assert not np.array_equal(rows, rows_of(loader))
    assert open_loader(indices=indices, weights=weights.tolist(), epoch_samples=50, replacement=True, seed=3)


def test_balanced_draws_each_class_equally_often_and_within_it_by_weight(open_loader, samples):
    labels, chosen = samples[2], np.arange(20, COUNT)
    weights = np.arange(len(chosen), dtype=float)
    for given_ in (None, weights):
        loader = open_loader(1000, indices=chosen, weights=given_, balanced=True, epoch_samples=20_000)
        rows = rows_of(loader)
        classes = np.unique(labels[chosen])
        chances = np.array([(labels[chosen] == labels[row]).sum() for row in chosen]) * len(classes)
        expected = 1 / chances
        if given_ is not None:
            assert list(open_loader(indices=chosen, weights=given_ * 1e306, balanced=True))  # of infinite sum
            sums = np.array([weights[labels[chosen] == labels[row]].sum() for row in chosen])
            expected = weights / sums / len(classes)
        seen = np.bincount(rows, minlength=COUNT)[chosen]
        some = expected > 0
        assert not seen[~some].any()
        assert stats.chisquare(seen[some], expected[some] * 20_000).pvalue > 1e-3


# A part of the samples


@given(count=st.integers(1, COUNT), world=st.integers(1, 4), order=st.sampled_from(["random", "quasi_random"]))
def test_fewer_samples_are_the_first_of_the_epochs_order(samples, count, world, order):
    parts = []
    for rank in range(world):
        options = {"order": order, "rank": rank, "world_size": world, "epoch_samples": count}
        with Loader(samples[0], 10, device="cpu", **options) as loader:
            loader.set_epoch(1)
            assert len(loader) == math.ceil(math.ceil(count / world) / 10)
            parts.append(rows_of(loader))
            pages = loader.file.offsets // loader.file.page_size
    expected = epoch_order(np.arange(COUNT), 0, 1)
    if order == "quasi_random":
        expected = quasi_random_order(pages, 0, 1)[0]
    dealt = np.stack(parts, 1).ravel()
    np.testing.assert_array_equal(dealt, np.resize(expected[:count], len(dealt)))


# An order of one's own


def test_an_order_of_ones_own_gets_the_epoch_and_a_generator_of_seed_and_epoch(open_loader):
    loader = open_loader(seed=5, order=by_thirds)
    loader.set_epoch(4)
    bits = np.random.Philox(np.random.SeedSequence([5, 4, ORDER_STREAM]))
    np.testing.assert_array_equal(rows_of(loader), by_thirds(4, np.random.Generator(bits)))
    kept = np.arange(COUNT)
    loader = open_loader(order=lambda epoch, generator: kept)
    batches = iter(loader.chunks())
    next(batches)
    kept[:] = 0  # the loader has a copy
    assert torch.cat([chunk.rows for chunk in batches]).tolist() == list(range(10, COUNT))


@pytest.mark.parametrize(
    ("order", "options", "named"),
    [
        (lambda rows: rows[:-2], {}, ["missing: 9, 3"]),
        (lambda rows: [*rows, 5, 7], {}, ["too often: 5, 7"]),
        (lambda rows: [*rows[1:], 60], {}, ["missing: 5", "too often: 60"]),
        (lambda rows: rows * 0.5, {}, ["float64"]),
        (lambda rows: [COUNT], {}, [str(COUNT)]),
        (lambda rows: [-1], {"epoch_samples": 1}, ["-1"]),
        (lambda rows: None, {}, ["epoch 0"]),
        (lambda rows: rows, {"epoch_samples": 5}, ["4", "5"]),
        (lambda rows: [5, 6, 8], {"epoch_samples": 3}, ["not of indices: 6, 8"]),
    ],
)
def test_an_order_with_other_numbers_is_refused_naming_them(open_loader, order, options, named):
    rows = np.array([5, 7, 9, 3])
    loader = open_loader(order=lambda epoch, generator: order(rows), indices=rows, **options)
    with pytest.raises(ConfigError) as error:
        next(iter(loader))
    assert all(words_of(text) <= words_of(str(error.value)) for text in named)
    loader.close()


def words_of(text: str) -> set[str]:
    return set(text.replace(":", " ").replace(",", " ").replace(";", " ").split())


# Other samples


@pytest.mark.parametrize("options", [{}, {"placement": "resident"}, {"dtype": torch.float32, "augment": MOVES}])
def test_samples_come_as_their_numbers_say(open_loader, options):
    loader = open_loader(**options)
    loader.set_epoch(2)
    chunk = next(loader.chunks(11))
    for wanted in (chunk.rows, chunk.rows.numpy(), chunk.rows.tolist()):
        images, labels = loader.get(wanted, epoch=2)
        assert torch.equal(images, chunk.images)
        assert torch.equal(labels, chunk.labels)
        assert images.is_contiguous(memory_format=torch.channels_last)
    assert loader.get([7, 7, 2])[1].tolist() == loader.file.labels[[7, 7, 2]].tolist()
    assert loader.state_dict()["epoch"] == 3


@pytest.mark.parametrize("wrong", [[COUNT], [-1], [], [[1]], 3, [0.5], "3", None, [True] * COUNT])
def test_numbers_that_name_no_sample_are_refused(open_loader, wrong):
    loader = open_loader()
    before = loader.state_dict()
    for call in (loader.get, loader.set_indices):
        with pytest.raises(ConfigError, match="indices must be"):
            call(wrong)
    assert loader.state_dict() == before


def test_other_indices_count_from_the_next_epoch_on(open_loader):
    loader, whole = open_loader(threads=2), copied(open_loader())
    batches = iter(loader)
    taken = copied(itertools.islice(batches, 3))
    chosen = np.arange(90, 30, -2)
    loader.set_indices(chosen)
    state = loader.state_dict()
    assert_same_batches(taken + copied(batches), whole)  # the loop under way, which moves no position
    assert loader.state_dict() == state
    fresh = open_loader(indices=chosen)
    fresh.load_state_dict(state)
    assert (len(loader), len(loader.dataset)) == (3, 30)
    assert_same_batches(copied(loader) + copied(loader), copied(fresh) + copied(fresh))
    loader.seek(5, 1)
    loader.set_indices(torch.tensor([3, 1]), weights=[1, 0])  # an epoch that was begun elsewhere is over
    assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (6, 0)
    assert rows_of(loader).tolist() == [3, 3]
    with pytest.raises(ConfigError, match="weights"):
        loader.set_indices([4, 5, 6])
    assert rows_of(loader).tolist() == [3, 3]
    balanced = open_loader(balanced=True)
    balanced.set_indices(chosen)
    assert set(rows_of(balanced)) <= set(chosen)


def test_a_resident_loader_has_the_samples_that_it_copied(open_loader):
    loader = open_loader(indices=range(50, 70), placement="resident")
    with pytest.raises(ConfigError, match=r"sample 49 .*resident"):
        loader.get([51, 49])
    with pytest.raises(ConfigError, match=r"sample 70 .*resident"):
        loader.set_indices([70])
    loader.set_indices([69, 50])
    assert set(rows_of(loader)) == {50, 69}
    images, _ = loader.get([60])
    assert torch.equal(images, open_loader().get([60])[0])


# Positions


def by_thirds(epoch: int, generator: np.random.Generator) -> np.ndarray:
    """Each sample once, those of one residue of 3 after another."""
    return np.concatenate([generator.permutation(np.arange((first + epoch) % 3, COUNT, 3)) for first in range(3)])


def some(epoch: int, generator: np.random.Generator) -> list[int]:
    return generator.integers(0, COUNT, 64).tolist()


KINDS = {
    "weighted": {"weights": np.arange(COUNT), "epoch_samples": 150},
    "once": {"weights": np.arange(COUNT) + 1, "replacement": False, "epoch_samples": 90},
    "balanced": {"balanced": True},
    "part": {"epoch_samples": 71},
    "own": {"order": by_thirds},
    "own, some": {"order": some, "epoch_samples": 64},
}
kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


@kinds
def test_an_epoch_is_shared_and_resumed_with_another_number_of_processes(open_loader, options):
    [whole] = [rows_of(open_loader(1000, **options))]

    def processes(world: int, batch_size: int) -> list[Loader]:
        return [open_loader(batch_size, rank=rank, world_size=world, **options) for rank in range(world)]

    def dealt(loaders: list[Loader], batches: int | None) -> list[int]:
        """Rows in the order of all, of that many batches."""
        rows = [[chunk.rows for chunk in itertools.islice(loader.chunks(), batches)] for loader in loaders]
        return torch.stack([torch.cat(of_one) for of_one in rows], 1).ravel().tolist()

    three, two = processes(3, 5), processes(2, 7)
    rows = dealt(three, 2)
    state = json.loads(json.dumps(three[1].state_dict()))
    for loader in two:
        loader.load_state_dict(state)
    rows += dealt(two, None)
    np.testing.assert_array_equal(rows[: len(whole)], whole)
    assert two[0].state_dict()["epoch"] == 1


@kinds
def test_copies_and_states_keep_the_draws(open_loader, options):
    loader = open_loader(**options)
    for _ in itertools.islice(loader, 2):
        pass
    loader.seek(1, 3)
    with pickle.loads(pickle.dumps(loader)) as copy:
        assert copy.state_dict() == loader.state_dict()
        assert_same_batches(copied(copy) + copied(copy), copied(loader) + copied(loader))
    for other in ({}, *KINDS.values()):
        if other is not options and not ("order" in other and "order" in options):
            with pytest.raises(DataError):
                open_loader(**other).load_state_dict(loader.state_dict())
    position = loader._epoch_order.total
    with pytest.raises(DataError, match=str(position)):
        loader.load_state_dict(loader.state_dict() | {"position": position})


# What cannot work


@pytest.mark.parametrize(
    "options",
    [
        {"weights": [1.0] * (COUNT - 1)},
        {"weights": np.ones((COUNT, 1))},
        {"weights": 1.0},
        {"weights": ["much"] * COUNT},
        {"weights": [-1.0] + [1.0] * (COUNT - 1)},
        {"weights": [np.nan] + [1.0] * (COUNT - 1)},
        {"weights": [np.inf] + [1.0] * (COUNT - 1)},
        {"weights": np.zeros(COUNT)},
        {"weights": np.ones(COUNT), "indices": range(50)},
        {"weights": [0.0] + [1.0] * (COUNT - 1), "replacement": False},
        {"weights": np.ones(COUNT), "shuffle": False},
        {"balanced": True, "order": "quasi_random"},
        {"epoch_samples": 0},
        {"epoch_samples": 2.5},
        {"epoch_samples": COUNT + 1},
        {"epoch_samples": 10, "order": "sequential"},
        {"weights": np.ones(COUNT), "order": by_thirds},
        {"balanced": True, "epoch_samples": 3, "rank": 0, "world_size": 4, "uneven": "drop"},
    ],
    ids=lambda options: ", ".join(f"{name}={str(value)[:12]}" for name, value in options.items()),
)
def test_sampling_that_cannot_work_is_refused(samples, options):
    with pytest.raises(ConfigError, match=next(iter(options)) if "rank" not in options else "dealt"):
        Loader(samples[0], 10, device="cpu", **options)
