"""The other ways to load: the same samples, batch by batch, as the loader that they are compared with."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import get_args

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmnist.baselines.loaders import LOADERS, FFCVLoader, PlainDataLoader, TensorLoader, TunedDataLoader
from fastmnist.cli.main import main
from fastmnist.config import LoaderName, TrainConfig
from fastmnist.errors import ConfigError, DataError
from fastmnist.loader.augment import Augmentation
from fastmnist.loader.loader import Loader
from fastmnist.runs.train import train
from fastmnist.system.progress import Reporter
from fastmnist.training.loop import Trainer
from fastmnist.training.session import Session, loader_arguments
from tests.loader.batches import assert_epoch, assert_same_batches, copied

COUNT, SHAPE = 103, (6, 5)
MOVES = Augmentation(1.0, 20.0, 0.1)

# FFCV 1.0 of 2023 warns at every import.
FFCV = pytest.param("ffcv", marks=[pytest.mark.ffcv, pytest.mark.filterwarnings("ignore")])
OTHERS = ["dataloader", "tuned", "tensors", FFCV]
EVERY = ["ours", *OTHERS]
# On a machine of one core DataLoader advises against two workers.
with_workers = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def samples(scratch, write_small_beton):
    """(path, images, labels) of one file of two pages for all tests that need no other."""
    path = scratch() / "samples.beton"
    return path, *write_small_beton(path, COUNT, SHAPE, page_size=2048)


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
            "ffcv", {"workers": 1, "batches_ahead": 2, "os_cache": False, "reuse_buffers": True}, marks=FFCV.marks
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
    assert loader.state_dict()["batch"] == 2


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
    assert (state["epoch"], state["batch"]) == (7, 3)
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
        pytest.param("ffcv", {"workers": 0}, "workers 0", marks=FFCV.marks),
        pytest.param("ffcv", {"workers": numba.config.NUMBA_NUM_THREADS + 1}, "workers", marks=FFCV.marks),
        pytest.param("ffcv", {"batches_ahead": 0}, "batches_ahead 0", marks=FFCV.marks),
        pytest.param("ffcv", {"augment": MOVES}, "float dtype", marks=FFCV.marks),
        pytest.param("ffcv", {"rank": 1, "world_size": 2}, "world_size of 2", marks=FFCV.marks),
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
        "pip install 'fastmnist[ffcv]'",
        "Debian and Ubuntu",
        "Colab",
    ):
        assert words in said
    assert not out.exists()


def test_the_loaders_of_the_command_line_are_these():
    assert set(get_args(LoaderName)) == set(LOADERS)


# Whole runs


@pytest.fixture
def run_settings(tmp_path: Path) -> dict:
    return {
        "dataset": "digits",
        "model": "small-cnn",
        "epochs": 2,
        "batch_size": 64,
        "quiet": True,
        "out": str(tmp_path / "run"),
    }


@pytest.fixture
def make_trainer(run_settings):
    """A small model with the loader that the command line would give it, and the run's data; closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(kind: str, **changed) -> Trainer:
            config = TrainConfig(**run_settings | {"loader": kind, "amp": "off"} | changed)
            session = stack.enter_context(Session(config, Reporter(quiet=True)))
            assert type(session.loaders.train) is LOADERS[kind]
            assert type(session.loaders.validation) is type(session.loaders.test) is Loader
            return session.trainer

        yield make


def weights(trainer: Trainer) -> list[float]:
    return torch.cat([tensor.flatten().double() for tensor in trainer.model.state_dict().values()]).tolist()


@pytest.mark.parametrize("kind", EVERY)
def test_training_through_each_learns_and_goes_on_where_it_stopped(make_trainer, kind):
    whole = make_trainer(kind)
    whole.warm_up()
    first, second = whole.run_epoch(), whole.run_epoch()
    assert second["train_loss"] < first["train_loss"] < 3
    if kind in ("tuned", "tensors"):  # the same batches, augmented on the device: the same bits
        ours = make_trainer("ours")
        assert [ours.run_epoch()["train_loss"] for _ in range(2)] == [first["train_loss"], second["train_loss"]]
        assert weights(ours) == weights(whole)
    stopped, resumed = make_trainer(kind), make_trainer(kind)
    stopped.run_epoch()
    assert stopped.run_epoch(stop=lambda: stopped.step == 27) is None
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.run_epoch()["train_loss"] == second["train_loss"]
    assert weights(resumed) == weights(whole)


@pytest.mark.parametrize("kind", ["ours", "tuned", "tensors", FFCV])
def test_the_trainer_moves_each_sample_by_its_own_draw_of_the_epoch(make_trainer, kind):
    trainer, loaded = make_trainer(kind), []
    load = trainer.load
    trainer.load = lambda *batch: loaded.append(copied([batch[:3]])[0]) or load(*batch)
    trainer.run_epoch()
    trainer.run_epoch()
    file, moves = trainer.loader.file, trainer.augmentation
    rows_of = defaultdict(list)
    for row, image in enumerate(file.images(np.arange(len(file)))):
        rows_of[image.tobytes()].append(row)
    for epoch in range(2):
        matrices = torch.from_numpy(moves.matrices(moves.draw(len(file), 0, epoch), file.image_shape[:2]))
        for images, labels, transforms in loaded[epoch * len(trainer.loader) :][: len(trainer.loader)]:
            for image, label, transform in zip(images, labels, transforms, strict=True):
                rows = rows_of[image.numpy().tobytes()]  # some images of the digits are there twice
                assert any(torch.equal(matrices[row], transform) and file.labels[row] == label for row in rows)


@pytest.mark.parametrize("augment", [True, False])
def test_a_notebooks_loader_augments_and_the_trainer_does_not_again(make_trainer, augment):
    moves = Augmentation(2.0, 8.0, 0.08) if augment else None
    notebooks, tensors = (make_trainer(kind, augment=augment) for kind in ("dataloader", "tensors"))
    assert (notebooks.loader.augment, notebooks.augmentation) == (moves, None)
    assert (tensors.loader.augment, tensors.augmentation) == (None, moves)


def test_a_runs_loader_is_in_its_summary_and_stays_when_it_is_resumed(run_settings, monkeypatch, capsys):
    inner = Trainer.train_step

    def train_step(self: Trainer, *arguments) -> None:
        inner(self, *arguments)
        if self.step == 7:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        stopped = train(TrainConfig(**run_settings | {"loader": "dataloader"}))
    assert (stopped.summary["loader"], stopped.summary["steps"]) == ("dataloader", 7)
    assert main(["train", "--resume", str(stopped.folder), "--loader", "tensors"]) == 2
    assert "--loader dataloader, the command line has tensors" in capsys.readouterr().err
    assert main(["train", "--resume", str(stopped.folder), "--loader", "dataloader"]) == 0


OF_A_DATALOADER = {"workers": 1, "prefetch_factor": 4, "order": "quasi_random"}
OF_OURS = {"placement": "resident", "threads": 1, "order": "quasi_random"}
OF_FFCV = {"workers": 1, "batches_ahead": 2, "os_cache": False, "order": "quasi_random"}


@with_workers
@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("ours", OF_OURS),
        ("dataloader", OF_A_DATALOADER | {"persistent_workers": True}),
        ("tuned", OF_A_DATALOADER | {"persistent_workers": False}),
        ("tensors", {"order": "quasi_random"}),
        pytest.param("ffcv", OF_FFCV, marks=FFCV.marks),
    ],
)
def test_each_loader_takes_its_settings(make_trainer, samples, kind, own):
    loader = make_trainer(kind, **own).loader
    assert {name: getattr(loader, name) for name in own} == own
    default = TrainConfig(loader=kind, augment=False)
    with (
        LOADERS[kind](samples[0], device="cpu") as plain,
        LOADERS[kind](samples[0], device="cpu", **loader_arguments(default)) as configured,
    ):
        assert configured._settings() == plain._settings()


@pytest.mark.parametrize("kind", EVERY)
def test_a_quasi_random_run_has_its_own_order_and_goes_on_in_it(make_trainer, kind):
    whole, stopped, resumed = (make_trainer(kind, order="quasi_random") for _ in range(3))
    losses = [whole.run_epoch()["train_loss"] for _ in range(2)]
    stopped.run_epoch()
    assert stopped.run_epoch(stop=lambda: stopped.step == 27) is None
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.run_epoch()["train_loss"] == losses[1]
    assert weights(resumed) == weights(whole)
    with pytest.raises(DataError, match="quasi_random, this loader has"):
        make_trainer(kind).load_state_dict(stopped.state_dict())


@pytest.mark.parametrize("placement", ["stream", "resident"])
def test_mnist_is_trained_on_in_a_quasi_random_order(make_trainer, mnist_folder, placement):
    settings = {"dataset": "mnist", "data_dir": str(mnist_folder), "batch_size": 500, "placement": placement}
    loader = make_trainer("ours", order="quasi_random", **settings).loader
    assert loader.order == "quasi_random"
    rows = assert_epoch(loader, [500] * 110)
    assert len(np.unique(rows)) == 55_000


@pytest.mark.slow
@pytest.mark.ffcv
@pytest.mark.filterwarnings("ignore")
def test_all_loaders_train_to_about_the_same_accuracy(tmp_path):
    accuracies = {
        kind: train(
            TrainConfig(
                dataset="digits",
                model="small-cnn",
                epochs=8,
                batch_size=64,
                loader=kind,
                out=str(tmp_path / kind),
            )
        ).summary["test_accuracy"]
        for kind in LOADERS
    }
    assert min(accuracies.values()) > 0.95, accuracies


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
        pytest.param("ffcv", {}, marks=FFCV.marks),
        pytest.param("ffcv", {"reuse_buffers": True}, marks=FFCV.marks),
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
