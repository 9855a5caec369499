"""Whole runs on the embedded digits: their folders, interruptions and resumption."""

import io
import json
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from fastmnist.beton.reader import Beton
from fastmnist.cli.main import main
from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError, FastmnistError
from fastmnist.inference.predict import evaluate, predict
from fastmnist.prepare.prepare import beton_path, cache_folder, compile_dataset
from fastmnist.runs.train import TrainResult, resume, train
from fastmnist.system.progress import Reporter
from fastmnist.training import compiling
from fastmnist.training.loop import Trainer
from fastmnist.training.session import Session
from tests.conftest import arm_ctrl_c

SUMMARY_KEYS = [
    "test_accuracy",
    "val_accuracy",
    "train_seconds",
    "compile_seconds",
    "data_seconds",
    "total_seconds",
    "images_per_second",
    "device",
    "amp",
    "compile",
    "dataset",
    "seed",
    "versions",
    "parameters",
]
FILES = [
    "checkpoint.pt",
    "config.yaml",
    "confusion.png",
    "curves.png",
    "metrics.jsonl",
    "model.safetensors",
    "predictions.png",
    "report.html",
    "summary.json",
]


def settings_of(folder: Path) -> dict:
    """A run of a few seconds."""
    return {
        "dataset": "digits",
        "model": "small-cnn",
        "epochs": 2,
        "batch_size": 64,
        "log_every": 7,
        "quiet": True,
        "out": str(folder / "run"),
    }


@pytest.fixture
def settings(tmp_path: Path) -> dict:
    return settings_of(tmp_path)


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def same_weights(a: Path | str, b: Path | str) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, list[str]]:
    """A run long enough to learn, and the lines that it printed."""
    settings = settings_of(tmp_path_factory.mktemp("learned")) | {"epochs": 6, "batch_size": 32}
    console = Console(file=io.StringIO(), width=1000)
    result = train(TrainConfig(**settings), reporter=Reporter(quiet=True, console=console))
    return result, console.file.getvalue().splitlines()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The run of `settings`, uninterrupted: 40 steps, 20 an epoch."""
    return train(TrainConfig(**settings_of(tmp_path_factory.mktemp("whole"))))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], TrainResult]:
    """(name, seed) -> a short run of a ResNet-18, made once for each name."""
    folder, made = tmp_path_factory.mktemp("resnet"), {}

    def run(name: str, seed: int) -> TrainResult:
        if name not in made:
            some = settings_of(folder / name) | {"model": "resnet18", "epochs": 1, "batch_size": 128, "val_size": 900}
            made[name] = train(TrainConfig(**some | {"seed": seed}))
        return made[name]

    return run


def test_a_run_leaves_what_the_design_names(learned: tuple[TrainResult, list[str]]) -> None:
    result, printed = learned
    folder = result.folder
    assert sorted(path.name for path in folder.iterdir()) == FILES
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == result.summary
    assert set(SUMMARY_KEYS) <= set(summary)
    assert summary["test_accuracy"] > 0.9
    parts = [summary[f"{name}_seconds"] for name in ("data", "compile", "train", "evaluate")]
    assert min(parts) > 0
    assert sum(parts) <= summary["total_seconds"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records if r["kind"] == "epoch"] == list(range(6))
    assert records[-1]["val_accuracy"] == summary["val_accuracy"]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["trainer"]["step"] == summary["steps"] == 240
    assert len(printed) == 2  # quiet: the result alone
    assert f"{summary['test_accuracy']:.2%}" in printed[0]


def test_config_yaml_runs_again_to_the_same_bits_watched_or_not(
    whole: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    assert main(["train", "--config", str(whole.folder / "config.yaml"), "--out", str(again), "--watch"]) == 0
    assert same_weights(whole.folder, again)
    watched = json.loads((again / "watch.json").read_text())
    assert (watched["steps"], watched["epochs"]) == (40, 2)
    assert watched["verdict"] in capsys.readouterr().out
    assert "watch" in (again / "report.html").read_text()
    assert sorted(path.name for path in again.iterdir()) == sorted([*FILES, "watch.json", "watch.png"])
    accuracies = [
        json.loads((folder / "summary.json").read_text())["test_accuracy"] for folder in (whole.folder, again)
    ]
    assert accuracies[0] == accuracies[1]


def test_resnet_on_a_cpu_repeats_bit_for_bit(resnet: Callable[[str, int], TrainResult]) -> None:
    a, b, c = (resnet(name, seed).folder for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert same_weights(a, b)
    assert not same_weights(a, c)


def test_saved_weights_are_those_of_torchvision_s_resnet(resnet: Callable[[str, int], TrainResult]) -> None:
    result = resnet("a", 3)
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    model.load_state_dict(weights(result.folder))
    test = Beton(beton_path("digits", "test", cache_folder()))
    images = torch.from_numpy(test.images(np.arange(len(test)))).permute(0, 3, 1, 2).float()
    train_file = Beton(beton_path("digits", "train", cache_folder()))
    mean, std = (m[0] for m in train_file.moments)
    with torch.no_grad():
        predicted = model.eval()((images / 255 - mean) / std).argmax(1).numpy()
    assert (predicted == test.labels).mean() == pytest.approx(result.summary["test_accuracy"])
    evaluation, names = evaluate(result.folder)
    assert evaluation.accuracy == pytest.approx(result.summary["test_accuracy"])
    assert names == list("0123456789")


# In the first epoch, at a log line, at the end of an epoch, in the last step.
@pytest.mark.parametrize("step", [1, 7, 20, 33, 40])
def test_ctrl_c_and_resume_end_at_the_same_bits(
    settings: dict, whole: TrainResult, press_ctrl_c_at: Callable[[int], None], step: int
) -> None:
    assert whole.summary["steps"] == 40
    press_ctrl_c_at(step)
    stopped = train(TrainConfig(**settings))
    assert stopped.interrupted
    assert stopped.summary["steps"] == step
    left = {path.name for path in stopped.folder.iterdir()}
    assert {"checkpoint.pt", "model.safetensors", "report.html", "summary.json"} <= left
    assert ("curves.png" in left) == (step >= 7)

    resumed = resume(stopped.folder)
    assert not resumed.interrupted
    assert same_weights(whole.folder, resumed.folder)
    assert resumed.summary["test_accuracy"] == whole.summary["test_accuracy"]
    epochs = {}
    for folder in (whole.folder, resumed.folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        epochs[folder] = [
            {k: r[k] for k in ("epoch", "step", "train_loss", "train_accuracy", "val_loss", "val_accuracy")}
            for r in lines
            if r["kind"] == "epoch"
        ]
    assert epochs[whole.folder] == epochs[resumed.folder]


def test_the_command_exits_with_130_after_ctrl_c(
    settings: dict, press_ctrl_c_at: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    press_ctrl_c_at(8)
    out = settings["out"]
    flags = ["--dataset", "digits", "--model", "small-cnn", "--epochs", "1", "--out", out]
    before = signal.getsignal(signal.SIGINT)
    assert main(["train", *flags]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert f"fastmnist train --resume {out}" in capsys.readouterr().out
    assert main(["train", "--resume", out]) == 0


def test_a_second_ctrl_c_breaks_off(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Trainer.train_step

    def train_step(self: Trainer, *arguments) -> None:
        inner(self, *arguments)
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**settings))
    assert not Path(settings["out"]).exists()


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        arm_ctrl_c(patch, 8)
        return train(TrainConfig(**settings_of(tmp_path_factory.mktemp("stopped")))).folder


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """The folder of a run that was stopped after eight steps."""
    return Path(shutil.copytree(stopped_once, tmp_path / "stopped"))


def test_resume_refuses_a_changed_setting(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(stopped), "--seed", "1"]) == 2
    assert re.search(r"--seed 0\b.*\b1\b", capsys.readouterr().err)
    # Also when what is given is a default that the run did not have.
    assert main(["train", "--resume", str(stopped), "--batch-size", "128"]) == 2
    assert re.search(r"--batch-size 64\b.*\b128\b", capsys.readouterr().err)

    config = stopped / "config.yaml"
    kept = config.read_text()
    config.write_text(yaml.safe_dump(yaml.safe_load(kept) | {"shift": 3.0}))
    assert main(["train", "--resume", str(stopped)]) == 2
    assert "--shift 2.0" in capsys.readouterr().err
    config.write_text(kept + "colour: red\n")
    assert main(["train", "--resume", str(stopped)]) == 2
    assert "config.yaml: --colour" in capsys.readouterr().err
    config.write_text("[")
    assert main(["train", "--resume", str(stopped)]) == 1
    assert "config.yaml" in capsys.readouterr().err
    config.write_text(kept)
    assert main(["train", "--resume", str(stopped), "--batch-size", "64"]) == 0


@pytest.mark.parametrize("split", ["train", "test"])
def test_resume_refuses_changed_data(stopped: Path, capsys: pytest.CaptureFixture[str], split: str) -> None:
    path = beton_path("digits", split, cache_folder())
    before = Beton(path).fingerprint
    kept = path.read_bytes()
    file = Beton(path)
    from fastmnist.beton.writer import write_beton

    images = 255 - file.images(np.arange(len(file)))
    source = file.integrity.source if file.integrity else ""
    write_beton(path, images, file.labels, class_names=file.class_names, source=source)
    try:
        assert main(["train", "--resume", str(stopped)]) == 1
        error = capsys.readouterr().err
        assert str(before) in error
        assert str(Beton(path).fingerprint) in error
    finally:
        path.write_bytes(kept)
    assert main(["train", "--resume", str(stopped)]) == 0


def test_a_run_of_an_older_version_goes_on_without_the_setting_that_went(stopped: Path) -> None:
    content = torch.load(stopped / "checkpoint.pt", weights_only=True)
    content["config"]["reuse_buffers"] = False
    content["version"] = 1
    del content["trainer"]["amp"]
    torch.save(content, stopped / "checkpoint.pt")
    with open(stopped / "config.yaml", "a") as file:
        file.write("reuse_buffers: false\n")
    assert main(["train", "--resume", str(stopped)]) == 0


def test_resume_refuses_a_complete_run(whole: TrainResult, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(whole.folder)]) == 2
    assert str(whole.folder) in capsys.readouterr().err


@pytest.mark.parametrize("cut", [0, 10, 1000, -1])
def test_a_damaged_checkpoint_or_model_is_refused(stopped: Path, cut: int, capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in (
        ("checkpoint.pt", ["train", "--resume", str(stopped)]),
        ("model.safetensors", ["evaluate", str(stopped)]),
    ):
        path = stopped / name
        path.write_bytes(path.read_bytes()[:cut])
        assert main(command) == 1
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        assert name in errors[0]


def test_a_failed_run_leaves_no_folder(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Trainer.forward

    def explode(self, images, labels):
        loss, right = inner(self, images, labels)
        return loss * float("inf"), right

    monkeypatch.setattr(Trainer, "forward", explode)
    with pytest.raises(FastmnistError, match=r"at step 1 of 40 \(learning rate"):
        train(TrainConfig(**settings))
    assert not Path(settings["out"]).exists()


def test_runs_are_numbered(settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    some = settings | {"epochs": 1, "out": None}
    names = [train(TrainConfig(**some)).folder.name for _ in range(2)]
    assert [name.rsplit("-", 2)[1:] for name in names] == [["digits", "1"], ["digits", "2"]]
    assert (tmp_path / "runs" / names[0] / "summary.json").is_file()


def test_without_validation_everything_is_trained_on(settings: dict) -> None:
    summary = train(TrainConfig(**settings | {"val_size": 0, "epochs": 1})).summary
    assert summary["val_accuracy"] is None
    assert summary["train_images"] == 1437


def test_the_validation_split_is_stratified_and_apart(settings: dict) -> None:
    with Session(TrainConfig(**settings | {"val_size": 300}), Reporter(quiet=True)) as session:
        assert session.loaders.validation is not None
        held, used = session.loaders.validation.indices, session.loaders.train.indices
        labels = session.files.train.labels.copy()
    assert len(held) == 300
    assert np.array_equal(np.sort(np.concatenate([held, used])), np.arange(1437))
    shares = [np.bincount(labels[part], minlength=10) / len(part) for part in (held, used)]
    assert np.abs(shares[0] - shares[1]).max() < 0.01


def test_tensorboard_gets_the_same_figures(settings: dict) -> None:
    result = train(TrainConfig(**settings | {"tensorboard": True, "epochs": 1}))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(result.folder / "tensorboard"))
    events.Reload()
    assert events.Scalars("val_accuracy")[-1].value == pytest.approx(result.summary["val_accuracy"])


def test_tensorboard_that_is_not_installed_is_named(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        train(TrainConfig(**settings | {"tensorboard": True}))
    assert not Path(settings["out"]).exists()


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_compiled_training_learns_the_same(settings: dict, tmp_path: Path) -> None:
    """aot_eager stands in for inductor, which takes a minute: the same capture, no code generation."""
    torch._dynamo.reset()
    real = torch.compile
    eager = train(TrainConfig(**settings | {"epochs": 1, "out": str(tmp_path / "eager")})).summary
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: real(function, backend="aot_eager"))
        compiled = train(TrainConfig(**settings | {"epochs": 1, "compile": "default"})).summary
    torch._dynamo.reset()
    assert compiled["compile"] == "default"
    assert compiled["val_accuracy"] == pytest.approx(eager["val_accuracy"], abs=0.05)


def test_a_compiler_that_fails_is_reported(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function, **options):
        def fail(*arguments):
            raise RuntimeError("no compiler found\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(FastmnistError, match=r"--compile default.*no compiler found"):
        train(TrainConfig(**settings | {"compile": "default"}))
    # Where it was our choice, the run goes on without, and says why.
    monkeypatch.setattr(compiling, "choose_compile", lambda *_: ("default", "long"))
    summary = train(TrainConfig(**settings | {"epochs": 1})).summary
    assert (summary["compile"], "no compiler found" in summary["compile_reason"]) == ("off", True)


def test_pictures_of_digits_are_recognised(
    learned: tuple[TrainResult, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    result, _ = learned
    compile_dataset("digits")
    test = Beton(beton_path("digits", "test", cache_folder()))
    paths = []
    for number in range(40):
        image = Image.fromarray(255 - test.images(np.array([number]))[0, :, :, 0]).resize((140, 140))
        canvas = Image.new("RGB", (300, 240), (250, 250, 240))
        canvas.paste(image, (110, 30))
        paths.append(tmp_path / f"{number}.png")
        canvas.save(paths[-1])
    found = predict(result.folder, paths)
    right = np.mean([p.label == str(label) for p, label in zip(found, test.labels, strict=False)])
    assert right > 0.85
    assert all(p.probabilities.sum() == pytest.approx(1, abs=1e-5) for p in found)
    capsys.readouterr()
    assert main(["predict", str(result.folder), str(paths[0]), "--json", str(tmp_path / "p.json")]) == 0
    assert capsys.readouterr().out.startswith(f"{paths[0]}: {found[0].label}")
    assert json.loads((tmp_path / "p.json").read_text())[0]["label"] == found[0].label
    assert main(["evaluate", str(result.folder), "--json", str(tmp_path / "e.json")]) == 0
    content = json.loads((tmp_path / "e.json").read_text())
    assert content["test_accuracy"] == pytest.approx(result.summary["test_accuracy"])
    assert sum(map(sum, content["confusion"])) == content["test_images"] == 360


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_in_a_browser(whole: TrainResult, browser, scheme: str) -> None:
    """Every picture is drawn, nothing is asked of the network, and the console stays empty; on a phone's width too."""
    report = whole.folder / "report.html"
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    for width in (1200, 390):
        browser.set_window_size(width, 900)
        browser.get(report.as_uri())
        drawn = browser.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth)")
        assert len(drawn) == 3
        assert min(drawn) > 100
        asked = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert not [name for name in asked if not name.startswith("data:")]
        assert browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth") <= 0
        assert browser.get_log("browser") == []
