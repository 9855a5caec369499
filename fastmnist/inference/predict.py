"""A finished run's model: its accuracy on the test set, and predictions for pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastmnist.beton.reader import Beton
from fastmnist.errors import ConfigError, DataError
from fastmnist.inference.picture import read_picture
from fastmnist.loader.loader import Loader
from fastmnist.loader.normalise import Normaliser
from fastmnist.prepare.prepare import prepare
from fastmnist.sources.pictures import open_picture
from fastmnist.system.machine import choose_device
from fastmnist.system.processes import first_on_each_machine
from fastmnist.training.checkpoint import ModelCard, load_weights
from fastmnist.training.evaluate import EVALUATION_BATCH, Evaluation, evaluate_model
from fastmnist.training.run_folder import RunFolder


@dataclass(frozen=True)
class Prediction:
    """probabilities: (classes,) float32, in the order of the class names.

    >>> prediction = Prediction(Path("seven.png"), "0123456789", np.eye(10)[7])
    >>> prediction.label
    '7'
    >>> prediction.ranked()[0]
    ('7', 1.0)
    """

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


class PictureModel:
    """A run's model for pictures, on the CPU: of one character, or in colour.

    Attributes:
        size: (H, W) of the images that it takes.
        colour: whether they are RGB.

    Args:
        drawn: the pictures are drawings, for which the model must take square grey images.

    Raises:
        DataError: the folder holds no weights.
        ConfigError: the model takes neither square grey images nor RGB.
    """

    model: nn.Module
    card: ModelCard

    def __init__(self, run: Path, *, drawn: bool = False) -> None:
        self.model, self.card = load_weights(run)
        height, width, channels = self.card.image_shape
        if not (channels == 1 and height == width) and (drawn or channels != 3):
            raise ConfigError(
                f"{run}: predict takes models of square grey or of RGB images, demo of square grey ones; this one was "
                f"trained on {tuple(self.card.image_shape)}"
            )
        self.size, self.colour = (height, width), channels == 3
        self._normalise = Normaliser(self.card.mean, self.card.std)

    def input_of(self, path: Path) -> np.ndarray:
        """A picture as the model's input: a character as MNIST's images were made; RGB resized, as a folder's are.

        Returns:
            (H, W) or (H, W, 3) uint8.
        """
        if not self.colour:
            return read_picture(path, self.size[0])
        image = open_picture(path, str(path)).convert("RGB")
        return np.asarray(image.resize(self.size[::-1], Image.Resampling.BILINEAR))

    @torch.inference_mode()
    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """(n, H, W[, 3]) uint8 to (n, classes) float32."""
        batch = torch.from_numpy(images).view(-1, *self.card.image_shape).permute(0, 3, 1, 2)
        probabilities: np.ndarray = self.model(self._normalise(batch)).softmax(1).numpy()
        return probabilities


def predict(run: str | Path, pictures: Sequence[str | Path]) -> list[Prediction]:
    """Predicts what is on pictures of any size: of a character, dark on light or light on dark, for a grey model.

    Raises:
        ConfigError: no picture is named, or the model takes neither square grey images nor RGB.
        DataError: the folder holds no weights.
        FastmnistError: a picture cannot be read, or is blank.
    """
    paths = [Path(picture) for picture in pictures]
    if not paths:
        raise ConfigError("predict takes at least one picture: name an image file")
    model = PictureModel(Path(run))
    probabilities = model.probabilities(np.stack([model.input_of(path) for path in paths]))
    return [Prediction(path, model.card.class_names, row) for path, row in zip(paths, probabilities, strict=True)]


def evaluate(
    run: str | Path, *, data_dir: str | None = None, cache_dir: str | None = None, device: str = "auto"
) -> tuple[Evaluation, Sequence[str]]:
    """Evaluates the run's model on the test set that belongs to its training set, in float32.

    Args:
        run: the run's folder.
        data_dir, cache_dir: as in training; by default those of the run.
        device: "auto", "cpu", "cuda".

    Returns:
        The evaluation and the class names.

    Raises:
        DataError: the folder holds no weights, or the test set does not belong to them.
    """
    model, card = load_weights(Path(run))
    chosen = choose_device(device)
    with open_test_set(Path(run), card, data_dir, cache_dir) as file:
        loader = Loader(file, EVALUATION_BATCH, shuffle=False, device=chosen, rank=0, world_size=1)
        result = evaluate_model(model.to(chosen), loader, tuple(card.mean), tuple(card.std))
    return result, card.class_names


def open_test_set(run: Path, card: ModelCard, data_dir: str | None, cache_dir: str | None) -> Beton:
    """The test set of the data that the run was trained on; the folders are by default those of the run.

    Raises:
        DataError: it cannot be had, or has other classes or another image shape than the model.
    """
    config = RunFolder(run).read_config()
    with first_on_each_machine():
        prepared = prepare(
            card.dataset,
            data_dir or config.get("data_dir"),
            cache_dir or config.get("cache_dir"),
            image_size=config.get("image_size"),
        )
    file = Beton(prepared.test)
    stored = file.integrity.class_names if file.integrity else ()  # a file without names may lack a class
    named = not stored or stored == tuple(card.class_names)
    if not named or max(file.labels) >= len(card.class_names) or file.image_shape != tuple(card.image_shape):
        file.close()
        raise DataError(
            f"{prepared.test}: has {len(file.class_names)} classes and images of {file.image_shape}; the model in "
            f"{run} was trained on {len(card.class_names)} classes and {tuple(card.image_shape)}"
        )
    return file
