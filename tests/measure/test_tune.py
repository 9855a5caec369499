"""Tuning a run: what is searched, what is never changed, and a file that train takes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from fastmnist.baselines.loaders import LOADERS
from fastmnist.cli.main import main
from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError
from fastmnist.measure import doctor
from fastmnist.measure.halving import Candidate, Search, combinations
from fastmnist.measure.step import training_setup
from fastmnist.measure.tune import Tuning, make_loader, simplest, space_of, tune, write_yaml
from fastmnist.system.progress import Reporter
from fastmnist.system.statistics import summarise

CPU = torch.device("cpu")
KINDS = [
    "ours",
    "dataloader",
    "tuned",
    "tensors",
    pytest.param("ffcv", marks=[pytest.mark.ffcv, pytest.mark.filterwarnings("ignore")]),
]


@pytest.fixture
def config(tmp_path: Path, write_dataset) -> TrainConfig:
    write_dataset(tmp_path / "data", train=260, test=20)
    folders = {"data_dir": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache")}
    return TrainConfig(
        dataset="mnist", val_size=0, model="small-cnn", batch_size=32, device="cpu", quiet=True, **folders
    )


def tuning_of(candidate: Candidate, settings) -> Tuning:
    candidate.rounds, candidate.status = [[1.0, 2.0, 3.0]], "best"
    return Tuning(
        settings, Search([candidate], candidate, candidate, 1.0), "steps", 30.0, "a machine; mnist", {"date": "2026"}
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_combination_is_one_that_train_takes(kind, config) -> None:
    """And it hands out the samples that the run's own loader does, in the same order."""
    space = space_of(kind, CPU, [config.batch_size], ["auto"])
    found = combinations(space, lambda settings: simplest(settings, "stream", CPU))
    with training_setup(replace(config, loader=kind), Reporter(quiet=True)) as setup:
        expected = setup.loaders.train.state_dict()
        for candidate in found:
            if candidate.settings.get("workers", 0) > 0 and kind != "ffcv":
                continue  # their processes take a second each to begin
            with make_loader(setup, candidate.settings) as loader:
                assert loader.state_dict() == expected  # and with it the samples and their order
                if kind != "ffcv":
                    images, _ = next(iter(loader))
                    assert images.shape == (config.batch_size, 1, 28, 28)


def test_batch_size_and_order_are_kept_unless_others_are_named() -> None:
    space = space_of("ours", CPU, [64], ["auto"])
    assert space["batch_size"] == [64]
    assert space["order"] == ["auto"]


def test_the_first_value_of_each_setting_is_trains_default() -> None:
    defaults = TrainConfig()
    for kind in LOADERS:
        space = space_of(kind, CPU, [defaults.batch_size], [defaults.order])
        for name, values in space.items():
            default = getattr(defaults, name)
            if name != "loader" and default is not None:
                assert values[0] == default, (kind, name)


def test_what_has_no_effect_is_not_searched() -> None:
    space = space_of("tuned", CPU, [64], ["auto"])
    found = combinations(space, lambda settings: simplest(settings, "stream", CPU))
    alone = [c for c in found if c.settings["workers"] == 0]
    assert len(alone) == 1
    assert len(found) == 1 + 4 * (len(space["workers"]) - 1)
    ours = combinations(space_of("ours", CPU, [64], ["auto"]), lambda settings: simplest(settings, "stream", CPU))
    assert {c.settings["placement"] for c in ours} == {"auto", "resident"}


def test_tune_finds_settings(config) -> None:
    found = tune(config, budget=4, loader_only=True)
    assert found.search.chosen.status in ("best", "tie")
    assert found.settings["loader"] == "ours"
    assert found.settings["batch_size"] == 32
    measured = [c for c in found.search.candidates if c.values]
    assert found.search.chosen in measured
    content = json.loads(json.dumps(found.to_dict()))
    assert sum(line["chosen"] for line in content["candidates"]) == 1
    assert content["hardware"]["cores"]
    assert content["dataset"] == "mnist"
    for candidate, line in zip(found.search.candidates, content["candidates"], strict=True):
        if candidate.values:
            assert line["median"] == summarise(candidate.final or candidate.values).median


def test_another_loader_is_a_change_like_another_setting(config) -> None:
    found = tune(config, loader="all", budget=1, loader_only=True)
    candidates = found.search.candidates
    assert {candidate.settings["loader"] for candidate in candidates} == set(LOADERS)
    assert [c.settings["loader"] for c in candidates if c.complexity == (0, 0)] == ["ours"]
    alone = {c.settings["loader"] for c in candidates if [name for name, _ in c.changes] == ["loader"]}
    assert alone == set(LOADERS) - {"ours"}


def test_names_are_checked(config) -> None:
    with pytest.raises(ConfigError, match="--loader fast"):
        tune(config, loader="fast")
    with pytest.raises(ConfigError, match=r"--batch-sizes 1000: .* 260 "):
        tune(config, batch_sizes=[1000])
    with pytest.raises(ConfigError, match=r"--budget 0\.5"):
        tune(config, budget=0.5)


def test_the_file_is_one_that_train_takes_and_says_what_it_is(tmp_path, config) -> None:
    settings = {"loader": "tuned", "batch_size": 32, "workers": 2, "persistent_workers": False, "prefetch_factor": 4}
    tuning = tuning_of(Candidate("workers 2", settings, (1,)), settings)
    write_yaml(tuning, tmp_path / "tuned.yaml")
    text = (tmp_path / "tuned.yaml").read_text()
    assert yaml.safe_load(text) == settings | {"tuned_on": "a machine; mnist"}
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert any("steps" in line and "a machine; mnist" in line for line in comments)
    loaded = TrainConfig(**yaml.safe_load(text))
    assert (loaded.workers, loaded.persistent_workers) == (2, False)


def test_train_warns_of_settings_from_another_machine(tmp_path, config, capsys) -> None:
    settings = {"loader": "ours", "batch_size": 32, "threads": 1}
    write_yaml(tuning_of(Candidate("threads 1", settings, (1,)), settings), tmp_path / "tuned.yaml")
    folders = ["--data-dir", config.data_dir, "--cache-dir", config.cache_dir, "--out", str(tmp_path / "run")]
    small = ["--model", "small-cnn", "--epochs", "1", "--val-size", "0", "--device", "cpu", "--dataset", "mnist"]
    assert main(["train", "--config", str(tmp_path / "tuned.yaml"), *folders, *small]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Warning" in printed
    assert "a machine; mnist" in printed
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["threads"] == 1


def test_the_command_writes_settings_and_pictures_and_applies_them(tmp_path, config, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "TURNS", 3)
    monkeypatch.setattr(doctor.diagnose_training, "__defaults__", (0.5, None))
    flags = ["--dataset", "mnist", "--data-dir", config.data_dir, "--cache-dir", config.cache_dir, "--val-size", "0"]
    flags += ["--model", "small-cnn", "--batch-size", "32", "--device", "cpu"]
    assert main(["tune", *flags, "--budget", "1", "--apply", "--out", "out", "--json", "result.json"]) == 0
    names = {"search.png", "tune.json", "tuned.yaml", "before.json", "after.json"}
    assert {path.name for path in Path("out").iterdir()} == names
    result = json.loads(Path("result.json").read_text())
    printed = capsys.readouterr().out.splitlines()
    assert [
        line for line in printed if "than" in line and "simplest" in line
    ]  # the best possible gain, before the search
    assert result["ceiling"]["n"] >= 3
    for name in ("before", "after"):
        assert result[name] == json.loads(Path(f"out/{name}.json").read_text())
        assert any(result[name]["verdict"] in line for line in printed)
    assert result["changes"]["verdict"] in printed
    assert result["settings"]["loader"] == "ours"
    assert "tuned_on" in yaml.safe_load(Path("out/tuned.yaml").read_text())
    small = ["--model", "small-cnn", "--epochs", "1", "--val-size", "0", "--device", "cpu", "--out", "run"]
    folders = ["--dataset", "mnist", "--data-dir", config.data_dir, "--cache-dir", config.cache_dir]
    capsys.readouterr()
    assert main(["train", "--config", "out/tuned.yaml", *folders, *small]) == 0
    assert "Warning" not in capsys.readouterr().out


def test_the_command_leaves_no_folder_behind_an_error(tmp_path, config, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "--data-dir", config.data_dir, "--dataset", "mnist", "--budget", "0.2"]) == 2
    assert not list(Path("runs").glob("*"))
    assert "--budget 0.2" in capsys.readouterr().err


def test_the_verdict_names_what_is_kept() -> None:
    candidates = combinations({"a": [1, 2]})
    candidates[0].rounds, candidates[1].rounds = [[100.0]], [[200.0]]
    fast = Tuning({"a": 2}, Search(candidates[::-1], candidates[1], candidates[0], 1.0), "", 1.0, "", {})
    assert fast.verdict().startswith("a 2: 2.00 ")
    kept = Tuning({"a": 1}, Search(candidates, candidates[0], candidates[0], 1.0), "", 1.0, "", {})
    assert "defaults" in kept.verdict()
    assert "times" not in kept.verdict()
