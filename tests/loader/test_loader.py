"""The Loader beyond the contract of all: its order, its memory, its states, its refusals."""

from __future__ import annotations

import itertools
import json
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmnist.beton.reader import Beton
from fastmnist.errors import ConfigError, DataError
from fastmnist.loader.loader import DTYPES, Loader
from fastmnist.loader.order import epoch_order
from tests.loader.batches import COUNT, SHAPE, assert_same_batches, copied, joined

pytestmark = pytest.mark.usefixtures("work_is_shared_among_threads")
SETTINGS = {
    "placement": st.sampled_from(["stream", "resident", "auto"]),
    "threads": st.integers(0, 4),
    "dtype": st.sampled_from(DTYPES),
}
ELSEWHERE = [("stream", 1), ("stream", 3), ("resident", 2)]  # (placement, threads)


# What an epoch holds


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_the_order_is_that_of_seed_and_epoch_alone(open_loader, samples, epoch):
    _, images, labels = samples
    expected = epoch_order(np.arange(COUNT), 5, epoch)
    for placement, threads in ELSEWHERE:
        for prefetch in (0, 4):
            loader = open_loader(seed=5, placement=placement, threads=threads, prefetch=prefetch)
            loader.set_epoch(epoch)
            found_images, found_labels = joined(loader)
            np.testing.assert_array_equal(found_images[:, 0], images[expected])
            np.testing.assert_array_equal(found_labels, labels[expected])


@pytest.mark.parametrize("options", [{"shuffle": False}, {"order": "sequential"}])
def test_sequential_is_the_order_of_the_file_each_time(open_loader, samples, options):
    loader = open_loader(**options)
    for _ in range(2):
        np.testing.assert_array_equal(joined(loader)[0][:, 0], samples[1])


def test_a_subset_does_not_follow_later_changes_of_the_callers_array(open_loader, samples):
    subset = np.arange(10, 20)
    loader = open_loader(indices=subset, shuffle=False)
    subset[:] = 3
    np.testing.assert_array_equal(joined(loader)[0][:, 0], samples[1][10:20])


# Where it stands


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor])
def test_integers_of_numpy_and_torch_become_plain_ones(open_loader, tmp_path, kind):
    loader = open_loader(kind(10), seed=kind(3), threads=kind(1), prefetch=kind(2), rank=kind(0), world_size=kind(1))
    loader.set_epoch(kind(2))
    state = loader.state_dict()
    assert json.loads(json.dumps(state)) == state
    torch.save(state, tmp_path / "state.pt")
    plain = open_loader(10, seed=3)
    plain.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same_batches(loader, plain)


@pytest.mark.parametrize("name", ["batch_size", "seed", "threads", "prefetch"])
@pytest.mark.parametrize("value", [2.0, np.float32(2), "2", None, -1])
def test_what_is_no_whole_number_is_refused_by_name(samples, name, value):
    with pytest.raises(ConfigError, match=name):
        Loader(samples[0], device="cpu", **{name: value})


@pytest.mark.parametrize("value", [2.0, np.float64(1), "1", -1])
def test_an_epoch_that_is_no_whole_number_is_refused(open_loader, value):
    loader = open_loader()
    before = loader.state_dict()
    with pytest.raises(ConfigError, match="epoch"):
        loader.set_epoch(value)
    assert loader.state_dict() == before


@pytest.mark.parametrize("finished", [False, True])
def test_a_loop_under_way_does_not_move_a_position_that_was_set(open_loader, finished):
    loader, same = open_loader(), open_loader()
    there = open_loader()
    there.set_epoch(5)
    elsewhere = there.state_dict()
    for set_position in (lambda: loader.set_epoch(5), lambda: loader.load_state_dict(elsewhere)):
        loader.set_epoch(0)
        same.set_epoch(0)
        batches = iter(loader)
        taken = copied(itertools.islice(batches, 3))
        set_position()
        assert loader.state_dict() == elsewhere
        taken += copied(batches if finished else itertools.islice(batches, 2))
        assert_same_batches(taken, copied(itertools.islice(same, len(taken))))
        assert loader.state_dict() == elsewhere
        there.set_epoch(5)
        assert_same_batches(copied(loader), copied(there))


def test_of_two_loops_the_later_one_moves_the_position(open_loader):
    loader = open_loader()
    first = iter(loader)
    next(first)
    second = iter(loader)
    next(second)
    list(first)
    assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (1, loader.batch_size)


@given(
    position=st.integers(0, 25),
    batch_size=st.sampled_from([9, 10, 103]),
    drop_last=st.booleans(),
    seed=st.integers(0, 99),
    order=st.sampled_from(["random", "sequential"]),
    here=st.sampled_from(ELSEWHERE),
    there=st.sampled_from(ELSEWHERE),
)
def test_a_state_taken_anywhere_goes_on_with_exactly_the_batches_that_are_left(
    samples, position, batch_size, drop_last, seed, order, here, there
):
    def make(placement: str, threads: int) -> Loader:
        options = {"drop_last": drop_last, "seed": seed, "order": order, "device": "cpu"}
        return Loader(samples[0], batch_size, placement=placement, threads=threads, **options)

    with make(*here) as first, make(*there) as second:
        epoch, within = divmod(position, len(first))
        first.set_epoch(epoch)
        batches = iter(first)
        for _ in range(within):
            next(batches)
        state = json.loads(json.dumps(first.state_dict()))
        left = copied(batches) + copied(first)
        second.load_state_dict(state)
        assert second.state_dict() == state
        assert_same_batches(copied(second) + copied(second), left)
        assert second.state_dict() == first.state_dict()


def test_a_state_taken_after_the_last_batch_begins_the_next_epoch(open_loader):
    loader = open_loader()
    states = [loader.state_dict() for _ in loader]  # the last of them is taken within the loop
    assert states[-1] == loader.state_dict()
    assert (states[-1]["epoch"], states[-1]["position"]) == (1, 0)
    other = open_loader()
    other.load_state_dict(states[-1])
    assert_same_batches(other, loader)


def test_a_state_after_a_loop_that_was_left_early_names_the_next_batch(open_loader):
    loader, other = open_loader(), open_loader()
    for _ in zip(range(4), loader, strict=False):
        pass
    handed_out = loader.state_dict()["position"] // loader.batch_size
    epoch = copied(open_loader())
    other.load_state_dict(loader.state_dict())
    assert_same_batches(other, epoch[handed_out:])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": 3}, ("seed 0", "3")),
        ({"shuffle": False}, ("random", "sequential")),
        ({"indices": range(50)}, ("samples 103", "50")),
    ],
)
def test_a_state_of_other_settings_is_refused_naming_both_values(open_loader, options, named):
    loader = open_loader(**options)
    before = loader.state_dict()
    with pytest.raises(DataError) as error:
        loader.load_state_dict(open_loader().state_dict())
    assert all(text in str(error.value) for text in named)
    assert loader.state_dict() == before


def test_a_state_of_another_subset_of_equal_length_is_refused(open_loader):
    with pytest.raises(DataError):
        open_loader(indices=range(10, 20)).load_state_dict(open_loader(indices=range(10)).state_dict())


def test_a_state_of_another_file_or_version_is_refused(tmp_path, open_loader, write_small_beton):
    write_small_beton(tmp_path / "other.beton", COUNT, SHAPE, seed=1)
    state = open_loader().state_dict()
    other = Loader(tmp_path / "other.beton", 10, device="cpu")
    with pytest.raises(DataError, match=f"file {state['file']}.*{other.file.fingerprint}"):
        other.load_state_dict(state)
    for wrong in ({}, state | {"version": 1}):
        with pytest.raises(DataError, match=f"version {wrong.get('version')}.* 2 "):
            open_loader().load_state_dict(wrong)


# The end


def test_use_after_close_is_an_error_and_reads_no_memory(samples, in_a_new_process):
    """In a process of its own, because reading memory that is gone may end it."""
    script = """
        import sys
        from fastmnist.beton.reader import Beton
        from fastmnist.loader.loader import Loader
        from fastmnist.errors import FastmnistError

        def epoch_that_had_not_begun():
            loader = Loader(sys.argv[1], 100, device="cpu")
            batches = iter(loader)
            loader.close()
            next(batches)

        def closed_file():
            file = Beton(sys.argv[1])
            file.close()
            list(Loader(file, 100, device="cpu"))

        def closed_file_resident():
            file = Beton(sys.argv[1])
            file.close()
            list(Loader(file, 100, device="cpu", placement="resident"))

        for use in (epoch_that_had_not_begun, closed_file, closed_file_resident):
            try:
                use()
                print(use.__name__, "gave a batch")
            except (RuntimeError, FastmnistError) as error:
                assert "closed" in str(error)
                print("refused")
    """
    assert in_a_new_process(script, samples[0]).splitlines() == ["refused"] * 3


def test_closing_a_loader_leaves_a_file_that_the_caller_opened(samples):
    path, images, _ = samples
    with Beton(path) as file:
        with Loader(file, 10, device="cpu", indices=range(50)) as first, Loader(file, 10, device="cpu") as second:
            first.close()
            assert len(joined(second)[0]) == COUNT
        np.testing.assert_array_equal(file.images(np.arange(COUNT))[..., 0], images)


# Settings


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"batch_size": -5},
        {"seed": -1},
        {"threads": -1},
        {"prefetch": -1},
        {"dtype": torch.float64},
        {"dtype": torch.int32},
        {"placement": "disk"},
        {"order": "backwards"},
        {"device": "toaster"},
        {"indices": []},
        {"indices": [0, COUNT]},
        {"indices": [-1]},
        {"indices": [[0, 1]]},
        {"indices": 3},
        {"indices": [0.5, 1.7]},
        {"indices": np.arange(COUNT) % 2 == 0},
    ],
    ids=lambda options: f"{next(iter(options))}={str(*options.values())[:12]}",
)
def test_a_setting_that_cannot_work_is_a_config_error(samples, options):
    with pytest.raises(ConfigError):
        Loader(samples[0], **{"batch_size": 10, "device": "cpu"} | options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_config_error(samples):
    with pytest.raises(ConfigError, match="cuda"):
        Loader(samples[0], device="cuda")


def test_a_file_that_cannot_be_used_is_a_data_error(tmp_path, samples):
    with pytest.raises(DataError, match=r"missing\.beton"):
        Loader(tmp_path / "missing.beton", device="cpu")
    content = bytearray(samples[0].read_bytes())
    content[-(2**20)] ^= 1  # within the page
    (tmp_path / "flipped.beton").write_bytes(content)
    with pytest.raises(DataError, match="page 0"):
        Loader(tmp_path / "flipped.beton", device="cpu", verify="full")
    Loader(tmp_path / "flipped.beton", device="cpu").close()


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("placement", "prefetch"), [("resident", 3), ("stream", 0), ("stream", 1), ("stream", 3)])
def test_a_gpu_gets_the_bytes_that_the_cpu_gets(tmp_path, write_small_beton, placement, prefetch, dtype, slow):
    """A slow consumer is one whose work on the device lags far behind the host, so that copies could overtake it."""
    write_small_beton(tmp_path / "a.beton", 4003, (28, 28))
    options = {"dtype": dtype, "seed": 4}
    with Loader(tmp_path / "a.beton", 64, device="cpu", **options) as loader:
        expected = copied(loader) + copied(loader)
    work = torch.ones(2048, 2048, device="cuda")
    held: deque = deque(maxlen=10)
    seen = []
    with Loader(tmp_path / "a.beton", 64, device="cuda", placement=placement, prefetch=prefetch, **options) as loader:
        for images, labels in itertools.chain(loader, loader):
            assert images.is_contiguous(memory_format=torch.channels_last)
            for _ in range(5 * slow):
                work @ work
            seen.append((images.clone(), labels.clone()))
            held.append((images, labels))
    assert_same_batches(seen, expected)
    assert_same_batches(held, expected[-10:])


@pytest.mark.gpu
def test_auto_keeps_a_small_file_on_the_gpu(samples):
    with Loader(samples[0], 10) as loader:
        assert (loader.device.type, loader.placement) == ("cuda", "resident")


def test_a_uint8_loader_asks_for_no_statistics(tmp_path, write_small_beton, monkeypatch):
    """For a file without ours they would take a pass over all of it."""
    write_small_beton(tmp_path / "a.beton", 20)

    def unwanted(self):
        raise AssertionError("the file's moments were asked for")

    monkeypatch.setattr(Beton, "moments", property(unwanted))
    assert len(list(Loader(tmp_path / "a.beton", 8, device="cpu"))) == 3
    with pytest.raises(AssertionError, match="moments"):
        Loader(tmp_path / "a.beton", 8, device="cpu", dtype=torch.float32)
