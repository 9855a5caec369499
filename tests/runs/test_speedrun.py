"""Speedruns against plain runs with the same seeds, and what they say when runs diverge or are stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import scipy.stats
import torch

from fastmnist.cli.main import main
from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError, DataError
from fastmnist.report.speedrun_chart import plot_speedrun
from fastmnist.runs.speedrun import Speedrun, speedrun, spread
from fastmnist.runs.train import train
from fastmnist.training import session

SMALL = {"dataset": "digits", "model": "small-cnn", "epochs": 2.5, "batch_size": 64, "val_size": 0, "quiet": True}


@pytest.fixture(scope="module")
def found() -> Speedrun:
    return speedrun(TrainConfig(**SMALL), 3, shifted=True)


def test_each_seed_is_the_run_that_train_makes(found: Speedrun, tmp_path: Path) -> None:
    """One model and its compiled step serve all seeds, and no seed sees what another left."""
    for result in found.runs:
        seed = result["seed"]
        plain = train(TrainConfig(**SMALL, seed=seed, out=str(tmp_path / str(seed)))).summary
        assert result["test_accuracy"] == plain["test_accuracy"]
        assert found.setup["steps"] == plain["steps"] == 55  # 2.5 epochs of 22 steps
    assert [result["seed"] for result in found.runs] == [0, 1, 2]
    assert len(set(found.accuracies)) > 1


def test_resnet_with_live_taps_too(tmp_path: Path) -> None:
    settings = SMALL | {"model": "resnet18", "epochs": 0.2, "batch_size": 128, "optimizer": "adamw"}
    runs = speedrun(TrainConfig(**settings), 2, curve=False).runs
    for result in runs:
        out = str(tmp_path / str(result["seed"]))
        assert (
            result["test_accuracy"]
            == train(TrainConfig(**settings, seed=result["seed"], out=out)).summary["test_accuracy"]
        )


def test_what_it_gives_back(found: Speedrun) -> None:
    content = json.loads(json.dumps(found.to_dict()))
    assert content["n"] == 3
    assert not content["interrupted"]
    for run in content["runs"]:
        assert min(run[f"{clock}_seconds"] for clock in ("train", "data", "evaluate")) > 0
        assert abs(run["test_accuracy_shifted"] - run["test_accuracy"]) < 0.2
    assert content["test_accuracy_mean"] == pytest.approx(sum(found.accuracies) / 3)
    assert content["test_accuracy_stdev"] == pytest.approx(torch.tensor(found.accuracies).std().item(), rel=1e-4)
    assert min(content[f"{clock}_seconds"] for clock in ("import", "data", "compile")) > 0
    assert [row["name"] for row in content["rows"]] == ["test_accuracy", "train_seconds"]
    assert f"{content['test_accuracy_mean']:.2%}" in found.verdict()


def test_the_curve_goes_the_way_of_its_seed(found: Speedrun) -> None:
    """Stopping the clock for a look changes nothing: it ends where the seed's own run ended."""
    seconds = [point["train_seconds"] for point in found.curve]
    assert len(seconds) == 10
    assert seconds == sorted(seconds)
    assert found.curve[-1]["test_accuracy"] == found.runs[0]["test_accuracy"]


def test_a_run_that_diverges_counts(tmp_path: Path) -> None:
    result = speedrun(TrainConfig(**SMALL | {"learning_rate": 1e30, "augment": False}), 1, curve=True)
    assert result.accuracies == [0.1]
    assert "the loss is" in result.runs[0]["error"]
    assert result.curve == []
    plot_speedrun(result.to_dict(), [tmp_path / "a.png"])


def test_a_test_file_that_cannot_be_read_is_no_run_that_diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*arguments, **options) -> None:
        raise DataError("the file was changed")

    monkeypatch.setattr(session, "evaluate_model", unreadable)
    with pytest.raises(DataError, match="the file was changed"):
        speedrun(TrainConfig(**SMALL), 1, curve=False)


@pytest.mark.parametrize(
    ("accuracies", "claim"),
    [([0.991, 0.992] * 10, "PASS"), ([0.989, 0.992] * 10, "MISS"), ([0.99] * 20, "MISS"), ([0.991, 0.992], "")],
)
def test_what_is_claimed_of_a_target(found: Speedrun, accuracies: list[float], claim: str) -> None:
    """By the t statistic written out, and for 20 seeds or more alone."""
    runs = [dict(found.runs[0]) | {"test_accuracy": accuracy} for accuracy in accuracies]
    aimed = replace(found, runs=runs, target=0.99)
    n, deviation = len(accuracies), float(np.std(accuracies, ddof=1))
    if deviation > 1e-9:
        expected = scipy.stats.t.sf((np.mean(accuracies) - 0.99) / (deviation / n**0.5), n - 1)
        assert aimed.p_value == pytest.approx(expected)
    assert [word for word in ("PASS", "MISS") if word in aimed.verdict()] == [claim] * bool(claim)
    assert (f"{round(100 * (np.mean(accuracies) - 0.99), 3) + 0.0:+.3f} points" in aimed.verdict()) == bool(claim)
    assert found.p_value is None


def test_enough_ends_it_between_two_seeds() -> None:
    assert (
        len(speedrun(TrainConfig(**SMALL | {"epochs": 0.1}), 5, curve=False, enough=lambda done: done == 2).runs) == 2
    )


def test_ctrl_c_keeps_the_seeds_that_were_finished(press_ctrl_c_at: Callable[[int], None]) -> None:
    press_ctrl_c_at(100)
    result = speedrun(TrainConfig(**SMALL), 5)
    assert (len(result.runs), result.interrupted, result.curve) == (1, True, [])


def test_ctrl_c_before_the_first_seed_is_finished(press_ctrl_c_at: Callable[[int], None]) -> None:
    press_ctrl_c_at(10)
    with pytest.raises(KeyboardInterrupt):
        speedrun(TrainConfig(**SMALL), 2)


def test_no_seeds() -> None:
    with pytest.raises(ConfigError, match="--seeds 0"):
        speedrun(TrainConfig(**SMALL), 0)
    assert spread([0.5]) == 0


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = "--dataset digits --model small-cnn --epochs 1 --batch-size 64 --preset cpu --json out.json"
    assert main(["speedrun", "--seeds", "2", *flags.split()]) == 0
    content = json.loads((tmp_path / "out.json").read_text())
    folder = Path(content["folder"])
    assert sorted(path.name for path in folder.iterdir()) == ["speedrun.json", "speedrun.png", "speedrun.svg"]
    assert (content["preset"], content["n"], content["config"]["epochs"]) == ("cpu", 2, 1.0)
    assert content["command"].startswith("fastmnist speedrun --seeds 2 --dataset digits")
    assert matplotlib.image.imread(folder / "speedrun.png").shape[1] == 1500
    assert "mean of 2 seeds" in " ".join(capsys.readouterr().out.split())
    assert main(["speedrun", "--seeds", "0", "--dataset", "digits"]) == 2
    assert not list(folder.parent.glob("*-speedrun-2"))
