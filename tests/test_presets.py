"""Presets: what a flag does to them, and which one is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastmnist.cli import main as cli
from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError
from fastmnist.presets import PRESETS, choose_preset, preset_config

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The configuration that `fastmnist train` with these flags would run with."""
    taken: list[TrainConfig] = []

    def take(config: TrainConfig, **_: Any) -> Any:
        taken.append(config)
        raise ConfigError("taken")

    monkeypatch.setattr("fastmnist.runs.train.train", take)

    def run(*flags: str) -> TrainConfig:
        assert cli.main(["train", "--device", "cpu", *flags]) == 2
        return taken.pop()

    return run


@pytest.mark.parametrize("name", PRESETS)
def test_settings_that_exist(name: str) -> None:
    settings = PRESETS[name]()
    assert settings
    config = preset_config(name)
    assert {key: getattr(config, key) for key in settings} == settings


@pytest.mark.parametrize("name", PRESETS)
def test_what_it_says_was_measured(name: str) -> None:
    """Its figures are those of the committed run, on a CPU or of the GPU suite, or it says that there is none."""
    said = " ".join(str(PRESETS[name].__doc__).split())
    if name.startswith("cpu"):
        found = json.loads((RESULTS / f"speedrun_{name.replace('-', '_')}.json").read_text())
        points, seconds = 2, 1
    else:
        suite = json.loads((RESULTS / "gpu_suite.json").read_text())
        found, points, seconds = suite["presets"].get(name), 3, 3
    if found is None:
        assert "has not been measured" in said
        return
    assert {key: found["config"][key] for key in PRESETS[name]()} == PRESETS[name]()
    mean, deviation = (f"{100 * found[f'test_accuracy_{which}']:.{points}f}" for which in ("mean", "stdev"))
    assert f"{mean} % ± {deviation}" in said
    assert f"after {found['train_seconds_mean']:.{seconds}f} s" in said
    assert f"n={found['n']}" in said
    assert found["hardware"].get("gpu", found["hardware"]["processor"]).removeprefix("NVIDIA ") in said


@pytest.mark.parametrize(
    ("name", "dataset", "gpu", "chosen"),
    [
        ("auto", None, False, "cpu"),
        ("auto", "mnist", True, "fast995"),
        ("auto", "fashion", True, "none"),
        ("fast99", "fashion", False, "fast99"),
        ("none", "mnist", True, "none"),
    ],
)
def test_which_one_is_taken(name: str, dataset: str | None, gpu: bool, chosen: str) -> None:
    assert choose_preset(name, dataset, lambda: gpu) == chosen


def test_flags_and_files_override_it(configured: Any, tmp_path: Path) -> None:
    preset = PRESETS["cpu"]()
    config = configured("--preset", "cpu", "--batch-size", "32", "--seed", "5")
    assert config == TrainConfig(**preset | {"batch_size": 32, "seed": 5, "device": "cpu"})
    file = tmp_path / "a.yaml"
    file.write_text("batch_size: 48\npreset: cpu\n")
    assert configured("--config", str(file)) == TrainConfig(**preset | {"batch_size": 48, "device": "cpu"})
    assert configured("--preset", "none") == TrainConfig(device="cpu")
    assert configured("--dataset", "fashion") == TrainConfig(device="cpu", dataset="fashion")
    assert configured() == TrainConfig(**preset | {"device": "cpu"})


def test_a_default_that_is_given_is_no_default(configured: Any) -> None:
    """--batch-size with the plain default's value still overrides the preset's."""
    preset = next(key for key, value in PRESETS["cpu"]().items() if isinstance(value, int) and value > 1)
    default = getattr(TrainConfig(), preset)
    flag = "--" + preset.replace("_", "-")
    assert getattr(configured("--preset", "cpu", flag, str(default)), preset) == default


def test_an_unknown_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--preset", "quick"]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in ("--preset quick", *PRESETS, "auto", "none"))
    with pytest.raises(ConfigError, match="--preset quick"):
        preset_config("quick")
