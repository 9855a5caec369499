"""Accuracy of whole runs, minutes each on a CPU."""

from pathlib import Path

import pytest

from fastmnist.config import TrainConfig
from fastmnist.presets import preset_config
from fastmnist.runs.train import train

pytestmark = pytest.mark.slow


def test_the_cpu_preset_reaches_its_accuracy(mnist_folder: Path, tmp_path: Path) -> None:
    """99.07 % ± 0.07 over seeds, so one seed is enough."""
    where = {"dataset": "mnist", "data_dir": str(mnist_folder), "out": str(tmp_path / "run")}
    assert train(preset_config("cpu", **where, val_size=0, quiet=True)).summary["test_accuracy"] >= 0.988


def test_digits_reach_97_percent_without_a_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the embedded digits take over, and the summary says so."""
    import torchvision.datasets

    def offline(*arguments: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "MNIST", offline)
    summary = train(TrainConfig(out=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"))).summary
    assert summary["dataset"] == "digits"
    assert "no network" in summary["data_note"]
    assert summary["test_accuracy"] >= 0.97


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_inductor_trains_on_a_cpu(tmp_path: Path) -> None:
    settings = {"dataset": "digits", "model": "small-cnn", "epochs": 3, "batch_size": 64}
    results = {
        mode: train(TrainConfig(**settings, compile=mode, out=str(tmp_path / mode))).summary
        for mode in ("off", "default")
    }
    assert results["default"]["compile"] == "default"
    assert results["default"]["test_accuracy"] == pytest.approx(results["off"]["test_accuracy"], abs=0.05)
