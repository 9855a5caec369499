"""Training loops to measure: the step of a run without its folder, and batches of any loader, without an end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError
from fastmnist.loader.augment import Augmentation
from fastmnist.loader.epochs import Batch
from fastmnist.system.progress import Reporter
from fastmnist.training.loop import Trainer, fastest_convolutions
from fastmnist.training.precision import choose_compile

if TYPE_CHECKING:
    from fastmnist.training.session import RunFiles, RunLoaders


class TrainingSetup(NamedTuple):
    """What `training_setup` gives.

    files: the compiled files; `files.train` is the one to load from.
    config: resolved: every setting that depends on the data has its value.
    device: of the model.
    indices: (n,) int64, the samples to train on, without those that are held out for validation.
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
    """Opens files and loaders, builds model and optimizer as a run does, and closes them when the block ends.

    Compiled only when `config.compile` names a mode; on a GPU the step is recorded. The learning rate stays the
    schedule's first, small one, and all batches are augmented by the same draws: a step costs what it costs in a run,
    and no loss grows without bound.

    Args:
        largest_batch: that `step` is given; by default config.batch_size.
        reporter: is told of files that are compiled and of the dataset that is taken in another's place.

    Raises:
        DataError: the data cannot be used.
        ConfigError: a setting cannot work, or a batch does not fit into the GPU's memory (raised by `step`).
        FastmnistError: the mode that `config.compile` names does not work here.
    """
    # torchvision and scikit-learn take seconds to import, and who measures a loop of their own needs neither.
    from fastmnist.training.session import Session

    with Session(config, reporter) as session:
        files, config, trainer = session.files, session.config, session.trainer
        height, width, _ = files.train.image_shape
        trainer.model.train()
        transforms = _transforms(config, largest_batch or config.batch_size, (height, width), session.device)
        if choose_compile(config.compile, session.device)[0] != "off":
            session.set_up()
        step = _step_of(trainer, transforms)
        yield TrainingSetup(files, config, session.device, trainer.loader.indices, session.loaders, step)


def _transforms(
    config: TrainConfig, count: int, image_size: tuple[int, int], device: torch.device
) -> torch.Tensor | None:
    """(count, 2, 3) on the device, drawn once; None without augmentation."""
    if not config.augment:
        return None
    augmentation = Augmentation(config.shift, config.rotation, config.scale)
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
