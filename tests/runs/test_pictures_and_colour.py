"""Runs on folders of pictures and on CIFAR's format, from the command line to the pictures of the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fastmnist.beton.reader import Beton
from fastmnist.cli.main import main
from fastmnist.prepare.prepare import beton_path, cache_folder, compile_dataset, prepare

RECIPE = ["--model", "small-cnn", "--epochs", "1", "--batch-size", "8", "--val-size", "0", "--quiet"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTMNIST_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def is_in_colour(picture: Path) -> bool:
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    return bool((np.ptp(pixels, axis=2) > 100).mean() > 0.02)


def test_a_folder_trains_evaluates_and_predicts_from_the_command_line(write_pictures, capsys):
    """Two colours, one level of folders, another size: the fifth that is for testing is read right."""
    for name, tint in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
        written = write_pictures(Path("photos"), {name: 20}, size=(30, 24))
        for path in written:
            Image.fromarray((written[path] // 6 + tint).astype(np.uint8)).save(Path("photos") / path)
    assert main(["train", "--dataset", "folder:photos", "--image-size", "20x16", *RECIPE]) == 0
    [run] = Path("runs").iterdir()
    assert run.name.endswith("-photos-1")
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["dataset"], summary["test_accuracy"]) == ("photos", 1.0)
    assert "8 of its 40 pictures" in summary["data_note"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["dataset"], config["flip"]) == (f"folder:{Path('photos').resolve()}", False)
    with Beton(beton_path("photos", "test", cache_folder())) as file:
        assert (len(file), file.image_shape, file.class_names) == (8, (20, 16, 3), ("blue", "red"))
    assert is_in_colour(run / "predictions.png")
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 0
    assert main(["predict", str(run), "photos/blue/3.png", "photos/red/3.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split()[0] for line in lines[-2:]] == ["blue", "red"]
    assert main(["demo", str(run)]) == 2
    assert "square grey" in capsys.readouterr().err


def test_a_copy_of_cifar_trains_from_the_command_line_with_flips(write_colour, any_checksum, monkeypatch):
    monkeypatch.setattr("fastmnist.runs.train._Run._draw", lambda *_: None)  # as for the pictures above
    images, _ = write_colour(Path("data"), train=40, test=20)["train"]
    assert main(["train", "--dataset", "cifar10", "--data-dir", "data", *RECIPE, "--out", "run"]) == 0
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (config["dataset"], config["flip"]) == ("cifar10", True)
    with Beton(beton_path("cifar10", "train", cache_folder())) as file:
        np.testing.assert_array_equal(file.images(np.arange(40)), images)
        assert len(file.moments[0]) == 3


def test_compile_leaves_a_folders_files_alone_until_it_changes(tmp_path, write_pictures, capsys):
    write_pictures(Path("mnist/train"), {"a": 3, "b": 2})
    write_pictures(Path("mnist/test"), {"a": 1, "b": 1})
    compile_it = ["compile", "--dataset", "folder:mnist", "--output", "out"]
    for status in ("written", "current"):
        assert main(compile_it) == 0
        assert capsys.readouterr().out.count(f", {status}") == 2
    names = ["mnist-pictures-test.beton", "mnist-pictures-train.beton"]  # "mnist" would be taken for MNIST itself
    assert sorted(path.name for path in Path("out").iterdir()) == names
    Path("mnist/train/a/0.png").write_bytes(b"broken")
    assert main(compile_it) == 1
    assert "mnist/train/a/0.png" in capsys.readouterr().err
    assert main([*compile_it, "--skip-broken"]) == 0
    said = capsys.readouterr().out
    assert "4 samples, replaced" in said
    assert "0.png" in said
    assert prepare("folder:mnist", cache_dir="out").train == Path("out/mnist-pictures-train.beton")  # what was left out


def test_options_that_do_not_go_with_the_dataset_are_refused(write_pictures, capsys):
    write_pictures(Path("photos"), {"a": 5, "b": 5})
    for wrong, named in (
        (["compile", "--dataset", "digits", "--skip-broken"], "--skip-broken"),
        (["compile", "--dataset", "digits", "--image-size", "8"], "--image-size"),
        (["compile", "--dataset", "folder:photos", "--data-dir", "."], "--data-dir"),
        (["compile", "--dataset", "folder:photos", "--image-size", "0"], "--image-size 0"),
        (["train", "--dataset", "digits", "--image-size", "8"], "--image-size"),
        (["train", "--dataset", "folder:photos", "--image-size", "8xx"], "--image-size 8xx"),
    ):
        assert main(wrong) == 2, wrong
        assert named in capsys.readouterr().err
    assert [file.samples for file in compile_dataset("folder:photos", output="out", image_size="8")] == [8, 2]
