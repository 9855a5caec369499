"""How an epoch is dealt to several processes, and how a file larger than memory is shuffled."""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmnist.errors import ConfigError, DataError
from fastmnist.loader import host
from fastmnist.loader import loader as loader_module
from fastmnist.loader import order as order_module
from fastmnist.loader import windows as paging
from fastmnist.loader.kernels import gather
from fastmnist.loader.loader import Loader
from fastmnist.loader.order import EpochOrder, epoch_order, quasi_random_order
from fastmnist.system import machine
from fastmnist.system.machine import available_memory
from tests.loader.batches import joined


@pytest.fixture(scope="module")
def paged(tmp_path_factory: pytest.TempPathFactory, write_small_beton) -> Path:
    """1,000 images of 4x4 on 16 pages of 64."""
    path = tmp_path_factory.mktemp("paged") / "a.beton"
    write_small_beton(path, 1000, (4, 4), page_size=1024)
    return path


@given(count=st.integers(1, 200), world=st.integers(1, 9), seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_each_sample_goes_to_one_process(count: int, world: int, seed: int, epoch: int) -> None:
    for uneven in ("pad", "drop"):
        samples = np.arange(count)
        orders = [EpochOrder(samples, "random", seed, rank=r, world_size=world, uneven=uneven) for r in range(world)]
        parts = [order.plan(epoch).rows for order in orders]
        assert {len(part) for part in parts} == {len(orders[0])}
        times = Counter(np.concatenate(parts).tolist())
        if uneven == "pad":
            assert set(times) == set(range(count))
            assert sum(times.values()) - count == -count % world
            assert world > count or max(times.values()) <= 2
        else:
            assert not times or max(times.values()) == 1
            assert sum(times.values()) == count - count % world


def test_a_step_of_all_processes_is_a_step_of_one_with_the_larger_batch(paged: Path) -> None:
    whole = [set(labels_and_images(batch)) for batch in Loader(paged, 40, device="cpu", seed=3)]
    ranks = [Loader(paged, 10, device="cpu", seed=3, rank=rank, world_size=4) for rank in range(4)]
    assert {len(loader) for loader in ranks} == {25}
    together = [set().union(*(labels_and_images(batch) for batch in step)) for step in zip(*ranks, strict=True)]
    assert together == whole


def labels_and_images(batch: tuple[torch.Tensor, torch.Tensor]) -> list[bytes]:
    images, labels = batch
    return [bytes([int(label)]) + image.numpy().tobytes() for image, label in zip(images, labels, strict=True)]


def test_a_state_serves_every_rank(paged: Path) -> None:
    first = Loader(paged, 10, device="cpu", rank=0, world_size=4)
    for _ in zip(range(7), first, strict=False):
        pass
    other = Loader(paged, 10, device="cpu", rank=3, world_size=4)
    other.load_state_dict(first.state_dict())
    assert sum(1 for _ in other) == 18
    assert other.state_dict() == first.state_dict() | {"epoch": 1, "position": 0}


def take(loaders: list[Loader], batches: int) -> list[int]:
    """Rows of that many batches of each process; all processes are to get the same number of samples."""
    taken = [[chunk.rows.tolist() for chunk in itertools.islice(loader.chunks(), batches)] for loader in loaders]
    assert len({sum(map(len, rows)) for rows in taken}) == 1
    return [row for rows in taken for batch in rows for row in batch]


@given(
    worlds=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 80), st.integers(0, 12)), min_size=1, max_size=4),
    last=st.tuples(st.integers(1, 9), st.integers(1, 80)),
    order=st.sampled_from(["random", "quasi_random", "sequential"]),
    uneven=st.sampled_from(["pad", "drop"]),
    drop_last=st.booleans(),
    subset=st.booleans(),
    seed=st.integers(0, 9),
)
def test_an_epoch_continues_with_any_number_of_processes_and_any_batch_size(
    paged: Path, worlds, last, order, uneven, drop_last, subset, seed
) -> None:
    """Each sample once over all processes, cut where it may be; but for those that "pad" repeats and "drop" omits."""

    def processes(world: int, batch_size: int) -> list[Loader]:
        options = {"seed": seed, "order": order, "uneven": uneven, "drop_last": drop_last, "device": "cpu"}
        indices = range(0, 1000, 7) if subset else None
        return [Loader(paged, batch_size, rank=r, world_size=world, indices=indices, **options) for r in range(world)]

    rows: list[int] = []
    state = processes(1, 1)[0].state_dict()
    for world, batch_size, batches in worlds:
        loaders = processes(world, batch_size)
        for loader in loaders:
            loader.load_state_dict(state)
        taken = take(loaders, batches)
        states = [loader.state_dict() for loader in loaders]
        assert all(other == states[0] for other in states)
        if states[0]["epoch"]:  # the epoch ended here: as if it had not been cut
            break
        rows, state = rows + taken, json.loads(json.dumps(states[0]))
    world, batch_size = last
    loaders = processes(world, batch_size)
    for loader in loaders:
        loader.load_state_dict(state)
    rows += take(loaders, 2000)
    assert {loader.state_dict()["epoch"] for loader in loaders} == {1}
    samples = loaders[0].indices.tolist()
    times, left = Counter(rows), (len(samples) - state["position"]) % world
    assert set(times) <= set(samples)
    if not drop_last:
        assert sum(times.values()) == len(samples) + ((-left % world) if uneven == "pad" else -left)
    if uneven == "pad" and not drop_last:
        assert set(times) == set(samples)
        assert max(times.values()) <= (2 if world <= len(samples) else world)
    else:
        assert max(times.values(), default=1) <= (2 if uneven == "pad" else 1)
        assert len(samples) - len(times) < world * (batch_size if drop_last else 1) + world


def test_a_state_of_version_2_counts_batches(paged: Path) -> None:
    loader = Loader(paged, 10, device="cpu", rank=1, world_size=2)
    old = {name: value for name, value in loader.state_dict().items() if name != "position"}
    old |= {"version": 2, "batch": 3, "batch_size": 20, "world_size": 4, "drop_last": False, "uneven": "pad"}
    loader.load_state_dict(old)
    assert loader.state_dict()["position"] == 240
    spoiled = {"version": (1, 4), "batch": (None, 13, -1), "batch_size": ("20",)}
    for name, value in ((name, value) for name, values in spoiled.items() for value in values):
        with pytest.raises(DataError):
            loader.load_state_dict(old | {name: value})


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank 2 must be 0 to"),
        ({"rank": 1}, "come together"),
        ({"world_size": 2}, "come together"),
        ({"rank": 0, "world_size": 2000, "uneven": "drop"}, "cannot be dealt"),
        ({"uneven": "sometimes"}, "uneven 'sometimes' is none of pad, drop"),
        ({"order": "backwards"}, "order 'backwards' is none of auto, random"),
    ],
)
def test_what_cannot_be_dealt_is_refused(paged: Path, given_: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Loader(paged, 10, device="cpu", **given_)


ONE_OF_TWO = """
import json, sys
import torch
from fastmnist.loader.loader import Loader

rank, path, meeting = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
loader = Loader(path, 100, device="cpu")
print(json.dumps([loader.rank, loader.world_size, torch.cat([rows for _, _, rows in loader.chunks()]).tolist()]))
torch.distributed.destroy_process_group()
"""


def test_torch_distributed_is_asked(paged: Path, tmp_path: Path) -> None:
    arguments = [str(paged), str(tmp_path / "meeting")]
    processes = [
        subprocess.Popen([sys.executable, "-c", ONE_OF_TWO, str(rank), *arguments], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    answers = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert [(rank, world) for rank, world, _ in answers] == [(0, 2), (1, 2)]
    assert sorted(answers[0][2] + answers[1][2]) == list(range(1000))


@given(
    pages=st.lists(st.integers(0, 20), min_size=1, max_size=300),
    window=st.integers(1, 25),
    seed=st.integers(0, 99),
)
def test_quasi_random_is_a_permutation_that_keeps_to_its_window(pages: list[int], window: int, seed: int) -> None:
    order, windows = quasi_random_order(np.array(pages), seed, 0, window)
    assert sorted(order.tolist()) == list(range(len(pages)))
    visited = np.array(pages)[order]
    # Pages come in groups of `window`, each group whole before the next one begins.
    groups: list[set[int]] = [set()]
    for page in visited:
        if page not in groups[-1] and len(groups[-1]) == window:
            groups.append(set())
        groups[-1].add(int(page))
    assert sum(len(group) for group in groups) == len(set(pages))
    assert [set(w.pages.tolist()) for w in windows] == groups
    ends = [w.start for w in windows[1:]] + [len(pages)]
    assert windows[0].start == 0
    for w, end in zip(windows, ends, strict=True):
        assert set(visited[w.start : end].tolist()) == set(w.pages.tolist())


def test_quasi_random_with_few_pages_is_as_good_as_random() -> None:
    """Over many epochs a sample's place is uniform: chi-square of sample 0's place, 10 bins, 0.1 % mark."""
    pages = np.arange(100) // 10
    bins = Counter(int(np.flatnonzero(quasi_random_order(pages, 0, e)[0] == 0)[0]) // 10 for e in range(2000))
    assert sum((bins[b] - 200) ** 2 / 200 for b in range(10)) < 27.9


def test_quasi_random_epochs_differ_and_repeat() -> None:
    pages = np.arange(1000) // 10
    first, _ = quasi_random_order(pages, 1, 0, 8)
    assert np.array_equal(first, quasi_random_order(pages, 1, 0, 8)[0])
    assert not np.array_equal(first, quasi_random_order(pages, 1, 1, 8)[0])
    assert not np.array_equal(pages[first], pages[quasi_random_order(pages, 2, 0, 8)[0]])


def test_auto_is_quasi_random_only_where_memory_is_short(paged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Loader(paged, 64, device="cpu").order == "random"
    monkeypatch.setattr(loader_module, "available_memory", lambda: 1000)
    assert Loader(paged, 64, device="cpu").order == "quasi_random"
    assert Loader(paged, 64, device="cpu", shuffle=False).order == "sequential"
    assert Loader(paged, 64, device="cpu", placement="resident").order == "random"
    assert Loader(paged, 64, device="cpu", order="random").order == "random"


def test_available_memory_is_plausible() -> None:
    assert 2**20 < available_memory() < 2**50


def test_one_process_has_the_plain_order() -> None:
    assert np.array_equal(EpochOrder(np.arange(50), "random", 7).plan(3).rows, epoch_order(np.arange(50), 7, 3))


GROUPS = {
    "old": ("5:memory:/a/b\n0::/\n", "memory/a/b", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    "old, set around it": ("5:memory:/a/b\n", "memory/a", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    "new": ("0::/a/b\n", "a/b", "memory.max", "memory.current"),
    "in a container": ("0::/../../outside\n", "", "memory.max", "memory.current"),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_the_limit_of_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A container's memory is what its group may have, not what the machine has."""
    lines, folder, limit, usage = GROUPS[kind]
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "GROUPS_OF_THIS_PROCESS", tmp_path / "cgroup")
    whole = available_memory()
    (tmp_path / "cgroup").write_text(lines)
    assert available_memory() > 0.5 * whole
    group = tmp_path / "groups" / folder
    group.mkdir(parents=True)
    (group / limit).write_text("1000000\n")
    (group / usage).write_text("700000\n")
    (group / "memory.stat").write_text("cache 1\nactive_file 100000\ninactive_file 50000\n")
    assert available_memory() == 450_000
    (group / limit).write_text("max\n")
    assert available_memory() > 0.5 * whole


@given(
    window=st.integers(1, 20),
    batch_size=st.sampled_from([1, 7, 64, 1000]),
    epoch=st.integers(0, 3),
    first=st.integers(0, 5),
    subset=st.booleans(),
    ranks=st.integers(1, 3),
)
def test_windows_are_read_as_they_are_mapped(
    paged: Path, window: int, batch_size: int, epoch: int, first: int, subset: bool, ranks: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order_module, "WINDOW_PAGES", window)
        patch.setattr(loader_module, "PART_SAMPLES", 100)
        indices = np.arange(999, 200, -2) if subset else None
        options = {"indices": indices, "rank": ranks - 1, "world_size": ranks, "dtype": torch.uint8}
        with Loader(paged, batch_size, device="cpu", order="quasi_random", **options) as loader:
            batch = min(first, len(loader) - 1)
            loader.seek(epoch, batch)
            images, labels, rows = joined(loader.chunks())
            expected = EpochOrder(
                loader.indices, "quasi_random", 0, loader.file.offsets[loader.indices] // 1024, ranks - 1, ranks
            )
            assert np.array_equal(rows, expected.plan(epoch).rows[batch * batch_size :])
            assert np.array_equal(images.permute(0, 2, 3, 1), loader.file.images(rows.numpy()))
            assert np.array_equal(labels, loader.file.labels[rows])


def test_a_file_that_is_cut_within_an_epoch_is_an_error(paged: Path, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "cut.beton"
    path.write_bytes(paged.read_bytes())
    monkeypatch.setattr(order_module, "WINDOW_PAGES", 2)
    monkeypatch.setattr(loader_module, "PART_SAMPLES", 64)
    real, calls, cut = paging._read, itertools.count(), threading.Event()

    def read(*arguments: object) -> None:
        """Reads the first window at once, and later ones when the file is cut: a quick thread would be done by then."""
        assert not next(calls) or cut.wait(60)
        real(*arguments)

    monkeypatch.setattr(paging, "_read", read)
    with Loader(path, 64, device="cpu", order="quasi_random") as loader:
        batches = iter(loader)
        next(batches)
        os.truncate(path, 3000)
        cut.set()
        with pytest.raises(DataError, match=r"cut\.beton: ends at byte [0-9,]+ of 58,816"):
            list(batches)
        path.write_bytes(paged.read_bytes())
        assert len(list(loader)) == len(loader)


@pytest.mark.parametrize("first", [0, 3])
def test_a_window_is_not_read_over_while_helpers_still_gather_from_it(
    paged: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """Calls are given out ahead of what is gathered: here each waits, so that reading would overtake it."""
    threads = set()

    def late_gather(*arguments: object) -> None:
        threads.add(threading.current_thread().name)
        time.sleep(0.003)
        gather(*arguments)

    monkeypatch.setattr(host, "CALL_BYTES", 256)
    monkeypatch.setattr(host, "gather", late_gather)
    monkeypatch.setattr(loader_module, "PART_SAMPLES", 16)
    monkeypatch.setattr(order_module, "WINDOW_PAGES", 1)
    with Loader(paged, 16, device="cpu", order="quasi_random", threads=4) as loader:
        loader.seek(0, first)
        images, _, rows = joined(loader.chunks())
        assert len(threads) == 2  # this one and helpers
        assert np.array_equal(images.permute(0, 2, 3, 1), loader.file.images(rows.numpy()))


def test_a_resumed_epoch_reads_no_window_that_is_past(paged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = paging._read
    monkeypatch.setattr(paging, "_read", lambda file, pages, memory: read.extend(pages) or real(file, pages, memory))
    monkeypatch.setattr(order_module, "WINDOW_PAGES", 2)
    with Loader(paged, 64, device="cpu", order="quasi_random") as loader:
        loader.seek(0, len(loader) - 1)
        assert len(list(loader)) == 1
    assert 0 < len(read) <= 4  # of 16 pages
