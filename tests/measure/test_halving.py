"""Successive halving: right on planted cases, within its budget, and every candidate accounted for.

The clock is simulated: whatever the machine does, each part takes exactly the seconds it says.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmnist.errors import ConfigError, FastmnistError
from fastmnist.measure import batches, halving
from fastmnist.measure.halving import FINALISTS, OpenLoader, combinations, describe
from fastmnist.measure.tune import tune_loader
from fastmnist.system import statistics

BATCH, BATCHES = 4, 40


class Clock:
    """Time passes only in `sleep`."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    for timed in (halving, batches, statistics):
        monkeypatch.setattr(timed, "time", SimpleNamespace(perf_counter=made.perf_counter))
    monkeypatch.setattr(halving, "memory_in_use", lambda: 0)
    return made


class Sleepy:
    """A DataLoader whose samples take a sleep each, and whose workers load batches ahead."""

    def __init__(self, clock, num_workers=0, prefetch_factor=2, *, sample_seconds=0.002, begin_seconds=0.0):
        self.clock, self.workers, self.ahead = clock, num_workers, num_workers * prefetch_factor
        self.batch_seconds, self.begin_seconds = BATCH * sample_seconds, begin_seconds
        self.closed = False

    def __len__(self):
        return BATCHES

    def __iter__(self):
        clock = self.clock
        clock.sleep(self.begin_seconds)
        free = [clock.now] * self.workers  # when each worker is done with its last batch
        asked = [clock.now] * self.ahead  # when each of the next batches was asked for
        for _ in range(BATCHES):
            if self.workers:
                worker = free.index(min(free))
                free[worker] = max(free[worker], asked.pop(0)) + self.batch_seconds
                clock.now = max(clock.now, free[worker])
                asked.append(clock.now)
            else:
                clock.sleep(self.batch_seconds)
            yield torch.zeros(BATCH, 2), torch.zeros(BATCH)

    def close(self):
        self.closed = True


def statuses(tuning):
    return {candidate.name: candidate.status for candidate in tuning.search.candidates}


def test_many_workers_are_found_for_a_slow_source(clock):
    found = tune_loader(partial(Sleepy, clock), {"num_workers": [0, 1, 2, 4]}, budget=60)
    assert found.settings == {"num_workers": 4}
    rate = {c.settings["num_workers"]: c.summary().median for c in found.search.candidates}
    assert rate[4] == pytest.approx(4 * rate[0], rel=0.05)


def test_no_workers_are_kept_when_the_step_is_the_limit(clock):
    def step(batch):
        clock.sleep(0.03)

    found = tune_loader(partial(Sleepy, clock), {"num_workers": [0, 2, 4]}, step, budget=60)
    # 8 ms of loading add to 30 ms of computing unless a worker does it meanwhile: two or four workers are the same.
    assert found.settings == {"num_workers": 2}
    assert statuses(found)["num_workers 4"] == "not measured"
    assert "nothing left to gain" in {candidate.reason for candidate in found.search.candidates}
    assert found.search.ceiling.median == pytest.approx(38 / 30, rel=0.02)


@pytest.mark.parametrize(("loading", "computing"), [(0.01, 1.0), (0.4, 1.0), (9.0, 1.0)])
def test_the_ceiling_ends_the_search_and_changes_no_choice(clock, loading, computing):
    """No settings beat the step on one fixed batch, so the search may end where they are as fast."""
    told, choices = [], []
    for ceiling in (False, True):
        begun = clock.now
        search = halving.Halving(
            combinations({"num_workers": [0, 1, 2, 4, 8], "prefetch_factor": [2, 4]}),
            lambda settings: Sleepy(clock, **settings, sample_seconds=0.03 * loading / BATCH),
            lambda batch: clock.sleep(0.03 * computing),
            60.0,
            ahead=lambda settings: settings["num_workers"] * settings["prefetch_factor"],
            ceiling=ceiling,
            announce=lambda text: told.append(clock.now - begun),  # noqa: B023
        ).run()
        choices.append((search.chosen.settings, clock.now - begun))
    (without, whole), (found, taken) = choices
    rates = [min(1 / computing, max(1, choice["num_workers"]) / loading) for choice in (found, without)]
    assert rates[0] >= 0.95 * rates[1]
    reached = loading < 2  # beyond that, an epoch's first batch costs more than a tie
    assert any(candidate.reason == "nothing left to gain" for candidate in search.candidates) == reached
    if reached:
        assert taken < whole
    assert search.ceiling.median == pytest.approx((loading + computing) / computing, rel=0.05)
    assert all(candidate.ratio <= 1.01 * search.ceiling.high for candidate in search.candidates)
    assert len(told) == 1
    if loading < 0.05:  # any settings are a tie: none is even opened
        assert [candidate.status for candidate in search.candidates[1:]] == ["not measured"] * 9
        assert told[0] == taken
    else:
        assert told[0] < 0.2 * 60


def test_what_ties_is_decided_by_simplicity(clock):
    found = tune_loader(
        lambda **settings: Sleepy(clock, 0),
        {"a": [False, True], "b": [1, 2]},
        lambda batch: clock.sleep(0.04),
        budget=60,
    )
    assert found.settings == {"a": False, "b": 1}
    assert all(c.status in ("best", "tie") for c in found.search.candidates if c.final)


def test_the_cost_of_beginning_an_epoch_is_counted_per_batch(clock):
    cheap, dear = (OpenLoader(Sleepy(clock, begin_seconds=s), None, 1) for s in (0.0, 0.32))
    for running in (cheap, dear):
        running.warm_up()
    # 8 ms a batch; 320 ms over 40 batches are as much again.
    assert cheap.turn() / dear.turn() == pytest.approx(2, rel=0.02)


def test_batches_that_were_ready_do_not_count(clock):
    loader = Sleepy(clock, 1, prefetch_factor=8)
    running = OpenLoader(loader, None, ahead=8)
    running.warm_up()
    clock.sleep(0.1)  # all eight are ready now
    assert running.turn() == pytest.approx(BATCH / loader.batch_seconds, rel=0.02)


def test_only_the_best_few_are_measured_again(clock):
    def make(kind):
        return Sleepy(clock, sample_seconds=0.001 * kind)

    found = tune_loader(make, {"kind": [6, 5, 4, 3, 2, 1]}, budget=60)
    ranked = [(c.settings["kind"], c.status) for c in found.search.candidates]
    assert ranked[:FINALISTS] == [(1, "best"), (2, "slower"), (3, "slower"), (6, "slower")]  # 6 is the reference
    assert ranked[FINALISTS:] == [(4, "dropped"), (5, "dropped")]
    assert all(len(c.rounds) == 1 and c.reason for c in found.search.candidates[FINALISTS:])
    assert len({len(c.final) for c in found.search.candidates[:FINALISTS]}) == 1


def test_ratios_are_of_one_round_however_the_machine_drifts(clock):
    """It is ten times as slow in the second rung: the rates of dropped settings are above those of the best."""

    class Drifting(Sleepy):
        def __iter__(self):
            for batch in super().__iter__():
                clock.sleep(9 * self.batch_seconds if len(made) > 6 else 0)
                yield batch

    made = []  # all six in the first rung, then the finalists again

    def make(kind):
        made.append(kind)
        return Drifting(clock, sample_seconds=0.001 * kind)

    found = tune_loader(make, {"kind": [6, 5, 4, 3, 2, 1]}, budget=60).to_dict()["candidates"]
    over = {line["settings"]["kind"]: line["over_default"]["median"] for line in found}
    assert over == pytest.approx({kind: 6 / kind for kind in range(1, 7)}, rel=0.1)
    rates = {line["settings"]["kind"]: line["median"] for line in found}
    assert rates[5] > rates[1]
    for line in found:
        assert [len(values) for values in line["ratios"]] == [1] * len(line["rounds"])


def test_combinations_of_the_best_changes_come_first(clock):
    """Of 125 combinations the budget allows some twenty: the best is found, for it is the product of the best."""
    seconds = {"a": [3, 2.9, 2, 2.8, 2.7], "b": [3, 1.5, 2.9, 2.8, 2.7], "c": [3, 2.9, 2.8, 2.7, 1]}

    def make(**places):
        return Sleepy(clock, sample_seconds=1e-4 * seconds["a"][places["a"]] * seconds["b"][places["b"]]
                      * seconds["c"][places["c"]])  # fmt: skip

    found = tune_loader(make, {name: range(5) for name in "abc"}, budget=20)
    assert sum(bool(c.values) for c in found.search.candidates) < 40
    assert found.settings == {"a": 2, "b": 1, "c": 4}


def test_what_fails_costs_its_own_row(clock):
    opened = []

    def make(kind):
        if kind == "broken":
            raise RuntimeError("no such thing")
        opened.append(Sleepy(clock))
        return opened[-1]

    found = tune_loader(make, {"kind": ["a", "broken", "b"]}, budget=60)
    broken = next(c for c in found.search.candidates if c.settings["kind"] == "broken")
    assert (broken.status, broken.reason) == ("failed", "RuntimeError: no such thing")
    assert found.settings["kind"] == "a"
    assert all(loader.closed for loader in opened)


def test_the_simplest_may_fail_too(clock):
    def make(kind):
        if kind == "broken":
            raise RuntimeError("no such thing")
        return Sleepy(clock)

    assert tune_loader(make, {"kind": ["broken", "b", "c"]}, budget=60).settings == {"kind": "b"}


def test_nothing_works_says_why(clock):
    def make(kind):
        raise RuntimeError("no such thing")

    with pytest.raises(FastmnistError, match=r"2 .*RuntimeError: no such thing") as raised:
        tune_loader(make, {"kind": [1, 2]}, budget=60)
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_the_budget_is_kept(clock):
    begun = clock.now
    found = tune_loader(partial(Sleepy, clock), {"num_workers": list(range(20))}, budget=5)
    assert clock.now - begun < 5.5
    left_out = [c for c in found.search.candidates if not c.values]
    assert left_out
    assert all(c.status == "not measured" and c.reason for c in left_out)


def test_a_slow_machine_still_compares_two_settings(clock):
    def slow(batch):
        clock.sleep(0.5)

    make = partial(Sleepy, clock, sample_seconds=0.1)
    found = tune_loader(make, {"num_workers": [0, 1, 2]}, slow, budget=1.5)
    measured = [candidate for candidate in found.search.candidates if candidate.values]
    assert len(measured) == 2
    assert all(len(candidate.final) >= 3 for candidate in measured)


def test_a_budget_that_measures_nothing_is_refused(clock):
    with pytest.raises(ConfigError, match=r"--budget 0.1"):
        tune_loader(partial(Sleepy, clock), {"num_workers": [0, 1, 2]}, budget=0.1)


def test_a_loader_that_yields_nothing_is_named(clock):
    with pytest.raises(FastmnistError, match="no batch"):
        tune_loader(lambda a: [], {"a": [1, 2]}, budget=5)


def test_a_limit_of_memory_leaves_out_what_takes_more(clock, monkeypatch):
    taken = [100 << 20]

    def make(size):
        taken.append(size << 20)
        return Sleepy(clock)

    monkeypatch.setattr(halving, "memory_in_use", lambda: sum(taken))
    found = tune_loader(make, {"size": [1, 400]}, budget=60, max_memory=200 << 20)
    assert statuses(found)["size 400"] == "too much memory"
    reason = next(c.reason for c in found.search.candidates if c.settings["size"] == 400)
    assert "400 MiB" in reason
    assert "200" in reason
    assert found.settings == {"size": 1}


def test_a_space_without_values_is_refused():
    for space in ({}, {"a": []}):
        with pytest.raises(ConfigError, match="at least one"):
            tune_loader(partial(Sleepy, clock), space)


@given(st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True)))
def test_combinations_are_the_product_the_simplest_first(space):
    found = combinations(space)
    names = [candidate.name for candidate in found]
    product = 1
    for values in space.values():
        product *= len(values)
    assert len(found) == len(set(names)) == product
    assert found[0].settings == {key: values[0] for key, values in space.items()}
    assert found[0].complexity == (0, 0)
    assert [c.complexity for c in found] == sorted(c.complexity for c in found)


def test_what_does_the_same_is_measured_once():
    found = combinations({"workers": [0, 2], "ahead": [2, 4]}, lambda s: s if s["workers"] else s | {"ahead": 2})
    assert [c.settings for c in found] == [
        {"workers": 0, "ahead": 2},
        {"workers": 2, "ahead": 2},
        {"workers": 2, "ahead": 4},
    ]


def test_false_is_not_zero():
    found = combinations({"a": [False, True], "b": [0, 1]})
    assert [c.complexity for c in found] == [(0, 0), (1, 1), (1, 1), (2, 2)]


def test_settings_in_words():
    assert describe({"a": True, "b": 2}, {"a": False, "b": 2}) == "a on"
    assert describe({"a": False, "b": 2}, {"a": False, "b": 2}) == "defaults"


def test_a_tie_is_never_much_slower(clock):
    for slower, chosen in ((1.04, 1), (1.07, 2)):
        found = tune_loader(
            lambda a, slower=slower: Sleepy(clock, sample_seconds=0.001 * (slower if a == 1 else 1)),
            {"a": [1, 2]},
            budget=60,
        )
        assert found.settings == {"a": chosen}
        assert statuses(found)["a 2"] == "best"
