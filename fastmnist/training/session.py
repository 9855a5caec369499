"""Session: the one assembly of a run, from files to trainer."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import nn

from fastmnist.baselines.loaders import LOADERS
from fastmnist.beton.reader import Beton
from fastmnist.config import TrainConfig, flag, refuse_unused
from fastmnist.errors import ConfigError, DataError
from fastmnist.loader.augment import Augmentation
from fastmnist.loader.epochs import EpochLoader
from fastmnist.loader.loader import Loader
from fastmnist.loader.normalise import AnyMoments
from fastmnist.loader_settings import LOADER_SETTINGS, LoaderName
from fastmnist.prepare.prepare import prepare
from fastmnist.sources.colour import FLIPPED
from fastmnist.system.environment import versions
from fastmnist.system.machine import choose_device
from fastmnist.system.processes import check_agreement, check_launch, first_on_each_machine, launched, world_size
from fastmnist.training.compiling import set_up_compile
from fastmnist.training.evaluate import EVALUATION_BATCH, EVALUATION_BATCH_ON_GPU, Evaluation, evaluate_model
from fastmnist.training.live_taps import use_live_taps
from fastmnist.training.loop import Trainer
from fastmnist.training.model import build_model, count_parameters, stop_counting
from fastmnist.training.optimizer import DEFAULT_RATES
from fastmnist.training.overlap import overlap
from fastmnist.training.parallel import share_batch_norm
from fastmnist.training.precision import Precision, choose_compile, choose_precision

if TYPE_CHECKING:
    from fastmnist.system.progress import Reporter

VAL_SIZE, VAL_SHARE = 5000, 0.1
SPLIT_SEED = 0  # one validation split for all seeds, so that runs compare
MOST_EPOCHS = 20


@dataclass(frozen=True)
class RunFiles:
    """The two files of a dataset.

    note: says why it is this dataset; empty when the user named it. dataset: the name stored in the training file, or
    that of the files where it stores none.
    """

    train: Beton
    test: Beton
    note: str
    dataset: str

    def close(self) -> None:
        self.train.close()
        self.test.close()


@dataclass(frozen=True)
class RunLoaders:
    """train drops the last, partial batch; validation is None without a split; both others keep the file's order."""

    train: EpochLoader
    validation: Loader | None
    test: Loader

    def close(self) -> None:
        for loader in (self.train, self.validation, self.test):
            if loader is not None:
                loader.close()


class Session:
    """A run before its first step: files, device, precision, loaders, model and trainer; a context manager.

    Training, repeated runs and measurements all begin with one.

    Attributes:
        files, loaders, trainer: closed with the session.
        config: resolved: every setting that depends on the data has its value.
        device, precision: those of the trainer.
        parameters: number of the model's parameters, as they are saved.
        data_seconds: time to open the files and make the loaders.

    Args:
        config: the settings of the run.
        reporter: shows files being written, and says which dataset replaces one that is missing.
        precision: chooses it for a device; by default as config.amp says.
        resumed: the run was begun with these settings, which are not checked for an effect again.

    Raises:
        DataError: the data cannot be used.
        ConfigError: a setting cannot work here, or changes nothing.
    """

    def __init__(
        self,
        config: TrainConfig,
        reporter: Reporter,
        *,
        precision: Callable[[torch.device], Precision] | None = None,
        resumed: bool = False,
    ) -> None:
        check_launch()
        begun = time.perf_counter()
        self.files, self.config = self._open(config, reporter)
        with ExitStack() as failing:
            failing.callback(self.files.close)
            if self.files.note:
                reporter.say(self.files.note)
            self.device = choose_device(self.config.device)
            choose_compile(self.config.compile, self.device)  # refuses at once what cannot work
            self.precision = (
                choose_precision(self.config.amp, self.device) if precision is None else precision(self.device)
            )
            if not resumed:
                refuse_unused(self.config.to_dict(), self.device.type)
                for name in ("sync_batchnorm", "compress_gradients"):
                    if getattr(self.config, name) and not launched():
                        raise ConfigError(f"{flag(name)} has no effect without torchrun; leave it out")
            check_agreement(
                {
                    "version": versions(),
                    "setting": self.config.recipe() | {"amp": self.precision.name},
                    "training file": self.files.train.fingerprint,
                    "test file": self.files.test.fingerprint,
                }
            )
            self.loaders = self.make_loaders(self.config.seed)
            failing.callback(self.loaders.close)
            self.data_seconds = time.perf_counter() - begun
            model = self.make_model(self.config.seed)
            self.parameters = count_parameters(model)
            self.trainer = Trainer(model, self.loaders.train, self.config, self.precision)
            self._closing = failing.pop_all()

    def make_model(self, seed: int) -> nn.Module:
        """A model with fresh weights of that seed, on the device, in its layout, with live taps."""
        torch.manual_seed(seed)
        config, (height, width, channels) = self.config, self.files.train.image_shape
        model = build_model(
            config.model,
            stem=config.stem,
            num_classes=len(self.files.train.class_names),
            in_channels=channels,
            image_size=(height, width),
        )
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        model = model.to(device=self.device, memory_format=layout)  # type: ignore[call-overload]
        if config.live_taps and config.model == "resnet18":
            use_live_taps(model, (height, width, channels))
        stop_counting(model)
        if config.sync_batchnorm:
            share_batch_norm(model)
        # DistributedDataParallel sends a gradient when autograd has it, which must then be complete.
        if self.device.type == "cuda" and world_size() == 1:
            overlap(model)
        return model

    def make_loaders(self, seed: int) -> RunLoaders:
        """The loaders of a run with that seed, their batches on the device; the caller closes them."""
        config, files = self.config, self.files
        training, validation = self._split()

        def evaluation(file: Beton, indices: np.ndarray | None) -> Loader:
            size = EVALUATION_BATCH if self.device.type == "cpu" else EVALUATION_BATCH_ON_GPU
            whole: dict[str, Any] = {"indices": indices, "rank": 0, "world_size": 1}  # `evaluate_model` shares them
            return Loader(file, size, shuffle=False, device=self.device, **whole, **_own_settings(config, "ours"))

        return RunLoaders(
            train=LOADERS[config.loader](
                files.train,
                config.batch_size // world_size(),
                seed=seed,
                device=self.device,
                indices=training,
                drop_last=True,
                uneven="drop",
                **loader_arguments(config, files.train),
            ),
            validation=None if validation is None else evaluation(files.train, validation),
            test=evaluation(files.test, None),
        )

    def set_up(self) -> tuple[str, str]:
        """Chooses and sets up how steps run: (mode, reason); see `set_up_compile`."""
        return set_up_compile(self.trainer, self.config.compile)

    def evaluate(self, loader: Loader, **options: Any) -> Evaluation:
        """The model's answers to all images of `loader`; options as `evaluate_model` takes them."""
        return evaluate_model(self.trainer.model, loader, *self.files.train.moments, **options)

    def close(self) -> None:
        self._closing.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @staticmethod
    def _open(config: TrainConfig, reporter: Reporter) -> tuple[RunFiles, TrainConfig]:
        """Writes the files that are missing, opens both, and fills in every setting that depends on them."""
        with first_on_each_machine():
            prepared = prepare(
                config.dataset,
                config.data_dir,
                config.cache_dir,
                image_size=config.image_size,
                progress=reporter.writing,
            )
        train, test = Beton(prepared.train, config.verify), Beton(prepared.test, config.verify)
        if train.image_shape != test.image_shape or max(test.labels) >= len(train.class_names):
            raise DataError(
                f"{prepared.train} has {len(train.class_names)} classes and images of {train.image_shape}, "
                f"{prepared.test} has {len(test.class_names)} and {test.image_shape}; compile both from one source"
            )
        share, rest = divmod(config.batch_size, world_size())
        if rest or share < 2:  # batch normalisation needs two
            fitting = max(2 * world_size(), config.batch_size - rest)
            raise ConfigError(
                f"--batch-size {config.batch_size} cannot be shared equally by {world_size()} processes, at least 2 "
                f"images each: say {fitting} or {fitting + world_size()}"
            )
        val_size = config.val_size
        if val_size is None:
            val_size = min(VAL_SIZE, int(len(train) * VAL_SHARE))
        images = len(train) - val_size
        if images < config.batch_size:
            raise ConfigError(
                f"--batch-size {config.batch_size} with --val-size {val_size}: {prepared.dataset} has {len(train):,} "
                f"training images, which leaves {max(images, 0):,}, less than one batch; make either smaller"
            )
        passes = config.images_seen / images
        stored = train.integrity.dataset if train.integrity else ""
        return RunFiles(train, test, prepared.note, stored or prepared.dataset), replace(
            config,
            dataset=prepared.dataset,
            data_dir=_absolute(config.data_dir),
            cache_dir=_absolute(config.cache_dir),
            val_size=val_size,
            epochs=config.epochs or (passes if passes < 1 else float(min(round(passes), MOST_EPOCHS))),
            learning_rate=config.learning_rate or DEFAULT_RATES[config.optimizer],
            flip=prepared.dataset in FLIPPED if config.flip is None else config.flip,
        )

    def _split(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The samples to train on and those held out, each class in proportion."""
        config, file = self.config, self.files.train
        samples = np.arange(len(file))
        if not config.val_size:
            return samples, None
        try:
            parts = train_test_split(samples, test_size=config.val_size, stratify=file.labels, random_state=SPLIT_SEED)
        except ValueError as error:
            raise ConfigError(
                f"--val-size {config.val_size}: {config.dataset} cannot be split this way: {error}; "
                "give another number, or 0 for no validation"
            ) from error
        training, validation = (np.sort(part) for part in parts)
        return training, validation


def _absolute(folder: str | None) -> str | None:
    return None if folder is None else str(Path(folder).expanduser().resolve())


def loader_arguments(config: TrainConfig, train: AnyMoments) -> dict[str, Any]:
    """The arguments that a run passes to `LOADERS[config.loader]` alone; `train` is the file of its training images.

    With `moments` and `augment` for a loader that applies them sample by sample; the Trainer does so for the others.
    """
    arguments = _own_settings(config, config.loader)
    if config.loader == "dataloader":
        arguments["moments"], arguments["augment"] = train, Augmentation.of(config)
    return {"order": config.order} | arguments


def _own_settings(config: TrainConfig, loader: LoaderName) -> dict[str, Any]:
    """The settings that `loader` owns, without those left to its own default (None)."""
    values = {name: getattr(config, name) for name in LOADER_SETTINGS[loader]}
    return {name: value for name, value in values.items() if value is not None}
