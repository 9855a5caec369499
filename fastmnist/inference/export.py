"""A run's model for other programs: ONNX or TorchScript, checked against the original on the test set."""

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
import torch
from torch import nn

from fastmnist.beton.reader import Beton
from fastmnist.config import flag
from fastmnist.errors import ConfigError, FastmnistError
from fastmnist.files import write_bytes
from fastmnist.inference.predict import open_test_set
from fastmnist.loader.epochs import check_choice
from fastmnist.loader.normalise import Normaliser
from fastmnist.training.checkpoint import WEIGHTS, ModelCard, load_weights
from fastmnist.training.evaluate import EVALUATION_BATCH

Format = Literal["onnx", "torchscript"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torchscript": ".pt"}
TOLERANCE = 1e-3  # of logits, which are some units large
OPSET = 17

Logits = Callable[[np.ndarray], np.ndarray]  # (B, C, H, W) float32 pixel values to (B, classes) float32 logits


@dataclass(frozen=True)
class Exported:
    """images: size of the test set that both models saw. largest_difference: between their logits."""

    path: Path
    format: str
    images: int
    largest_difference: float
    test_accuracy: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}


class Classifier(nn.Module):
    """Normalisation and model in one: (B, C, H, W) float32 pixel values 0 to 255 to (B, classes) logits."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, card: ModelCard) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        constants = Normaliser(card.mean, card.std)
        self.register_buffer("mean", constants.mean * 255)  # buffers go where the model goes
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
    """Writes a run's model in another format and compares it with the original on the run's test set.

    Input "images": (B, C, H, W) float32 pixel values 0 to 255, B free; normalisation is inside. Output "logits":
    (B, classes). Class names, mean and std are in ONNX's metadata, or in TorchScript's extra file card.json.

    Args:
        run: the run's folder.
        output: the file to write; by default model.onnx or model.pt in the run's folder.
        data_dir, cache_dir: where the test set is; by default as in the run.

    Raises:
        ConfigError: the format is unknown, or a package that it needs is missing.
        DataError: the run has no weights.
        FastmnistError: the exported model predicts other classes; no file is left.
    """
    folder = Path(run)
    if format == "safetensors":
        raise ConfigError(
            f"{flag('format')} safetensors: {WEIGHTS} in the run's folder is that already, with torchvision's names; "
            f"there are {', '.join(get_args(Format))}"
        )
    check_choice(flag("format"), format, get_args(Format))
    if format == "onnx":
        require_packages("onnx", "onnxruntime", by="--format onnx")
    model, card = load_weights(folder)
    path = Path(output) if output is not None else folder / f"model{SUFFIXES[format]}"
    original = Classifier(model, card)
    with tempfile.TemporaryDirectory() as scratch, open_test_set(folder, card, data_dir, cache_dir) as test:
        temporary = Path(scratch) / path.name
        exported = WRITERS[format](original, card, temporary)
        difference, accuracy = _compare(original, exported, test, path)
        write_bytes(path, temporary.read_bytes())
        return Exported(path, format, len(test), difference, accuracy)


def require_packages(*names: str, by: str) -> None:
    """Raises ConfigError unless all of the optional packages can be imported; `by` is the flag that needs them."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"{by} needs the package {name} ({error}): pip install '.[export]'") from error


def write_onnx(classifier: Classifier, card: ModelCard, path: Path) -> Logits:
    """Writes and checks the file, then opens it; needs `onnx` and `onnxruntime`."""
    import onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates this exporter, the one that needs no further package
        torch.onnx.export(
            classifier,
            (classifier.example,),
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


def open_onnx(path: Path) -> Logits:
    """The model in onnxruntime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def logits(images: np.ndarray) -> np.ndarray:
        values: np.ndarray = session.run(["logits"], {"images": images})[0]
        return values

    return logits


def _write_torchscript(classifier: Classifier, card: ModelCard, path: Path) -> Logits:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises torch.export, which programs in C++ cannot read
        traced = torch.jit.freeze(torch.jit.trace(classifier, classifier.example))
        torch.jit.save(traced, str(path), _extra_files={"card.json": json.dumps(asdict(card))})
        return _logits_of(torch.jit.load(str(path)))


WRITERS: dict[Format, Callable[[Classifier, ModelCard, Path], Logits]] = {
    "onnx": write_onnx,
    "torchscript": _write_torchscript,
}


def _logits_of(module: Any) -> Logits:
    def logits(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            values: np.ndarray = module(torch.from_numpy(images)).numpy()
        return values

    return logits


def _compare(original: Classifier, exported: Logits, test: Beton, path: Path) -> tuple[float, float]:
    """(largest difference of logits, accuracy of the exported model)."""
    difference, right = 0.0, 0
    for rows, expected, actual in logits_of_both(original, exported, test):
        difference = max(difference, float(np.abs(expected - actual).max()))
        changed = int((expected.argmax(1) != actual.argmax(1)).sum())
        if changed or difference > TOLERANCE:
            raise FastmnistError(
                f"{path}: the exported model differs from the original on the test set: {changed} other predictions "
                f"among images {rows[0]} to {rows[-1]}, logits off by up to {difference:.2g} (allowed {TOLERANCE}); "
                f"it was not kept, try another {flag('format')}"
            )
        right += int((actual.argmax(1) == test.labels[rows]).sum())
    return difference, right / len(test)


def logits_of_both(
    original: Classifier, exported: Logits, test: Beton
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(rows (B,), original's logits (B, classes), the exported model's) over the test set, batch by batch."""
    expected = _logits_of(original)
    for start in range(0, len(test), EVALUATION_BATCH):
        rows = np.arange(start, min(start + EVALUATION_BATCH, len(test)))
        images = np.ascontiguousarray(test.images(rows).transpose(0, 3, 1, 2), np.float32)
        yield rows, expected(images), exported(images)
