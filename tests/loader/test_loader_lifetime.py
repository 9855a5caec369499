"""The loader's surroundings: files that change under it, other processes and threads, thousands of epochs."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmnist.beton.reader import Beton
from fastmnist.errors import DataError
from fastmnist.loader import host
from fastmnist.loader.augment import Augmentation
from fastmnist.loader.helpers import NAME
from fastmnist.loader.kernels import gather
from fastmnist.loader.loader import Loader
from tests.loader.batches import joined

COUNT = 300
KINDS = [
    {},
    {"placement": "resident"},
    {"threads": 3},
    {"dtype": torch.float32, "augment": Augmentation(2.0, 8.0, 0.1), "threads": 2},
]


@pytest.fixture(autouse=True)
def work_is_shared_among_threads(monkeypatch):
    """Otherwise batches this small are gathered by one thread, whatever is asked for."""
    monkeypatch.setattr(host, "CALL_BYTES", 512)


@pytest.fixture
def path(tmp_path, write_small_beton) -> Path:
    write_small_beton(tmp_path / "a.beton", COUNT, (6, 5))
    return tmp_path / "a.beton"


def assert_same(found, expected) -> None:
    for one, other in zip(joined(found), joined(expected), strict=True):
        assert torch.equal(one, other)


# The file


def delete(path, write):
    path.unlink()


def replace(path, write):
    write(path.with_name("b.beton"), COUNT, (6, 5), seed=1)
    os.replace(path.with_name("b.beton"), path)


def cut(path, write):
    os.truncate(path, path.stat().st_size // 2)


def empty(path, write):
    os.truncate(path, 0)


def grow(path, write):
    with open(path, "ab") as file:
        file.write(b"more")


def rewrite_in_place(path, write):
    write(path.with_name("b.beton"), COUNT, (6, 5), seed=1)
    path.write_bytes(path.with_name("b.beton").read_bytes())


def rewrite_a_pixel(path, write):
    with open(path, "r+b") as file:
        file.seek(int(Beton(path).offsets[7]))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(1, 1))  # the clock of a file system may stand still for some milliseconds


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (delete, "was deleted"),
        (replace, "was replaced by another file"),
        (cut, "had [0-9,]+ bytes when it was opened and has"),
        (empty, "has 0 now"),
        (grow, "had [0-9,]+ bytes"),
        (rewrite_in_place, "was written to"),
        (rewrite_a_pixel, "was written to"),
    ],
)
def test_a_file_that_changes_while_it_is_open_is_an_error_before_the_next_epoch(path, write_small_beton, change, told):
    with Loader(path, 32, device="cpu") as loader, Loader(path, 32, device="cpu", placement="resident") as resident:
        before = list(resident)
        list(loader)
        os.utime(path)  # touched, no more
        list(loader)
        state = loader.state_dict()
        change(path, write_small_beton)
        for use in (lambda: next(iter(loader)), lambda: loader.file.images(np.arange(3)), loader.file.verify_content):
            with pytest.raises(DataError, match=told) as error:
                use()
            assert str(path) in str(error.value)
        assert loader.state_dict() == state  # nothing is lost
        resident.set_epoch(0)
        assert_same(resident, before)  # a copy needs no file


def test_a_file_is_found_again_from_another_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Loader(path.name, 32, device="cpu") as loader:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert len(list(loader)) == len(loader)


def test_a_cut_file_kills_no_process(path, in_a_new_process):
    """A read beyond the end of a mapped file is a SIGBUS, which no exception handler sees."""
    script = """
        import os, sys
        from fastmnist.loader.loader import Loader
        from fastmnist.errors import DataError

        loader = Loader(sys.argv[1], 32, device="cpu")
        os.truncate(sys.argv[1], 4096)
        try:
            list(loader)
        except DataError as error:
            print("refused:", error)
    """
    assert in_a_new_process(script, path).startswith("refused:")


# Other processes


@pytest.mark.parametrize("options", KINDS)
def test_a_pickled_loader_opens_the_file_itself_and_goes_on(path, options):
    with Loader(path, 32, device="cpu", seed=4, indices=range(10, 250), **options) as loader:
        batches = iter(loader)
        next(batches)
        content = pickle.dumps(loader)
        assert len(content) < 4000 + 8 * 240  # the path, the settings and the subset, not the map
        with pickle.loads(content) as copy:
            assert copy.state_dict() == loader.state_dict()
            assert copy.file is not loader.file
            assert_same(itertools.chain(copy, copy), itertools.chain(batches, loader))


def test_a_pickled_loader_refuses_another_file(path, write_small_beton):
    with Loader(path, 32, device="cpu") as loader:
        content, fingerprint = pickle.dumps(loader), loader.file.fingerprint
    write_small_beton(path, COUNT, (6, 5), seed=9)
    with pytest.raises(DataError, match=fingerprint):
        pickle.loads(content)


def test_a_closed_loader_or_file_is_not_pickled(path):
    with Loader(path, 32, device="cpu") as loader:
        pass
    for closed in (loader, loader.file):
        with pytest.raises(RuntimeError, match="closed"):
            pickle.dumps(closed)


def test_copies_that_travelled_together_close_a_file_each(path):
    with Loader(path, 32, device="cpu") as train, Loader(train.file, 50, device="cpu") as test:
        train_copy, test_copy = pickle.loads(pickle.dumps((train, test)))
        train_copy.close()
        with test_copy:
            assert_same(test_copy, test)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_closing_a_copy_leaves_the_original_open(path, duplicate):
    with Loader(path, 32, device="cpu") as loader:
        expected = list(loader)
        duplicate(loader).close()
        loader.set_epoch(0)
        assert_same(loader, expected)


def sums(batches) -> list[int]:
    return [int(images.double().sum()) for images, _ in batches]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("options", KINDS)
def test_a_forked_child_gets_the_batches_that_the_parent_would(path, options):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with Loader(path, 32, device="cpu", **options) as loader:
        batches = iter(loader)
        next(batches)  # helpers have begun; the child has none of them
        work = lambda: queue.put(sums(itertools.chain(batches, loader)))  # noqa: E731  # a fork needs no import
        child = context.Process(target=work, daemon=True)
        child.start()
        found = queue.get(timeout=60)
        child.join(60)
        assert child.exitcode == 0
        assert found == sums(itertools.chain(batches, loader))


WITHOUT_FORK = """
import multiprocessing, sys
import torch
from fastmnist.loader.augment import Augmentation
from fastmnist.loader.loader import Loader

def sums(loader):
    return [int(images.double().sum()) for images, _ in loader]

if __name__ == "__main__":
    kinds = {}, {"placement": "resident"}, {"dtype": torch.float32, "augment": Augmentation(2.0), "threads": 2}
    loaders = [Loader(sys.argv[1], 32, device="cpu", **options) for options in kinds]
    for epoch, way in enumerate(("spawn", "forkserver"), 1):
        for loader in loaders:
            loader.set_epoch(epoch)
        with multiprocessing.get_context(way).Pool(1) as pool:
            found = pool.map_async(sums, loaders).get(100)
        assert found == [sums(loader) for loader in loaders]
    print("same")
"""


def test_a_child_that_was_not_forked_gets_the_batches_that_the_parent_would(path, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_FORK)
    done = subprocess.run([sys.executable, str(script), str(path)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "same\n", done.stderr


# Threads


def in_a_thread(work):
    """The exception that `work` raises in a thread of its own, or None."""
    raised = []

    def run():
        try:
            work()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return raised[0] if raised else None


def test_two_threads_in_one_epoch_are_a_clear_error_and_the_first_loses_nothing(path):
    with Loader(path, 32, device="cpu") as loader, Loader(path, 32, device="cpu") as same:
        batches = iter(loader)
        taken = [next(batches)]
        for use in (lambda: next(batches), lambda: list(loader)):
            error = in_a_thread(use)
            assert isinstance(error, RuntimeError)
            assert "another thread" in str(error)
        assert_same([*taken, *batches], same)
        assert in_a_thread(lambda: list(loader)) is None  # the epoch is over


def test_an_epoch_that_was_left_may_be_followed_in_another_thread(path):
    with Loader(path, 32, device="cpu") as loader:
        for _ in loader:
            break
        assert in_a_thread(lambda: list(loader)) is None
        batches = iter(loader)  # begun here, first asked for there
        assert in_a_thread(lambda: list(batches)) is None


def test_an_epoch_may_be_finished_by_another_thread_once_the_first_one_is_dead(path):
    with Loader(path, 32, device="cpu") as loader, Loader(path, 32, device="cpu") as same:
        batches = iter(loader)
        taken = []
        assert in_a_thread(lambda: taken.append(next(batches))) is None
        assert_same([*taken, *batches], same)
        batches = iter(loader)
        assert in_a_thread(lambda: next(batches)) is None
        assert len(list(loader)) == len(loader)


def test_an_error_in_a_helper_arrives_with_its_traceback(path, monkeypatch):
    broken, begun = threading.Event(), threading.Event()

    def broken_in_a_helper(*arguments):
        if broken.is_set():
            if threading.current_thread().name == NAME:
                begun.set()
                raise ZeroDivisionError("a planted error")
            begun.wait(60)
        return gather(*arguments)

    monkeypatch.setattr(host, "gather", broken_in_a_helper)
    with Loader(path, 32, device="cpu", threads=3) as loader:
        expected = list(loader)
        broken.set()
        with pytest.raises(ZeroDivisionError, match="planted") as error:
            list(loader)
        assert "broken_in_a_helper" in "".join(traceback.format_tb(error.value.__traceback__))
        broken.clear()
        loader.set_epoch(0)
        assert_same(loader, expected)


def test_a_process_may_end_in_the_middle_of_an_epoch(path, tmp_path, in_a_new_process, monkeypatch):
    """A helper that is caught in a kernel, or in its compiler, by the interpreter's end would abort the process."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "numba"))
    script = """
        import sys
        from fastmnist.loader import host
        from fastmnist.loader.loader import Loader

        host.CALL_BYTES = 512
        loader = Loader(sys.argv[1], 32, device="cpu", threads=3)
        batches = iter(loader)
        next(batches)
        print("ends")
    """
    for _ in range(3):  # compiled in the first, read from the cache in the others
        assert in_a_new_process(script, path) == "ends\n"


# A thousand epochs


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells a process's memory there")
@pytest.mark.parametrize("options", KINDS)
def test_a_thousand_epochs_left_early_leave_nothing(tmp_path, write_small_beton, options):
    write_small_beton(tmp_path / "a.beton", 5000)
    page = os.sysconf("SC_PAGE_SIZE")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    def counts() -> tuple[int, int]:
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    with Loader(tmp_path / "a.beton", 512, device="cpu", **options) as loader:

        def epochs(count: int) -> None:
            for _ in range(count):
                for _ in loader:
                    break

        epochs(100)
        gc.collect()  # what earlier tests left
        memory, (threads_before, descriptors_before) = resident(), counts()
        epochs(1000)
        threads_after, descriptors_after = counts()
        assert threads_after <= threads_before
        assert descriptors_after <= descriptors_before
        # The pool keeps at most 16 times 1.6 MB; a leak of one batch of bytes an epoch would be 400 MB.
        assert resident() - memory < 28 << 20


def test_a_beton_gives_back_its_descriptor(path):
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else None
    for _ in range(5):
        Beton(path).close()
        Beton(path)
        with contextlib.suppress(DataError):
            shutil.copy(path, path.with_name("b"))
            os.truncate(path.with_name("b"), 5000)
            Beton(path.with_name("b"))
    if before is not None:
        assert len(list(Path("/proc/self/fd").iterdir())) == before
