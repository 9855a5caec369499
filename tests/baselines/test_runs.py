"""Whole runs through each loader: what they learn, where they go on, which settings they take."""

from __future__ import annotations

import contextlib
import signal
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmnist.baselines.loaders import LOADERS
from fastmnist.cli.main import main
from fastmnist.config import TrainConfig
from fastmnist.errors import DataError
from fastmnist.loader.augment import Augmentation
from fastmnist.loader.loader import Loader
from fastmnist.runs.train import train
from fastmnist.system.progress import Reporter
from fastmnist.training.loop import Trainer
from fastmnist.training.session import Session, loader_arguments
from tests.loader.batches import EVERY, FFCV, assert_epoch, copied, with_workers


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
        LOADERS[kind](samples[0], device="cpu", **loader_arguments(default, samples[0])) as configured,
    ):
        assert configured._settings() == plain._settings()


@pytest.mark.parametrize("kind", ["ours", FFCV])
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
