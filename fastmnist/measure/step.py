"""Training step of a run, for any loader's batches, without a run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError
from fastmnist.loader.augment import Augmentation
from fastmnist.loader.epochs import Batch
from fastmnist.system.machine import synchronize
from fastmnist.system.progress import Reporter
from fastmnist.training.loop import Trainer, fastest_convolutions
from fastmnist.training.precision import choose_compile

if TYPE_CHECKING:
    from fastmnist.training.session import RunFiles, RunLoaders


class TrainingSetup(NamedTuple):
    """The parts of a run that are measured.

    files: the compiled files; load from `files.train`.
    config: resolved: every setting that depends on the data has its value.
    device: of the model.
    indices: (n,) int64, the training samples without the validation split.
    loaders: those of `config`, their batches on `device`.
    step: one training step with a batch of any loader over `files.train`: images (B, C, H, W), uint8 (augmented on the
        device) or float (augmented and normalised already), and labels (B,) int64, B at most `largest_batch`.
    """

    files: RunFiles
    config: TrainConfig
    device: torch.device
    indices: np.ndarray
    loaders: RunLoaders
    step: Callable[[Batch], None]


@contextmanager
def training_setup(
    config: TrainConfig, reporter: Reporter, largest_batch: int | None = None
) -> Iterator[TrainingSetup]:
    """Files, loaders, model and optimizer of a run, closed when the block ends.

    The step is compiled only if `config.compile` names a mode, and recorded on a GPU. It costs what it costs in a run,
    but the learning rate stays at the schedule's small first value, so that no loss diverges, and all batches are
    augmented by the same draws.

    Args:
        reporter: announces compilation and a substituted dataset.
        largest_batch: of those passed to `step`; by default config.batch_size.

    Raises:
        DataError: the data cannot be used.
        ConfigError: a setting cannot work, or a batch does not fit into the GPU's memory (raised by `step`).
        FastmnistError: the mode that `config.compile` names does not work here.
    """
    # Imports torchvision and scikit-learn, which take seconds and which a loop of one's own does not need.
    from fastmnist.training.session import Session

    with Session(config, reporter) as session:
        files, config, trainer = session.files, session.config, session.trainer
        height, width, _ = files.train.image_shape
        trainer.network = trainer.model  # each of several processes measures its own part of a step
        trainer.model.train()
        transforms = _transforms(config, largest_batch or config.batch_size, (height, width), session.device)
        if choose_compile(config.compile, session.device)[0] != "off":
            session.set_up()
        step = _step_of(trainer, transforms)
        yield TrainingSetup(files, config, session.device, trainer.loader.indices, session.loaders, step)


def fixed_batch_seconds(step: Callable[[Any], Any], batch: Any, count: int, device: torch.device) -> float:
    """Seconds per step over `count` steps on one batch: training without loading."""
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(count):
        step(batch)
    synchronize(device)
    return (time.perf_counter() - begun) / count


def _transforms(
    config: TrainConfig, count: int, image_size: tuple[int, int], device: torch.device
) -> torch.Tensor | None:
    """(count, 2, 3) on the device, drawn once; None without augmentation."""
    augmentation = Augmentation.of(config)
    if augmentation is None:
        return None
    matrices = augmentation.matrices(augmentation.draw(count, config.seed, 0), image_size)
    return torch.from_numpy(matrices).to(device)


def _step_of(trainer: Trainer, transforms: torch.Tensor | None) -> Callable[[Batch], None]:
    device, recorded = trainer.device, trainer.graph

    @fastest_convolutions
    def step(batch: Batch) -> None:
        images, labels = batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)
        part = None if transforms is None or images.dtype != torch.uint8 else transforms[: len(labels)]
        trainer.seek(0)  # there is no end of steps
        trainer.graph = recorded if len(labels) == trainer.loader.batch_size else None  # it has one size
        try:
            trainer.load(images, labels, part, 0)
            trainer.train_step(0)
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"--batch-size {len(labels)} does not fit into the memory of {device}; take a smaller one"
            ) from None

    return step
