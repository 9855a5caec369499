"""A run's model for other programs: ONNX, TorchScript or plain weights, checked against the original."""

from __future__ import annotations

import importlib
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import safetensors.torch
import torch
from torch import nn

from fastmnist.beton.reader import Beton
from fastmnist.config import flag
from fastmnist.errors import ConfigError, FastmnistError
from fastmnist.files import write_bytes
from fastmnist.loader.epochs import check_choice
from fastmnist.loader.normalise import Normaliser
from fastmnist.prepare.prepare import prepare
from fastmnist.training.checkpoint import ModelCard, load_weights
from fastmnist.training.evaluate import EVALUATION_BATCH
from fastmnist.training.run_folder import RunFolder

Format = Literal["onnx", "torchscript", "safetensors"]
SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt", "safetensors": ".safetensors"}
TOLERANCE = 1e-3  # of logits, which are some units large
OPSET = 17
NEEDS = {"onnx": ("onnx", "onnxruntime")}
Runner = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Exported:
    """images: of the test set that both models saw. largest_difference: between their logits."""

    path: Path
    format: str
    images: int
    largest_difference: float
    test_accuracy: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}


class Classifier(nn.Module):
    """(B, C, H, W) float32 pixel values 0 to 255 to (B, classes) logits: normalisation and model in one."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, card: ModelCard) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        # Buffers, so that they go where the model goes.
        constants = Normaliser(card.mean, card.std)
        self.register_buffer("mean", constants.mean * 255)
        self.register_buffer("std", constants.std * 255)
        self.example = torch.zeros(2, card.image_shape[2], *card.image_shape[:2])
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model((images - self.mean) / self.std)
        return logits


def export(
    run: str | Path,
    format: Format = "onnx",
    output: str | Path | None = None,
    *,
    data_dir: str | None = None,
    cache_dir: str | None = None,
) -> Exported:
    """Writes a run's model in another format and holds it against the original on the run's test set.

    onnx and torchscript take "images", (B, C, H, W) float32 pixel values 0 to 255, B free, and give "logits", (B,
    classes); normalisation is inside. safetensors holds the weights alone, named and shaped as torchvision's model of
    that name has them. All carry class names, mean and std (ONNX: metadata; TorchScript: the extra file card.json;
    safetensors: the header).

    Args:
        run: the run's folder. output: the file to write; by default model.onnx (.pt, .export.safetensors) in it.
        data_dir, cache_dir: where the test set is; by default as the run was trained.

    Raises:
        ConfigError: the format is unknown, or what it needs is not installed. DataError: the run has no weights.
        FastmnistError: the exported model does not give the same predictions; no file is left.
    """
    check_choice("--format", format, get_args(Format))
    need(*NEEDS.get(format, ()), by=f"--format {format}")
    folder = RunFolder(Path(run))
    model, card = load_weights(folder.path)
    path = Path(output) if output is not None else folder.path / _default_name(format)
    whole = Classifier(model, card)
    with tempfile.TemporaryDirectory() as scratch, open_test_set(folder, card, data_dir, cache_dir) as test:
        temporary = Path(scratch) / path.name
        runner = WRITERS[format](whole, card, temporary)
        images, difference, accuracy = _compare(whole, runner, test, path)
        write_bytes(path, temporary.read_bytes())
    return Exported(path, format, images, difference, accuracy)


def need(*packages: str, by: str) -> None:
    """Raises ConfigError unless all of the optional packages can be imported; `by` is what needs them."""
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"{by} needs the package {name} ({error}): pip install 'fastmnist[export]'") from error


def open_test_set(folder: RunFolder, card: ModelCard, data_dir: str | None, cache_dir: str | None) -> Beton:
    """The compiled test set that the run was evaluated on; raises DataError where it cannot be had."""
    config = folder.read_config()
    prepared = prepare(card.dataset, data_dir or config.get("data_dir"), cache_dir or config.get("cache_dir"))
    return Beton(prepared.test)


def _default_name(format: Format) -> str:
    return f"model{'.export' if format == 'safetensors' else ''}{SUFFIXES[format]}"


def write_onnx(whole: Classifier, card: ModelCard, path: Path) -> Runner:
    """Writes and checks the file; needs `onnx` and `onnxruntime`."""
    import onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no further package is called old
        torch.onnx.export(
            whole,
            (whole.example,),
            str(path),
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )
    written = onnx.load(str(path))
    onnx.helper.set_model_props(written, {"fastmnist": json.dumps(asdict(card))})
    onnx.save(written, str(path))
    onnx.checker.check_model(str(path), full_check=True)
    return open_onnx(path)


def open_onnx(path: Path) -> Runner:
    """(B, C, H, W) float32 pixel values to (B, classes) float32 logits, computed by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: np.ndarray) -> np.ndarray:
        logits: np.ndarray = session.run(["logits"], {"images": images})[0]
        return logits

    return run


def _torchscript(whole: Classifier, card: ModelCard, path: Path) -> Runner:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises torch.export; programs in C++ read this
        traced = torch.jit.freeze(torch.jit.trace(whole, whole.example))
        torch.jit.save(traced, str(path), _extra_files={"card.json": json.dumps(asdict(card))})
        return _module(torch.jit.load(str(path)))


def _safetensors(whole: Classifier, card: ModelCard, path: Path) -> Runner:
    weights = {name: tensor.contiguous() for name, tensor in whole.model.state_dict().items()}
    safetensors.torch.save_file(weights, path, {"fastmnist": json.dumps(asdict(card))})
    other = card.build()
    other.load_state_dict(safetensors.torch.load_file(path))
    return _module(Classifier(other, card))


WRITERS: dict[str, Callable[[Classifier, ModelCard, Path], Runner]] = {
    "onnx": write_onnx,
    "torchscript": _torchscript,
    "safetensors": _safetensors,
}


def _module(module: Any) -> Runner:
    """The same for a torch module."""

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = module(torch.from_numpy(images)).numpy()
        return logits

    return run


def _compare(whole: Classifier, runner: Runner, test: Beton, path: Path) -> tuple[int, float, float]:
    """(images, largest difference of logits, accuracy of the exported model)."""
    difference, right = 0.0, 0
    for rows, expected, found in both(whole, runner, test):
        difference = max(difference, float(np.abs(expected - found).max()))
        other = int((expected.argmax(1) != found.argmax(1)).sum())
        if other or difference > TOLERANCE:
            raise FastmnistError(
                f"{path}: the exported model differs from the original on the test set: {other} other predictions "
                f"among images {rows[0]} to {rows[-1]}, logits off by up to {difference:.2g} (allowed {TOLERANCE}); "
                f"it was not kept, try another {flag('format')}"
            )
        right += int((found.argmax(1) == test.labels[rows]).sum())
    return len(test), difference, right / len(test)


def both(whole: Classifier, other: Runner, test: Beton) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(rows, (B, classes) logits of the original, those of the other) for the test set, batch by batch."""
    original = _module(whole)
    for start in range(0, len(test), EVALUATION_BATCH):
        rows = np.arange(start, min(start + EVALUATION_BATCH, len(test)))
        images = test.images(rows).astype(np.float32).reshape(len(rows), *test.image_shape)
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        yield rows, original(images), other(images)
