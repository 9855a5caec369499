"""A run before its first step: files, the settings that depend on them, device, precision, loaders, model, trainer."""

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
from fastmnist.config import TrainConfig, refuse_unused
from fastmnist.errors import ConfigError, DataError
from fastmnist.loader.augment import Augmentation
from fastmnist.loader.epochs import EpochLoader
from fastmnist.loader.loader import Loader
from fastmnist.loader_settings import LOADER_SETTINGS, LoaderName
from fastmnist.prepare.prepare import PrepareProgress, prepare
from fastmnist.system.machine import choose_device
from fastmnist.training.compiling import set_up_compile
from fastmnist.training.evaluate import EVALUATION_BATCH, EVALUATION_BATCH_ON_GPU, Evaluation, evaluate_model
from fastmnist.training.live_taps import use_live_taps
from fastmnist.training.loop import Trainer
from fastmnist.training.model import build_model, count_parameters, stop_counting
from fastmnist.training.optimizer import DEFAULT_RATES
from fastmnist.training.overlap import overlap
from fastmnist.training.precision import Precision, choose_compile, choose_precision

if TYPE_CHECKING:
    from fastmnist.system.progress import Reporter

VAL_SIZE, VAL_SHARE = 5000, 0.1
SPLIT_SEED = 0  # one validation split for all seeds, so that runs compare
MOST_EPOCHS = 20


@dataclass(frozen=True)
class RunFiles:
    """The two compiled files; note: why it is this dataset, empty when it was asked for."""

    train: Beton
    test: Beton
    note: str

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
    """All that a run is made of, put together once, for who trains, repeats or measures; a context manager.

    Attributes:
        config: resolved: every setting that depends on the data has its value.
        device, precision: of the trainer. parameters: of the model, as they are saved.
        data_seconds: that files and loaders took.

    Args:
        reporter: is told of files that are compiled, and of a dataset that is taken in another's place.
        precision: chooses it for a device; by default as config.amp says.
        resumed: the settings are those of a run that was begun with them.

    Raises:
        DataError: the data cannot be used. ConfigError: a setting cannot work here.
    """

    def __init__(
        self,
        config: TrainConfig,
        reporter: Reporter,
        *,
        precision: Callable[[torch.device], Precision] | None = None,
        resumed: bool = False,
    ) -> None:
        begun = time.perf_counter()
        self.files, self.config = open_files(config, reporter.compiling)
        with ExitStack() as failing:
            failing.callback(self.files.close)
            if self.files.note:
                reporter.say(self.files.note)
            self.device = choose_device(self.config.device)
            choose_compile(self.config.compile, self.device)  # says at once what cannot work
            self.precision = (
                choose_precision(self.config.amp, self.device) if precision is None else precision(self.device)
            )
            self.loaders = make_loaders(self.files, self.config, self.device, check_effect=not resumed)
            failing.callback(self.loaders.close)
            self.data_seconds = time.perf_counter() - begun
            model = self.make_model(self.config.seed)
            self.parameters = count_parameters(model)
            self.trainer = Trainer(model, self.loaders.train, self.config, self.precision)
            self._closing = failing.pop_all()

    def make_model(self, seed: int) -> nn.Module:
        """One with fresh weights of that seed, as it is trained here."""
        torch.manual_seed(seed)
        return make_model(self.files, self.config, self.device)

    def make_loaders(self, seed: int) -> RunLoaders:
        """Those of a run with that seed; the caller closes them."""
        return make_loaders(self.files, replace(self.config, seed=seed), self.device, check_effect=False)

    def set_up(self) -> tuple[str, str]:
        """Chooses and sets up how steps run: (mode, reason); see `set_up_compile`."""
        return set_up_compile(self.trainer, self.config.compile)

    def evaluate(self, loader: Loader, **options: Any) -> Evaluation:
        """What the model says of one of the loaders; options as `evaluate_model` takes them."""
        return evaluate_model(self.trainer.model, loader, *self.files.train.moments, **options)

    def close(self) -> None:
        self._closing.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_files(config: TrainConfig, progress: PrepareProgress) -> tuple[RunFiles, TrainConfig]:
    """Compiles what is missing, opens both files, and fills in every setting that depends on them.

    Raises:
        DataError: the data cannot be used. ConfigError: a setting does not fit the data.
    """
    prepared = prepare(config.dataset, config.data_dir, config.cache_dir, progress=progress)
    files = RunFiles(Beton(prepared.train, config.verify), Beton(prepared.test, config.verify), prepared.note)
    train, test = files.train, files.test
    if train.image_shape != test.image_shape or max(test.labels) >= len(train.class_names):
        raise DataError(
            f"{prepared.train} has {len(train.class_names)} classes and images of {train.image_shape}, "
            f"{prepared.test} has {len(test.class_names)} and {test.image_shape}; compile both from one source"
        )
    return files, _resolve(config, prepared.dataset, len(train))


def _resolve(config: TrainConfig, dataset: str, samples: int) -> TrainConfig:
    val_size = config.val_size
    if val_size is None:
        val_size = min(VAL_SIZE, int(samples * VAL_SHARE))
    images = samples - val_size
    if images < config.batch_size:
        raise ConfigError(
            f"--batch-size {config.batch_size} with --val-size {val_size}: {dataset} has {samples:,} training images, "
            f"which leaves {max(images, 0):,}, less than one batch; make either smaller"
        )
    return replace(
        config,
        dataset=dataset,
        data_dir=_absolute(config.data_dir),
        cache_dir=_absolute(config.cache_dir),
        val_size=val_size,
        epochs=config.epochs or _epochs(config.images_seen / images),
        learning_rate=config.learning_rate or DEFAULT_RATES[config.optimizer],
    )


def _epochs(passes: float) -> float:
    return passes if passes < 1 else float(min(round(passes), MOST_EPOCHS))


def _absolute(folder: str | None) -> str | None:
    return None if folder is None else str(Path(folder).expanduser().resolve())


def make_loaders(
    files: RunFiles, config: TrainConfig, device: torch.device, *, check_effect: bool = True
) -> RunLoaders:
    """The loaders of a resolved configuration, their batches on `device`; `config.loader` names that for training.

    Raises:
        ConfigError: a setting changes nothing on this device, and that is to be checked.
    """
    if check_effect:
        refuse_unused(config.to_dict(), device.type)
    training, validation = _split(files.train, config)

    common: dict[str, Any] = {
        "device": device,
        "rank": 0,  # one process; a sharded evaluation would be wrong in silence
        "world_size": 1,
    }

    def evaluation(file: Beton, indices: np.ndarray | None) -> Loader:
        size = EVALUATION_BATCH if device.type == "cpu" else EVALUATION_BATCH_ON_GPU
        return Loader(file, size, shuffle=False, indices=indices, **common, **_own(config, "ours"))

    return RunLoaders(
        train=LOADERS[config.loader](
            files.train,
            config.batch_size,
            seed=config.seed,
            indices=training,
            drop_last=True,
            **common,
            **loader_settings(config),
        ),
        validation=None if validation is None else evaluation(files.train, validation),
        test=evaluation(files.test, None),
    )


def make_model(files: RunFiles, config: TrainConfig, device: torch.device) -> nn.Module:
    """A model with fresh weights for these files, as it is trained: on `device`, in its layout, with live taps."""
    height, width, channels = files.train.image_shape
    model = build_model(
        config.model,
        stem=config.stem,
        num_classes=len(files.train.class_names),
        in_channels=channels,
        image_size=(height, width),
    )
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model = model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    if config.live_taps and config.model == "resnet18":
        use_live_taps(model, (height, width, channels))
    stop_counting(model)
    if device.type == "cuda":
        overlap(model)
    return model


def loader_settings(config: TrainConfig) -> dict[str, Any]:
    """What `LOADERS[config.loader]` is given for training that depends on which loader it is.

    An `augment` is among it where the loader augments and the Trainer does not (sample by sample).
    """
    settings = _own(config, config.loader)
    if config.loader == "dataloader" and config.augment:
        settings["augment"] = Augmentation(config.shift, config.rotation, config.scale)
    return {"order": config.order} | settings


def _own(config: TrainConfig, loader: LoaderName) -> dict[str, Any]:
    """The settings that a loader alone has; one that is None keeps the loader's own default."""
    values = {name: getattr(config, name) for name in LOADER_SETTINGS[loader]}
    return {name: value for name, value in values.items() if value is not None}


def _split(file: Beton, config: TrainConfig) -> tuple[np.ndarray, np.ndarray | None]:
    """The samples to train on and those held out, each class in proportion."""
    samples = np.arange(len(file))
    if not config.val_size:
        return samples, None
    try:
        parts = train_test_split(samples, test_size=config.val_size, stratify=file.labels, random_state=SPLIT_SEED)
    except ValueError as error:
        raise ConfigError(
            f"--val-size {config.val_size}: {config.dataset} cannot be split so: {error}; "
            "give another number, or 0 for no validation"
        ) from error
    training, validation = (np.sort(part) for part in parts)
    return training, validation
