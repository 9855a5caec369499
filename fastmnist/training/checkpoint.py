"""What a run leaves on disk to go on from, and what is loaded to predict with."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fastmnist.config import Stem
from fastmnist.errors import DataError
from fastmnist.files import write_bytes
from fastmnist.training.model import build_model

CHECKPOINT_VERSION = 1
CHECKPOINT, WEIGHTS = "checkpoint.pt", "model.safetensors"


@dataclass(frozen=True)
class ModelCard:
    """All that it takes to use the weights: kept in the header of model.safetensors.

    image_shape: (H, W, C). mean, std: per channel, of pixel values scaled to [0, 1].
    """

    model: str
    stem: Stem
    dataset: str
    class_names: Sequence[str]
    image_shape: Sequence[int]
    mean: Sequence[float]
    std: Sequence[float]

    def build(self) -> nn.Module:
        height, width, channels = self.image_shape
        return build_model(
            self.model,
            stem=self.stem,
            num_classes=len(self.class_names),
            in_channels=channels,
            image_size=(height, width),
        )


def save_weights(folder: Path, model: nn.Module, card: ModelCard) -> None:
    """Writes model.safetensors, whole or not at all."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    content = safetensors.torch.save(weights, {"fastmnist": json.dumps(asdict(card))})
    write_bytes(folder / WEIGHTS, content)


def load_weights(folder: Path) -> tuple[nn.Module, ModelCard]:
    """The trained model in evaluation mode, in channels_last, on the CPU.

    Raises:
        DataError: there are no weights in `folder`, or they are damaged.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        what = "holds no model.safetensors" if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: {what}; name a run's folder, such as fastmnist train prints at its end")
    try:
        with safe_open(path, framework="pt") as file:
            card = ModelCard(**json.loads((file.metadata() or {})["fastmnist"]))
        model = card.build()
        model.load_state_dict(safetensors.torch.load_file(path))
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be used ({reason}); train again, or restore it from a copy") from error
    return model.eval().to(memory_format=torch.channels_last), card  # type: ignore[call-overload]


def save_checkpoint(folder: Path, config: dict[str, Any], trainer: dict[str, Any]) -> None:
    """Writes checkpoint.pt, whole or not at all."""
    content = io.BytesIO()
    torch.save({"version": CHECKPOINT_VERSION, "config": config, "trainer": trainer}, content)
    write_bytes(folder / CHECKPOINT, content.getvalue())


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, trainer's state), with tensors on the CPU.

    Raises:
        DataError: there is no checkpoint in `folder`, or it is damaged.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        what = "holds no checkpoint.pt" if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: {what}; --resume names the folder of a run that was stopped")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["version"] != CHECKPOINT_VERSION:
            raise ValueError(f"version {content['version']} instead of {CHECKPOINT_VERSION}")
        return content["config"], content["trainer"]
    except (
        RuntimeError,
        pickle.UnpicklingError,
        KeyError,
        TypeError,
        ValueError,
        EOFError,
        OSError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: cannot be used ({reason}); begin the run anew") from error
