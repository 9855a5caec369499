"""The training step of a run: it takes any loader's batches, trains, and costs no run folder."""

from contextlib import ExitStack

import pytest
import torch

from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError, FastmnistError
from fastmnist.loader.loader import Loader
from fastmnist.measure.step import training_setup
from fastmnist.system.progress import Reporter
from fastmnist.training.loop import Trainer


def small_run(tmp_path, **settings):
    return TrainConfig(
        dataset="digits",
        model="small-cnn",
        batch_size=32,
        device="cpu",
        cache_dir=str(tmp_path / "cache"),
        quiet=True,
        **settings,
    )


@pytest.mark.parametrize("augment", [True, False])
def test_the_step_of_a_run_takes_any_loaders_batches(tmp_path, augment):
    config = small_run(tmp_path, augment=augment, val_size=1300, epochs=1)
    with training_setup(config, Reporter(quiet=True)) as setup:
        assert setup.device == torch.device("cpu")
        assert setup.config.learning_rate == 0.1
        assert len(setup.indices) == len(setup.files.train) - 1300 == 137
        for dtype in (torch.uint8, torch.float32):
            with Loader(setup.files.train, 32, dtype=dtype, device="cpu", indices=setup.indices) as loader:
                for batch in loader:  # more than the run has steps, and a partial one
                    setup.step(batch)
        files, loaders = setup.files, setup.loaders
        assert len(loaders.train) == 4
    assert files.train.closed
    with pytest.raises(RuntimeError, match="closed"):
        iter(loaders.train)


def test_the_step_of_a_run_trains(tmp_path):
    losses = []

    def keep(logits, labels, **options):
        losses.append(real(logits, labels, **options))
        return losses[-1]

    real = torch.nn.functional.cross_entropy
    with (
        training_setup(small_run(tmp_path, augment=False), Reporter(quiet=True)) as setup,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(torch.nn.functional, "cross_entropy", keep)
        batch = next(iter(setup.loaders.train))
        for _ in range(15):
            setup.step(batch)
    assert losses[-1] < 0.95 * losses[0]


def test_a_run_that_cannot_be(tmp_path):
    with (
        pytest.raises(ConfigError, match="graph"),
        training_setup(small_run(tmp_path, compile="graph"), Reporter(quiet=True)),
    ):
        pass


@pytest.mark.parametrize("works", [True, False])
def test_compiling_when_asked(tmp_path, monkeypatch, works):
    calls = []

    def compile(function, **options):
        def compiled(*arguments):
            calls.append("default")
            if not works:
                raise RuntimeError("no compiler\nat all")
            return function(*arguments)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    with ExitStack() as leaving:
        if not works:
            leaving.enter_context(pytest.raises(FastmnistError, match=r"--compile default .*RuntimeError: no compiler"))
        config = small_run(tmp_path, compile="default")
        setup = leaving.enter_context(training_setup(config, Reporter(quiet=True)))
        setup.step(next(iter(setup.loaders.train)))
    assert calls == ["default"] * (2 if works else 1)


def test_a_batch_that_does_not_fit(tmp_path, monkeypatch):
    def train_step(*arguments):
        raise torch.OutOfMemoryError("of the GPU")

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with (
        pytest.raises(ConfigError, match=r"--batch-size 32 .*cpu"),
        training_setup(small_run(tmp_path), Reporter(quiet=True)) as setup,
    ):
        setup.step(next(iter(setup.loaders.train)))
