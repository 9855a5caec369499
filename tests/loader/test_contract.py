"""The contract of every loader: its samples in its order, batches that last, positions, copies, no traces."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import multiprocessing
import pickle
import random
import signal
import threading
import time
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fastmnist.baselines.loaders import LOADERS
from fastmnist.loader.host import LEAST_KEPT
from fastmnist.loader.loader import DTYPES
from fastmnist.loader.order import epoch_order, quasi_random_order
from tests.loader.batches import (
    COUNT,
    FFCV_MARKS,
    MOVES,
    SHAPE,
    assert_epoch,
    assert_same_batches,
    copied,
    joined,
    with_workers,
)

pytestmark = pytest.mark.usefixtures("work_is_shared_among_threads")
BATCHES = 11  # of 10 samples, in an epoch

CASES = {
    "ours": ("ours", {"threads": 1}),
    "ours, 3 threads": ("ours", {"threads": 3}),
    "ours, resident": ("ours", {"placement": "resident", "threads": 2}),
    "ours, float32": ("ours", {"dtype": torch.float32}),
    "ours, float16, 3 threads": ("ours", {"dtype": torch.float16, "threads": 3}),
    "ours, bfloat16, resident": ("ours", {"dtype": torch.bfloat16, "placement": "resident"}),
    "ours, augmented": ("ours", {"dtype": torch.float32, "augment": MOVES, "threads": 2}),
    "ours, balanced": ("ours", {"balanced": True, "threads": 2}),
    "dataloader": ("dataloader", {}),
    "dataloader, augmented": ("dataloader", {"augment": MOVES}),
    "tuned": ("tuned", {}),
    "tensors": ("tensors", {}),
    "ffcv": ("ffcv", {}),
}
every_loader = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=FFCV_MARKS if name == "ffcv" else []) for case, (name, _) in CASES.items()]
)


@pytest.fixture(scope="module")
def path(scratch, write_small_beton) -> Path:
    path = scratch() / "samples.beton"
    write_small_beton(path, COUNT, SHAPE, page_size=2048)
    return path


@pytest.fixture
def open_loader(path):
    """Makes loaders of that file on the CPU, closed when the test ends."""
    with contextlib.ExitStack() as stack:

        def make(case: str, batch_size: int = 10, **more):
            name, options = CASES[case]
            return stack.enter_context(LOADERS[name](path, batch_size, device="cpu", **options | more))

        yield make


@pytest.mark.parametrize("name", ["ours", "dataloader", "tuned", "tensors"])
@given(
    count=st.integers(1, 40),
    shape=st.sampled_from([(5, 4), (1, 1), (3, 2, 3)]),
    batch_size=st.integers(1, 45),
    seed=st.integers(0, 2**40),
    order=st.sampled_from(["random", "quasi_random", "sequential"]),
    drop_last=st.booleans(),
    world_size=st.integers(1, 3),
    subset=st.none() | st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
    placement=st.sampled_from(["stream", "resident", "auto"]),
    threads=st.integers(0, 4),
)
@example(
    count=3,
    shape=(5, 4),
    batch_size=4,  # the only batch is dropped
    seed=0,
    order="random",
    drop_last=True,
    world_size=1,
    subset=None,
    dtype=torch.uint8,
    placement="auto",
    threads=0,
)
def test_an_epoch_is_the_order_of_seed_and_epoch_with_the_files_content(
    scratch, write_small_beton, name, count, shape, batch_size, seed, order, drop_last, world_size, subset, **ours
):
    path = scratch() / "samples.beton"
    write_small_beton(path, count, shape, classes=1000, seed=seed % 97, page_size=64)
    samples = np.arange(count)
    if subset is not None:
        samples = np.random.default_rng(subset).permutation(count)[: 1 + subset % count]
    options = {"seed": seed, "order": order, "drop_last": drop_last, "rank": world_size - 1, "world_size": world_size}
    options |= {"indices": None if subset is None else samples, "device": "cpu"} | (ours if name == "ours" else {})
    with LOADERS[name](path, batch_size, **options) as loader:
        share = -(-len(samples) // world_size)
        sizes = [batch_size] * (share // batch_size)
        if share % batch_size and not drop_last:
            sizes.append(share % batch_size)
        assert len(loader) == len(sizes)
        for epoch in range(2):
            expected = samples
            if order == "random":
                expected = epoch_order(samples, seed, epoch)
            elif order == "quasi_random":
                pages = loader.file.offsets[samples] // loader.file.page_size
                expected = samples[quasi_random_order(pages, seed, epoch)[0]]
            expected = np.resize(expected, share * world_size)[world_size - 1 :: world_size]
            np.testing.assert_array_equal(assert_epoch(loader, sizes), expected[: sum(sizes)])


@pytest.mark.ffcv
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("batch_size", "options"),
    [
        (8, {}),
        (10, {"order": "quasi_random"}),
        (10, {"order": "quasi_random", "indices": range(1, COUNT, 2), "os_cache": False}),
        (10, {"shuffle": False, "workers": 2, "batches_ahead": 1}),
        (34, {"drop_last": True, "os_cache": False, "seed": 2**40}),
        (1, {"indices": [7, 3, 99]}),
        (COUNT + 1, {"drop_last": True}),
    ],
)
def test_an_epoch_of_ffcv_has_each_sample_once(path, batch_size, options):
    if options.get("workers", 1) > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("numba has one thread here")
    chosen = list(options.get("indices", range(COUNT)))
    whole, rest = divmod(len(chosen), batch_size)
    sizes = [batch_size] * whole + [rest] * bool(rest and not options.get("drop_last"))
    with LOADERS["ffcv"](path, batch_size, device="cpu", **options) as loader:
        epochs = [assert_epoch(loader, sizes).tolist() for _ in range(2)]
        loader.set_epoch(0)
        assert assert_epoch(loader, sizes).tolist() == epochs[0]
    for rows in epochs:
        assert len(set(rows)) == len(rows) == sum(sizes)
        assert set(rows) <= set(chosen)
    assert (epochs[0] == epochs[1]) == (not options.get("shuffle", True) or not sizes)


@every_loader
def test_epochs_differ_repeat_and_follow_each_other(open_loader, case):
    loader, again = open_loader(case), open_loader(case)
    epochs = [copied(loader) for _ in range(3)]
    for one, other in itertools.combinations(epochs, 2):
        assert not torch.equal(joined(one)[0], joined(other)[0])
    for epoch in epochs:
        assert_same_batches(again, epoch)
    for epoch in (2, 0, 1):
        loader.set_epoch(epoch)
        assert loader.epoch == epoch
        assert_same_batches(loader, epochs[epoch])
        assert loader.epoch == epoch + 1
    loader.set_epoch(0)
    assert_same_batches(itertools.islice(loader, 3), epochs[0][:3])
    assert_same_batches(itertools.islice(loader, 1), epochs[1][:1])  # a loop left early ends its epoch
    assert_same_batches(loader, epochs[2])


@every_loader
def test_an_epoch_begins_with_its_first_batch_not_with_the_iterator(open_loader, case):
    loader, same = open_loader(case), open_loader(case)
    first = copied(same)
    for begin in (loader.__iter__, loader.chunks):
        loader.set_epoch(0)
        state = loader.state_dict()
        unused = begin()
        assert loader.state_dict() == state
        assert_same_batches(copied(loader), first)
        del unused
    late = iter(loader)
    loader.set_epoch(0)
    assert_same_batches(copied(late), first)


@every_loader
def test_chunks_are_the_batches_laid_together_with_their_rows(open_loader, case):
    each, loader = open_loader(case, seed=3), open_loader(case, seed=3)
    for count, first in itertools.product((1, 3, 100), (0, 2)):
        each.seek(1, first)
        loader.seek(1, first)
        batches, chunks = copied(each), list(loader.chunks(count))
        assert [len(chunk.labels) for chunk in chunks[:-1]] == [10 * count] * (len(chunks) - 1)
        images, labels, rows = joined(chunks)
        assert_same_batches([(images, labels)], [joined(batches)])
        np.testing.assert_array_equal(labels, loader.file.labels[rows])
        assert loader.state_dict() == each.state_dict()


@every_loader
def test_a_state_goes_on_with_exactly_the_batches_that_are_left(open_loader, case):
    first, second, whole = open_loader(case), open_loader(case), open_loader(case)
    epochs = copied(itertools.chain(whole, whole, whole))
    for position in (0, 4, BATCHES, BATCHES + 2):
        first.set_epoch(0)
        for _ in itertools.islice(itertools.chain(first, first), position):
            pass
        state = json.loads(json.dumps(first.state_dict()))
        epoch, batch = divmod(position, BATCHES)
        assert (state["epoch"], state["position"]) == (epoch, batch * first.batch_size)
        left = epochs[position:][: BATCHES - position % BATCHES]
        for _ in range(2):
            second.load_state_dict(state)
            assert second.state_dict() == state
            assert_same_batches(second, left)
        first.load_state_dict(state)
        assert_same_batches(copied(first) + copied(first), left + copied(second))
        assert first.state_dict() == second.state_dict()


@every_loader
def test_a_copy_goes_on_with_the_same_batch(open_loader, case):
    loader = open_loader(case, seed=5, indices=range(50), drop_last=True)
    for _ in itertools.islice(loader, 2):
        pass
    loader.load_state_dict(loader.state_dict())
    with pickle.loads(pickle.dumps(loader)) as copy:
        assert copy.state_dict() == loader.state_dict()
        assert_same_batches(copied(copy) + copied(copy), copied(loader) + copied(loader))


@every_loader
def test_a_held_batch_never_changes(open_loader, case):
    loader = open_loader(case)
    held, copies = [], []
    for epoch in range(6):
        for number, (images, labels) in enumerate(loader):
            if (epoch + number) % 3 == 0:
                continue  # its memory may be reused between the batches that are held
            held.append((images, labels) if number % 2 else (images, labels.clone()))
            copies += copied([(images, labels)])
    assert len(held) > 2 * LEAST_KEPT
    assert_same_batches(held, copies)
    loader.close()
    assert_same_batches(held, copies)


@every_loader
def test_global_random_state_signal_handlers_and_thread_counts_are_left_alone(open_loader, case):
    def state():
        _, keys, position, *_ = np.random.get_state()
        generators = torch.get_rng_state().tolist(), keys.tolist(), position, random.getstate()
        handlers = [signal.getsignal(number) for number in signal.valid_signals()]
        return generators, handlers, torch.get_num_threads(), numba.get_num_threads()

    torch_threads, numba_threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        torch.set_num_threads(2)  # FFCV sets 1 at its import and its workers' number later
        before = state()
        loader = open_loader(case)
        assert state() == before
        for _ in loader:
            assert state() == before
        for _ in loader:
            break
        assert state() == before
    finally:
        torch.set_num_threads(torch_threads)
        numba.set_num_threads(numba_threads)


@every_loader
def test_a_closed_loader_is_not_iterated(open_loader, case):
    loader = open_loader(case)
    batches, chunks = iter(loader), loader.chunks()
    next(batches)
    next(chunks)
    loader.close()
    for begin in (lambda: iter(loader), loader.chunks, lambda: next(batches), lambda: next(chunks)):
        with pytest.raises(RuntimeError, match="closed"):
            begin()
    loader.close()  # once more does no harm


def settled(count, expected: int) -> int:
    """What `count` gives once it is no more than `expected`, or after a minute."""
    until = time.monotonic() + 60
    while count() > expected and time.monotonic() < until:
        time.sleep(0.02)
    return count()


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="only Linux lists open files there")
@with_workers
@pytest.mark.parametrize(
    ("name", "options", "rounds"),
    [
        ("ours", {"threads": 3}, 20),
        ("dataloader", {}, 10),
        ("dataloader", {"workers": 2}, 2),
        ("dataloader", {"workers": 2, "persistent_workers": True}, 2),
        ("tuned", {"workers": 0}, 10),
        ("tuned", {"workers": 2}, 3),
        ("tuned", {"workers": 2, "persistent_workers": False}, 2),
        ("tensors", {}, 10),
        pytest.param("ffcv", {}, 3, marks=FFCV_MARKS),
        pytest.param("ffcv", {"os_cache": False}, 2, marks=FFCV_MARKS),
    ],
)
def test_loops_left_early_leave_no_thread_process_or_open_file(path, name, options, rounds):
    def once(at: int, close: bool) -> None:
        loader = LOADERS[name](path, 10, device="cpu", **options)
        for stop in (1, at, BATCHES):
            for number, _ in enumerate(loader, 1):
                if number == stop:
                    break
        batches = iter(loader)
        next(batches)
        if close:
            loader.close()

    once(1, True)  # what starts but once: the workers' server, numba's threads
    gc.collect()
    time.sleep(0.2)  # for what ends by itself
    before, descriptors = set(threading.enumerate()), open_descriptors()
    for number in range(rounds):
        once(2 + 4 * number % 9, close=number % 2 == 0)  # also where FFCV's thread has nothing left to load
    gc.collect()  # what FFCV compiled holds its file
    assert settled(lambda: len(set(threading.enumerate()) - before), 0) == 0
    assert settled(lambda: len(multiprocessing.active_children()), 0) == 0
    assert settled(open_descriptors, descriptors) <= descriptors
