"""What a finished run is good for: evaluation on its test set, and predictions for pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastmnist.beton.reader import Beton
from fastmnist.errors import ConfigError, DataError
from fastmnist.inference.picture import read_picture
from fastmnist.loader.loader import Loader
from fastmnist.loader.normalise import Normaliser
from fastmnist.prepare.prepare import prepare
from fastmnist.system.machine import choose_device
from fastmnist.training.checkpoint import load_weights
from fastmnist.training.evaluate import EVALUATION_BATCH, Evaluation, evaluate_model
from fastmnist.training.run_folder import RunFolder


@dataclass(frozen=True)
class Prediction:
    """probabilities: one per class name, in their order."""

    path: Path
    class_names: Sequence[str]
    probabilities: np.ndarray

    @property
    def label(self) -> str:
        return self.class_names[int(self.probabilities.argmax())]

    def ranked(self) -> list[tuple[str, float]]:
        """(class name, probability), the most probable first."""
        order = np.argsort(-self.probabilities, kind="stable")
        return [(self.class_names[i], float(self.probabilities[i])) for i in order]


def evaluate(
    run: str | Path, *, data_dir: str | None = None, cache_dir: str | None = None, device: str = "auto"
) -> tuple[Evaluation, Sequence[str]]:
    """The run's model on the test set of the data that it was trained on, in float32.

    Args:
        run: the run's folder.
        data_dir, cache_dir: as in training; by default those that the run was trained with.
        device: "auto", "cpu", "cuda".

    Returns:
        The evaluation and the class names.

    Raises:
        DataError: the folder holds no weights, or the test set is not the one that belongs to them.
    """
    folder = RunFolder(Path(run))
    model, card = load_weights(folder.path)
    config = folder.read_config()
    prepared = prepare(card.dataset, data_dir or config.get("data_dir"), cache_dir or config.get("cache_dir"))
    chosen = choose_device(device)
    with Beton(prepared.test) as file:
        if file.class_names != tuple(card.class_names) or file.image_shape != tuple(card.image_shape):
            raise DataError(
                f"{prepared.test}: has {len(file.class_names)} classes and images of {file.image_shape}; the model in "
                f"{folder.path} was trained on {len(card.class_names)} classes and {tuple(card.image_shape)}"
            )
        loader = Loader(file, EVALUATION_BATCH, shuffle=False, device=chosen, rank=0, world_size=1)
        result = evaluate_model(model.to(chosen), loader, tuple(card.mean), tuple(card.std))
    return result, card.class_names


@torch.inference_mode()
def predict(run: str | Path, pictures: Sequence[str | Path]) -> list[Prediction]:
    """What the run's model sees in pictures of any size, in colour or grey, dark on light or light on dark.

    Raises:
        ConfigError: no picture is named, or the model does not take square grey images. DataError: the folder holds no
        weights. FastmnistError: a picture cannot be read, or nothing is on it.
    """
    paths = [Path(picture) for picture in pictures]
    if not paths:
        raise ConfigError("predict takes at least one picture: name an image file")
    model, card = load_weights(Path(run))
    height, width, channels = card.image_shape
    if channels != 1 or height != width:
        raise ConfigError(
            f"{run}: predict takes models of square grey images, this one was trained on {card.image_shape}"
        )
    images = np.stack([read_picture(path, height) for path in paths])
    batch = torch.from_numpy(images).view(-1, 1, height, width)
    values = Normaliser(card.mean, card.std)(batch)
    probabilities = model(values).softmax(1).numpy()
    return [Prediction(path, card.class_names, row) for path, row in zip(paths, probabilities, strict=True)]
