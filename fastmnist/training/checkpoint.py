"""Checkpoints to resume from, and weights to predict with."""

from __future__ import annotations

import copy
import functools
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fastmnist.config import Stem
from fastmnist.errors import DataError
from fastmnist.files import replacing, write_bytes
from fastmnist.training.model import build_model

CHECKPOINT_VERSION = 2  # 1 had no "amp"
SAVE_EVERY = 20.0  # seconds between checkpoints; with the time to write one, at most 30 s are lost
CHECKPOINT, WEIGHTS = "checkpoint.pt", "model.safetensors"


@dataclass(frozen=True)
class ModelCard:
    """Everything needed to use the weights; stored in the header of model.safetensors.

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


class Checkpoints:
    """Writes a run's checkpoint.pt at intervals, beside training.

    Training waits only while its state is copied in memory; a thread writes the copy. On a GPU the copy is made there,
    in the order of the training's stream, and read back on a stream of its own, for which no step waits.

    Args:
        folder, config: the run's folder and settings.
        clock: a clock in seconds.
        check: raises FastmnistError when the folder is no longer the run's.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        check: Callable[[], None] = lambda: None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._save = functools.partial(save_checkpoint, folder, config, check=check)
        self._last = clock()
        self._thread = ThreadPoolExecutor(1, "fastmnist-checkpoint")
        self._writing: Future[None] | None = None

    def due(self) -> bool:
        """Whether it is time for the next one. Raises FastmnistError when the last one could not be written."""
        if self._writing is not None:
            if not self._writing.done():
                return False
            self.wait()
        return self._clock() - self._last >= SAVE_EVERY

    def begin(self, state: dict[str, Any]) -> None:
        """Copies the trainer's state and starts writing it. Raises FastmnistError as `due` does."""
        self.wait()
        self._last = self._clock()
        ready: torch.cuda.Event | None = None
        try:
            copied = copy.deepcopy(state)
        except torch.OutOfMemoryError:  # no room for a copy on the GPU
            self._save(state)
            return
        if any(weight.is_cuda for weight in state["model"].values()):
            ready = torch.cuda.Event()
            ready.record()
        self._writing = self._thread.submit(self._write, copied, ready)

    def _write(self, state: dict[str, Any], ready: torch.cuda.Event | None) -> None:
        stream = None if ready is None else torch.cuda.Stream()
        if stream is not None and ready is not None:
            stream.wait_event(ready)
        with torch.cuda.stream(stream):
            self._save(state)

    def wait(self) -> None:
        """Waits for the last one. Raises FastmnistError when it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()


def save_checkpoint(
    folder: Path, config: Mapping[str, Any], trainer: Mapping[str, Any], check: Callable[[], None] = lambda: None
) -> None:
    """Writes checkpoint.pt, whole or not at all.

    Raises:
        FastmnistError: as `files.replacing` does, or raised by `check` before anything is written.
    """
    path = folder / CHECKPOINT
    hint = "make room"
    if path.exists():
        hint += f"; fastmnist train --resume {folder} then continues from the previous checkpoint, which is still there"
    content = io.BytesIO()  # torch.save hides why a file cannot be written
    torch.save({"version": CHECKPOINT_VERSION, "config": dict(config), "trainer": dict(trainer)}, content)
    with replacing(path, hint) as file:
        check()  # after the file was created, which would be lost with its folder
        file.write(content.getbuffer())


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, trainer's state), with tensors on the CPU; the trainer checks the state.

    Raises:
        DataError: there is no checkpoint in `folder`, or it is damaged.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        what = "holds no checkpoint.pt" if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: {what}; --resume names the folder of a run that was stopped")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not {"version", "config", "trainer"} <= content.keys():
            raise ValueError("it holds something else")
        version, config, trainer = content["version"], content["config"], content["trainer"]
        if type(version) is not int or not 1 <= version <= CHECKPOINT_VERSION:
            raise ValueError(f"its version is {str(version)[:40]} instead of 1 to {CHECKPOINT_VERSION}")
        if not isinstance(config, dict) or not isinstance(trainer, dict):
            raise ValueError("it holds something else")
    except Exception as error:  # the unpickler raises anything on a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: cannot be used ({reason}); restore it from a copy, or start a new run") from error
    return config, trainer
