"""Exported models in the programs that they are for: ONNX Runtime, TorchScript, and torchvision's ResNet-18."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from fastmnist.beton.reader import Beton
from fastmnist.beton.writer import write_beton
from fastmnist.cli.main import main
from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError, DataError, FastmnistError
from fastmnist.inference import export as module
from fastmnist.inference.export import export
from fastmnist.inference.predict import evaluate
from fastmnist.prepare.prepare import beton_path, cache_folder
from fastmnist.runs.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """(folder, test accuracy) of a trained ResNet-18."""
    out = tmp_path_factory.mktemp("export") / "run"
    settings = {"dataset": "digits", "epochs": 2, "batch_size": 64, "learning_rate": 0.03, "quiet": True}
    summary = train(TrainConfig(**settings, out=str(out))).summary
    return out, summary["test_accuracy"]


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray]:
    """(n, 1, 28, 28) float32 pixel values and labels, of the test set."""
    with Beton(beton_path("digits", "test", cache_folder())) as test:
        images = test.images(np.arange(len(test)))
        return images.reshape(-1, 1, 28, 28).astype(np.float32), np.array(test.labels)


def test_onnx_in_onnx_runtime(run: tuple[Path, float], pictures: tuple[np.ndarray, np.ndarray]) -> None:
    folder, accuracy = run
    exported = export(folder, "onnx")
    assert exported.path == folder / "model.onnx"
    session = onnxruntime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {"images": pictures[0]})[0]
    assert (logits.argmax(1) == pictures[1]).mean() == pytest.approx(accuracy, abs=1e-9)
    assert session.run(["logits"], {"images": pictures[0][:1]})[0].shape == (1, 10)  # any batch
    card = json.loads(session.get_modelmeta().custom_metadata_map["fastmnist"])
    assert card["class_names"] == [str(digit) for digit in range(10)]
    assert (exported.images, exported.test_accuracy) == (len(pictures[1]), pytest.approx(accuracy))


def test_torchscript(run: tuple[Path, float], pictures: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    folder, accuracy = run
    exported = export(folder, "torchscript", tmp_path / "a" / "digits.pt")
    extra = {"card.json": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises another format
        loaded = torch.jit.load(str(exported.path), _extra_files=extra)
    right = (loaded(torch.from_numpy(pictures[0])).argmax(1).numpy() == pictures[1]).mean()
    assert right == pytest.approx(accuracy, abs=1e-9)
    assert json.loads(extra["card.json"])["dataset"] == "digits"


def test_the_run_s_own_weights_in_torchvision_s_model(
    run: tuple[Path, float], pictures: tuple[np.ndarray, np.ndarray]
) -> None:
    folder, accuracy = run
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    with safe_open(folder / "model.safetensors", "pt") as file:
        card = json.loads(file.metadata()["fastmnist"])
    values = (torch.from_numpy(pictures[0]) / 255 - card["mean"][0]) / card["std"][0]
    with torch.no_grad():
        right = (model.eval()(values).argmax(1).numpy() == pictures[1]).mean()
    assert right == pytest.approx(accuracy, abs=1e-9)


def test_one_that_differs_is_not_kept(run: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(classifier, card, path):
        path.write_bytes(b"x")
        return lambda images: np.zeros((len(images), 10), np.float32)

    monkeypatch.setitem(module.WRITERS, "torchscript", wrong)
    with pytest.raises(FastmnistError, match=r"b\.pt"):
        export(run[0], "torchscript", tmp_path / "b.pt")
    assert not list(tmp_path.iterdir())


def test_errors_name_what_is_wrong(run: tuple[Path, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--format.*tflite.*onnx, torchscript"):
        export(run[0], "tflite")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"--format safetensors.*model\.safetensors"):
        export(run[0], "safetensors")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=str(tmp_path / "nothing")):
        export(tmp_path / "nothing", "torchscript")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"--format onnx.*onnxruntime.*\.\[export\]"):
        export(run[0], "onnx")


def test_a_test_set_of_other_classes_is_refused(run: tuple[Path, float], tmp_path: Path) -> None:
    other = tmp_path / "cache"
    other.mkdir()
    for split in ("train", "test"):
        with Beton(beton_path("digits", split, cache_folder())) as file:
            images, labels = file.images(np.arange(len(file)))[..., 0], file.labels % 5
            source = file.integrity.source
        write_beton(beton_path("digits", split, other), images, labels, class_names="01234", source=source)
    with pytest.raises(DataError, match=r"5 classes.*10 classes"):
        export(run[0], "torchscript", cache_dir=str(other))
    with pytest.raises(DataError, match=r"5 classes.*10 classes"):
        evaluate(run[0], cache_dir=str(other))


def test_from_the_command_line(run: tuple[Path, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, result = tmp_path / "m.pt", tmp_path / "r.json"
    flags = ["--format", "torchscript", "--output", str(file), "--json", str(result)]
    assert main(["export", str(run[0]), *flags]) == 0
    assert f"{file}: torchscript" in capsys.readouterr().out
    content = json.loads(result.read_text())
    assert content["path"] == str(file)
    assert content["images"] == 360
    assert content["largest_difference"] < 1e-3
    assert main(["export", str(run[0]), "--format", "tflite"]) == 2
