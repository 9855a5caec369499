"""The baselines beyond the contract of all loaders: FFCV, worker processes, settings."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import time
from typing import get_args

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmnist.baselines.loaders import LOADERS, FFCVLoader, PlainDataLoader, TensorLoader, TunedDataLoader
from fastmnist.cli.main import main
from fastmnist.config import LoaderName
from fastmnist.errors import ConfigError, DataError
from fastmnist.loader.augment import Augmentation
from tests.loader.batches import FFCV_MARKS, MOVES, assert_epoch, assert_same_batches, copied, with_workers


@pytest.fixture
def open_loader(samples):
    """Makes loaders of that file on the CPU, closed when the test ends."""
    with contextlib.ExitStack() as stack:

        def make(kind: str, batch_size: int = 10, **options):
            return stack.enter_context(LOADERS[kind](samples[0], batch_size, **{"device": "cpu"} | options))

        yield make


# What an epoch holds


@pytest.mark.ffcv
@pytest.mark.filterwarnings("ignore")
def test_the_order_is_that_of_ffcv_by_itself(open_loader, samples):
    from ffcv.loader import Loader as TheirLoader
    from ffcv.loader import OrderOption

    theirs = TheirLoader(str(samples[0]), 10, num_workers=1, seed=4, order=OrderOption.RANDOM, drop_last=False)
    ours = open_loader("ffcv", seed=4)
    for _ in range(2):
        for (images, labels), (their_images, their_labels) in zip(ours, theirs, strict=True):
            assert torch.equal(images[:, 0], their_images)
            assert torch.equal(labels, their_labels[:, 0])


@pytest.mark.ffcv
@pytest.mark.filterwarnings("ignore")
def test_ffcv_loads_its_own_file_with_the_label_first_and_other_names(tmp_path, random_samples):
    from ffcv.fields import IntField, NDArrayField
    from ffcv.writer import DatasetWriter

    images, labels = random_samples(40)
    fields = {"class": IntField(), "picture": NDArrayField(np.dtype("u1"), (28, 28))}
    writer = DatasetWriter(str(tmp_path / "a.beton"), fields, num_workers=1)
    writer.from_indexed_dataset(list(zip(labels.tolist(), images, strict=True)))
    with FFCVLoader(tmp_path / "a.beton", 16, device="cpu") as loader:
        assert sorted(assert_epoch(loader, [16, 16, 8])) == list(range(40))


def test_a_notebooks_augmentation_is_torchvisions(open_loader):
    """With all strengths at 0 nothing moves; with others each epoch is another, and a run can be repeated."""
    still, plain = open_loader("dataloader", augment=Augmentation()), open_loader("dataloader")
    assert_same_batches(still, plain)
    first, second = (open_loader("dataloader", augment=MOVES, seed=1) for _ in range(2))
    epochs = [copied(first) for _ in range(2)]
    assert_same_batches(epochs[0] + epochs[1], list(second) + list(second))
    first.set_epoch(0)
    assert_same_batches(first, epochs[0])
    unmoved = copied(open_loader("dataloader", seed=1))
    assert [torch.equal(a[1], b[1]) for a, b in zip(epochs[0], unmoved, strict=True)] == [True] * 11
    moved = [not torch.equal(a[0], b[0]) for a, b in zip(epochs[0], unmoved, strict=True)]
    assert all(moved)


def test_a_shift_beyond_the_image_is_no_error(open_loader):
    assert len(list(open_loader("dataloader", augment=Augmentation(shift=50.0)))) == 11


# Where it stands


@pytest.mark.ffcv
@pytest.mark.filterwarnings("ignore")
def test_a_state_of_ffcvs_order_is_not_ours(open_loader):
    with pytest.raises(DataError, match="order ffcv random, this loader has random"):
        open_loader("ours").load_state_dict(open_loader("ffcv").state_dict())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dataloader", {"workers": 1, "prefetch_factor": 3, "persistent_workers": True, "augment": MOVES}),
        ("tuned", {"workers": 0, "prefetch_factor": 3, "persistent_workers": False, "pin_memory": True}),
        pytest.param(
            "ffcv", {"workers": 1, "batches_ahead": 2, "os_cache": False, "reuse_buffers": True}, marks=FFCV_MARKS
        ),
    ],
)
def test_a_copy_has_the_same_settings(open_loader, kind, options):
    loader = open_loader(kind, order="quasi_random", **options)
    with pickle.loads(pickle.dumps(loader)) as copy:
        assert copy._settings() == loader._settings()
    for name in options.keys() - {"pin_memory"}:  # which only a GPU has
        assert loader._settings()[name] == options[name]


# Memory, threads, processes


@pytest.mark.ffcv
@pytest.mark.filterwarnings("ignore")
def test_ffcvs_own_memory_is_valid_until_the_next_batch(open_loader):
    loader, copies = open_loader("ffcv", reuse_buffers=True), open_loader("ffcv")
    addresses = set()
    for (images, labels), (expected, targets) in zip(loader, copies, strict=True):
        time.sleep(0.01)  # for FFCV to be as far ahead as it gets
        assert torch.equal(images, expected)
        assert torch.equal(labels, targets)
        addresses.add(images.data_ptr())
    assert len(addresses) <= 5  # batches_ahead + 2


@pytest.mark.ffcv
@pytest.mark.filterwarnings("ignore")
def test_an_error_in_ffcvs_thread_is_one_here_and_no_hang(open_loader, monkeypatch):
    loader = open_loader("ffcv")
    context = loader._loader.memory_manager.context
    monkeypatch.setattr(context, "start_batch", lambda number: 1 / 0 if number == 2 else None)
    handed_out = []
    with pytest.raises(RuntimeError, match="FFCV's thread ended by an error"):
        handed_out.extend(loader)
    assert len(handed_out) == 2
    assert loader.state_dict()["position"] == 2 * loader.batch_size


@pytest.mark.ffcv
def test_after_ffcv_numba_compiles_what_writes_to_arrays(samples, in_a_new_process, tmp_path, monkeypatch):
    """FFCV makes numba's types of arrays read-only for the whole process."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))  # empty: all is compiled
    script = """
        import sys, warnings
        import numpy as np, torch
        from fastmnist.loader.augment import Augmentation
        from fastmnist.baselines.loaders import FFCVLoader
        from fastmnist.prepare.deform import Deformer
        from fastmnist.loader.loader import Loader

        warnings.simplefilter("ignore")
        path, os_cache = sys.argv[1], True
        ours = Loader(path, 10, device="cpu", dtype=torch.float32, augment=Augmentation(1.0), threads=1)
        with FFCVLoader(path, 9, device="cpu", os_cache=os_cache) as loader, ours:
            count, file = len(loader.file), loader.file
            for _ in range(3):  # in turn, as training and validation are
                assert sum(len(labels) for _, labels in loader) == count
                assert sum(len(labels) for _, labels in ours) == count
            assert sum(len(labels) for _, labels in loader) == count
            Deformer(file.data, file.offsets, file.image_shape, 0)(0, np.empty((5, file.image_size), np.uint8))
            list(Loader(file, 8, device="cpu", placement="resident", dtype=torch.bfloat16))
            with FFCVLoader(path, 8, device="cpu", os_cache=not os_cache) as another:
                assert sum(len(labels) for _, labels in another) == count
        print("compiled")
    """
    assert in_a_new_process(script, samples[0]) == "compiled\n"


@pytest.mark.ffcv
@pytest.mark.filterwarnings("ignore")
def test_a_program_that_ends_within_an_epoch_of_ffcv_ends(samples, in_a_new_process):
    script = """
        import sys
        from fastmnist.baselines.loaders import FFCVLoader
        batches = iter(FFCVLoader(sys.argv[1], 10, device="cpu"))
        print(len(next(batches)[1]))
    """
    assert in_a_new_process(script, samples[0]).split() == ["10"]


def test_the_other_loaders_are_imported_without_ffcv(in_a_new_process):
    script = """
        import sys
        from fastmnist.baselines.loaders import LOADERS, FFCVLoader
        assert LOADERS["ffcv"] is FFCVLoader
        print("ffcv" in sys.modules)
    """
    assert in_a_new_process(script) == "False\n"


# Workers


@with_workers
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dataloader", {}),
        ("dataloader", {"augment": MOVES, "prefetch_factor": 1, "pin_memory": True}),
        ("dataloader", {"augment": MOVES, "persistent_workers": True}),
        ("tuned", {}),
        ("tuned", {"persistent_workers": False, "prefetch_factor": 4, "pin_memory": True}),
    ],
)
def test_workers_hand_out_the_same_batches(open_loader, kind, options):
    """Without workers most of these settings have no effect: what is left is the same order and the same bits."""
    loader = open_loader(kind, workers=2, seed=6, **options)
    alone = open_loader(kind, workers=0, seed=6, **options)
    for _ in range(2):
        assert_same_batches(loader, alone)
    loader.set_epoch(7)
    for _ in itertools.islice(loader, 3):
        pass
    state = loader.state_dict()
    assert (state["epoch"], state["position"]) == (7, 3 * loader.batch_size)
    loader.load_state_dict(state)
    alone.load_state_dict(state)
    assert_same_batches(loader, alone)


@with_workers
@pytest.mark.parametrize("kind", ["dataloader", "tuned"])
def test_persistent_workers_stay_serve_one_epoch_at_a_time_and_do_not_heed_ctrl_c(open_loader, kind):
    loader = open_loader(kind, workers=2, prefetch_factor=1, persistent_workers=True)
    alone = open_loader(kind, workers=0)
    batches, expected = iter(loader), copied(alone)
    found = [next(batches), next(batches)]  # one of each: both have begun
    workers = {process.pid for process in multiprocessing.active_children()}
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGINT)  # as a terminal does to the whole group
    assert_same_batches(found + list(batches), expected)
    left = iter(loader)
    next(left)
    assert_same_batches(loader, copied(alone) and copied(alone))  # the epoch after the one that was left
    with pytest.raises(RuntimeError, match="a later epoch"):
        next(left)
    assert {process.pid for process in multiprocessing.active_children()} == workers
    loader.close()
    assert not multiprocessing.active_children()


@with_workers
@pytest.mark.parametrize("kind", ["dataloader", "tuned"])
def test_other_workers_are_begun_anew_and_epochs_may_overlap(open_loader, kind):
    loader = open_loader(kind, workers=1, prefetch_factor=1, persistent_workers=False)
    first, second = iter(loader), iter(loader)
    found = [(next(first), next(second)) for _ in range(len(loader) - 1)]
    assert len(multiprocessing.active_children()) == 2
    found.append((next(first), next(second)))
    for batches in (first, second):
        assert next(batches, None) is None
    assert not multiprocessing.active_children()
    alone = open_loader(kind, workers=0)
    for epoch in zip(*found, strict=True):
        assert_same_batches(epoch, alone)


@with_workers
@pytest.mark.parametrize("kind", ["dataloader", "tuned"])
def test_an_error_in_a_worker_arrives_with_its_traceback(open_loader, kind):
    loader = open_loader(kind, workers=2)
    dataset = loader._loader.dataset
    if kind == "dataloader":
        dataset.targets = dataset.targets[:20]
    else:
        dataset.labels = dataset.labels[:20]
    with pytest.raises(IndexError, match=r"(?s)in DataLoader worker process.*Traceback.*(workers|mnist)\.py") as error:
        list(loader)
    loader.close()
    assert not multiprocessing.active_children()  # though the error, and its traceback with it, is still held
    assert error.value.__traceback__ is not None


@with_workers
def test_a_worker_that_is_killed_is_an_error_in_time(open_loader, monkeypatch):
    monkeypatch.setattr("fastmnist.baselines.workers.LONGEST_WAIT", 10)
    loader = open_loader("tuned", workers=2)
    batches = iter(loader)
    next(batches)
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises((RuntimeError, OSError, EOFError)):  # as it was waiting, or was being sent a batch
        list(batches)
    loader.close()
    assert not multiprocessing.active_children()


@with_workers
def test_how_many_workers_are_tuned(open_loader, monkeypatch):
    for cores, workers in ((1, 0), (2, 0), (3, 3), (16, 4)):
        monkeypatch.setattr("fastmnist.baselines.dataloaders.cpu_count", lambda cores=cores: cores)
        assert open_loader("tuned").workers == workers


# Settings


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("dataloader", {"workers": -1}, "workers -1"),
        ("tuned", {"workers": -1}, "workers -1"),
        ("dataloader", {"prefetch_factor": 0}, "prefetch_factor 0"),
        ("tuned", {"prefetch_factor": 0}, "prefetch_factor 0"),
        ("tuned", {"augment": MOVES}, "float dtype"),
        ("tensors", {"augment": MOVES}, "float dtype"),
        ("tensors", {"batch_size": 0}, "batch_size 0"),
        pytest.param("ffcv", {"workers": 0}, "workers 0", marks=FFCV_MARKS),
        pytest.param("ffcv", {"workers": numba.config.NUMBA_NUM_THREADS + 1}, "workers", marks=FFCV_MARKS),
        pytest.param("ffcv", {"batches_ahead": 0}, "batches_ahead 0", marks=FFCV_MARKS),
        pytest.param("ffcv", {"augment": MOVES}, "float dtype", marks=FFCV_MARKS),
        pytest.param("ffcv", {"rank": 1, "world_size": 2}, "world_size of 2", marks=FFCV_MARKS),
    ],
)
def test_a_setting_that_cannot_work_is_a_config_error(open_loader, kind, options, said):
    with pytest.raises(ConfigError, match=said):
        open_loader(kind, **options)


def test_images_that_pil_has_not_are_refused(tmp_path, write_small_beton):
    write_small_beton(tmp_path / "a.beton", 5, (4, 4, 2))
    with pytest.raises(ConfigError, match="no images of 2 channels"):
        PlainDataLoader(tmp_path / "a.beton", device="cpu")
    for kind in (TunedDataLoader, TensorLoader):
        with kind(tmp_path / "a.beton", 5, device="cpu") as loader:
            assert_epoch(loader, [5])


def test_without_ffcv_it_is_said_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ffcv", None)
    out = tmp_path / "run"
    assert main(["train", "--dataset", "digits", "--loader", "ffcv", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    for words in (
        "apt-get install libopencv-dev libturbojpeg0-dev pkg-config",
        "pip install '.[ffcv]'",
        "Debian and Ubuntu",
        "Colab",
    ):
        assert words in said
    assert not out.exists()


def test_the_loaders_of_the_command_line_are_these():
    assert set(get_args(LoaderName)) == set(LOADERS)


# On a GPU


@pytest.mark.gpu
@with_workers
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dataloader", {}),
        ("tuned", {"workers": 0}),
        ("dataloader", {"pin_memory": True}),
        ("dataloader", {"pin_memory": True, "workers": 2, "persistent_workers": True}),
        ("tuned", {"workers": 2}),
        ("tuned", {"workers": 2, "persistent_workers": False, "pin_memory": False}),
        ("tensors", {}),
        pytest.param("ffcv", {}, marks=FFCV_MARKS),
        pytest.param("ffcv", {"reuse_buffers": True}, marks=FFCV_MARKS),
    ],
)
@settings(max_examples=3)
@given(batch_size=st.integers(5, 40))
def test_a_gpu_gets_the_bytes_that_the_cpu_gets(samples, kind, options, batch_size):
    work = torch.ones(2048, 2048, device="cuda")
    seen = []
    with LOADERS[kind](samples[0], batch_size, device="cuda", **options) as loader:
        assert loader.device.type == "cuda"
        for images, labels in itertools.chain(loader, loader):
            assert images.is_contiguous(memory_format=torch.channels_last)
            for _ in range(5):
                work @ work  # copies could overtake a consumer whose work lags behind the host
            seen.append((images.clone(), labels.clone()))
    with LOADERS[kind](samples[0], batch_size, device="cpu", **options) as loader:
        assert_same_batches(seen, copied(loader) + copied(loader))
