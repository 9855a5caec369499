"""The ladder: which rungs there are, what a row says, and what is left when one fails or Ctrl-C comes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import pytest

from fastmnist.cli.main import main
from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError, FastmnistError
from fastmnist.presets import PRESETS
from fastmnist.report.ladder_chart import cells, ladder_markdown, less_accurate, more_accurate, notes, plot_ladder
from fastmnist.runs import ladder as module
from fastmnist.runs.ladder import GROUND, effect, ladder, rungs

SPEEDS = {"plain DataLoader": 100.0, "2 workers": 99.0, "batched fetch": 150.0, "channels_last": 120.0}


def pretend(monkeypatch: pytest.MonkeyPatch, fails: str = "", stops: str = "") -> list[TrainConfig]:
    """speedrun without training: the speed of each rung is planned, and which configurations came is given back."""
    seen: list[TrainConfig] = []
    names = iter([rung.name for rung in rungs("cpu") if not rung.needs_gpu])

    def speedrun(config: TrainConfig, seeds: int, **_: Any) -> Any:
        name = next(names)
        seen.append(config)
        if name == fails:
            raise FastmnistError("no such workers")
        if name == stops:
            raise KeyboardInterrupt
        speed = SPEEDS.get(name, 200.0)
        setup = {
            "steps": 10,
            "config": {"batch_size": 128},
            "train_images": 60_000,
            "compile_seconds": 0.5,
            "amp": "off",
            "compile": "off",
            "dataset": "mnist",
        }
        runs = [1280 / speed] * seeds
        return SimpleNamespace(setup=setup, seconds=runs, accuracies=[0.95] * seeds, interrupted=False)

    monkeypatch.setattr(module, "speedrun", speedrun)
    return seen


def test_each_rung_changes_one_thing_and_keeps_the_rest() -> None:
    """Every rung's settings exist, move something, and the whole ladder ends at the preset's own settings."""
    for preset in ("cpu", "fast995"):
        settings = dict(GROUND)
        for rung in rungs(preset):
            assert all(settings.get(name) != value for name, value in rung.settings.items()) or "recipe" in rung.name
            settings |= rung.settings
            TrainConfig(**settings)
        wanted = {name: value for name, value in PRESETS[preset]().items() if name not in ("images_seen", "stem")}
        assert {name: settings[name] for name in wanted} == wanted


def test_what_a_row_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = pretend(monkeypatch)
    found = ladder(seeds=2, images=1280, device="cpu")
    rows = {row["name"]: row for row in found.rows}
    assert [rows[name]["effect"] for name in SPEEDS] == [None, "none", "faster", "slower"]
    said = notes(found.rows)
    reasons = {rung.name: rung.instead if rung.needs_gpu else rung.else_why for rung in rungs("cpu")}
    for name in ("2 workers", "channels_last", "CUDA graph"):
        [line] = [line for line in said if line.startswith(f"{name}, ")]
        assert reasons[name] in line
    assert not [line for line in said if line.startswith("batched fetch")]
    assert ladder_markdown(found.to_dict()).count("\n|") == len(SPEEDS) + 5  # the rule, and four more rungs on a CPU
    assert rows["batched fetch"]["over_below"] == pytest.approx(150 / 99)
    assert rows["plain DataLoader"]["seconds_per_epoch"] == 600
    assert rows["channels_last"]["over_below"] == pytest.approx(120 / 200)
    assert "left_out" in rows["CUDA graph"]
    assert seen[0].loader == "dataloader"
    assert seen[-1].loader == "ours"
    assert (seen[-1].learning_rate, seen[-1].optimizer) == (PRESETS["cpu"]()["learning_rate"], "sgd")
    assert {config.images_seen for config in seen} == {1280}


@pytest.mark.parametrize(
    ("rates", "before", "expected"),
    [
        ([120, 121, 130], [99, 100, 101], "faster"),
        ([80, 81, 90], [99, 100, 101], "slower"),
        ([90, 110, 130], [99, 100, 101], "none"),  # the ranges meet
        ([101, 102, 103], [98, 99, 100], "none"),  # less than 4 %
        ([110], [100], None),  # one seed decides nothing
        ([110, 120], [100], None),
    ],
)
def test_what_is_called_faster(rates: list[float], before: list[float], expected: str | None) -> None:
    assert effect(rates, before) == expected


@pytest.mark.parametrize(
    ("n", "mean", "stdev", "below", "expected"),
    [(3, 0.98, 0.001, 0.002, True), (3, 0.98, 0.001, 0.006, False), (1, 0.98, 0.0, 0.0, False), (3, 0.96, 0, 0, False)],
)
def test_when_a_rung_is_more_accurate(n: int, mean: float, stdev: float, below: float, expected: bool) -> None:
    row = {"n": n, "test_accuracy": {"mean": mean, "stdev": stdev}}
    assert more_accurate(row, {"n": 3, "test_accuracy": {"mean": 0.97, "stdev": below}}) is expected


@pytest.mark.parametrize(
    ("n", "mean", "stdev", "expected"),
    [(3, 0.46, 0.01, True), (3, 0.74, 0.01, False), (3, 0.6, 0.1, False), (1, 0.46, 0.0, True), (1, 0.71, 0.0, False)],
)
def test_when_a_rung_loses_accuracy(n: int, mean: float, stdev: float, expected: bool, tmp_path: Path) -> None:
    row = {
        "name": "recipe",
        "n": n,
        "images_per_second": {"median": 100.0},
        "seconds_per_epoch": 600.0,
        "over_below": 1.0,
        "effect": None if n == 1 else "none",
        "explanation": "",
        "test_accuracy": {"mean": mean, "stdev": stdev},
    }
    below = row | {"name": "below", "effect": None, "test_accuracy": {"mean": 0.747, "stdev": 0.01}}
    assert less_accurate(row, below) is expected
    said = [line for line in notes([below, row]) if "LESS ACCURATE" in line]
    assert len(said) == expected
    assert all("recipe" in line and "46.0 %" in line.replace("46.0%", "46.0 %") and "74.7" in line for line in said)


def test_one_seed_gives_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    found = ladder(seeds=1, images=1280, device="cpu")
    assert {row["effect"] for row in found.rows if "effect" in row} == {None}
    assert [line for line in notes(found.rows) if "--seeds" in line]
    pretend(monkeypatch)
    assert not [line for line in notes(ladder(seeds=2, images=1280, device="cpu").rows) if "--seeds" in line]


def test_only_what_makes_a_difference_is_painted_as_gain_or_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    painted = {}

    def keep(figure: Any, path: Path, title: str) -> None:
        axes = figure.axes[0]
        names = [label.get_text() for label in axes.get_yticklabels()]
        for bar in axes.patches:
            painted.setdefault(names[round(bar.get_y() + bar.get_height() / 2)], []).append(bar.get_width())

    monkeypatch.setattr("fastmnist.report.ladder_chart.save", keep)
    pretend(monkeypatch)
    rows = ladder(seeds=2, images=1280, device="cpu")
    plot_ladder(rows.to_dict(), [Path("a.svg")])
    effects = {row["name"]: row["effect"] for row in rows.rows if "effect" in row}
    assert {effects[name] for name in ("2 workers", "batched fetch", "channels_last")} == {"none", "faster", "slower"}
    for name, bars in painted.items():
        assert len(bars) == (2 if effects[name] in ("faster", "slower") else 1), name


def test_every_rung_says_what_it_takes() -> None:
    assert all(rung.why and rung.else_why for rung in rungs("cpu")[1:])
    assert all(rung.instead for rung in rungs("cpu") if rung.needs_gpu)


def test_a_rung_that_fails_costs_itself_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = pretend(monkeypatch, fails="2 workers")
    found = ladder(seeds=1, device="cpu")
    rows = {row["name"]: row for row in found.rows}
    assert rows["2 workers"]["error"] == "no such workers"
    assert seen[2].loader == "tuned"
    assert rows["batched fetch"]["over_below"] == pytest.approx(1.5)  # over the last one that was measured
    assert "failed: no such workers" in ladder_markdown(found.to_dict())
    plot_ladder(found.to_dict(), [tmp_path / "a.svg"])
    pretend(monkeypatch, fails="plain DataLoader")
    with pytest.raises(FastmnistError, match="no such workers"):
        ladder(device="cpu")


def test_ctrl_c_keeps_the_rungs_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, stops="batched fetch")
    found = ladder(device="cpu")
    assert found.interrupted
    assert [row["name"] for row in found.rows] == ["plain DataLoader", "2 workers"]
    pretend(monkeypatch, stops="plain DataLoader")
    with pytest.raises(KeyboardInterrupt):
        ladder(device="cpu")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (3, 12_000)),
        ({"quick": True}, (1, 3_000)),
        ({"quick": True, "seeds": 2, "images": 500}, (2, 500)),
    ],
)
def test_how_many_seeds_and_images(monkeypatch: pytest.MonkeyPatch, given: dict, expected: tuple[int, int]) -> None:
    pretend(monkeypatch)
    settings = ladder(device="cpu", **given).to_dict()["settings"]
    assert (settings["seeds"], settings["images"]) == expected


def test_numbers_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="--seeds 0"):
        ladder(seeds=0)
    with pytest.raises(ConfigError, match="--images 10"):
        ladder(images=10)


def test_from_the_command_line_with_real_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two rungs of it, on digits: the plain DataLoader and the compiled file."""
    some = [
        rung for rung in rungs("cpu") if rung.name in ("plain DataLoader", "compiled file and Loader", "CUDA graph")
    ]
    monkeypatch.setattr(module, "rungs", lambda preset: some)
    folder = tmp_path / "out"
    flags = f"--dataset digits --quick --images 256 --device cpu --out {folder} --json {tmp_path / 'a.json'}"
    assert main(["ladder", *flags.split()]) == 0
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["settings"] == {"seeds": 1, "images": 256, "device": "cpu", "dataset": "digits"}
    assert [("left_out" in row, row["name"]) for row in content["rows"]] == [
        (False, "plain DataLoader"),
        (False, "compiled file and Loader"),
        (True, "CUDA graph"),
    ]
    assert all(row["images_per_second"]["median"] > 0 for row in content["rows"][:2])
    assert sorted(path.name for path in folder.iterdir()) == ["ladder.json", "ladder.md", "ladder.png", "ladder.svg"]
    assert matplotlib.image.imread(folder / "ladder.png").shape[1] == 1500
    assert "left out" in capsys.readouterr().out
    name, speed, _, _, accuracy, _ = cells(content["rows"][1])
    assert (name, "to" in speed, "±" in accuracy) == ("compiled file and Loader", False, False)  # of one seed
    assert "per run, one seed; " in (folder / "ladder.md").read_text()
