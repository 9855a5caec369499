"""Training run: from a dataset's name to a folder with the trained model, its figures and pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmnist.config import TrainConfig, checked_settings, flag, without_unused
from fastmnist.errors import ConfigError, DataError, FastmnistError
from fastmnist.loader.loader import Loader
from fastmnist.measure.watch import Watch
from fastmnist.runs.tensorboard import summary_writer, tensorboard_events
from fastmnist.system.environment import hardware, tuned_on, versions
from fastmnist.system.interrupt import stop_on_ctrl_c
from fastmnist.system.numbers import duration
from fastmnist.system.processes import backend, broadcast, rank, world_size
from fastmnist.system.progress import Reporter
from fastmnist.training.checkpoint import (
    CHECKPOINT,
    Checkpoints,
    ModelCard,
    load_checkpoint,
    save_checkpoint,
    save_weights,
)
from fastmnist.training.evaluate import Evaluation, StopRequested
from fastmnist.training.loop import Record
from fastmnist.training.precision import Precision, choose_precision, keep_precision
from fastmnist.training.run_folder import CONFIG, RunFolder
from fastmnist.training.session import Session


@dataclass(frozen=True)
class TrainResult:
    """The run's folder and the content of its summary.json."""

    folder: Path
    summary: dict[str, Any]

    @property
    def interrupted(self) -> bool:
        return bool(self.summary["interrupted"])


def train(
    config: TrainConfig, *, reporter: Reporter | None = None, started: float | None = None, watch: bool = False
) -> TrainResult:
    """Prepares the data where needed, trains, evaluates on the test set once, draws, and writes the run's folder.

    >>> config = TrainConfig(dataset="digits", model="small-cnn", epochs=1, out="run", cache_dir="cache", quiet=True)
    >>> result = train(config)  # doctest: +ELLIPSIS
    Test accuracy ... on digits ...
    run/report.html shows the run.
    >>> result.folder.name, result.summary["train_images"], result.summary["val_images"], result.summary["test_images"]
    ('run', 1294, 143, 360)

    Args:
        config: all settings.
        reporter: shows progress; by default on standard output.
        started: time.perf_counter() at the start of the total clock; by default now.
        watch: measure each step; the folder gets watch.json and watch.png.

    Raises:
        FastmnistError: bad data, a setting that cannot work, a loss that is no longer finite, a folder or disk that
            cannot be written. Ctrl-C does not raise: it ends the run with `interrupted` in the summary.
    """
    return _Run(config, reporter or Reporter(config.quiet, silent=rank() > 0), started, watch=watch).execute()


def resume(
    folder: str | Path,
    given: dict[str, Any] | None = None,
    *,
    reporter: Reporter | None = None,
    started: float | None = None,
    watch: bool = False,
) -> TrainResult:
    """Resumes a run that was stopped, at its exact next batch.

    Args:
        folder: the run's folder.
        given: settings that must agree with the run's.

    Raises:
        FastmnistError: as `train`; the run is complete, another process writes it, or its data or settings changed.
    """
    run = RunFolder(Path(folder), writes=not rank())
    if run.writes and any((run.path / name).exists() for name in (CONFIG, CHECKPOINT)):
        try:
            run.claim()
        except OSError as error:
            raise FastmnistError(f"{run.path}: cannot be written: {error.strerror or error}") from error
    try:
        # The first process reads: others may be on machines that do not have the folder.
        config, state = broadcast(_read_stopped(run, given or {}) if run.writes else None)
        reporter = reporter or Reporter(config.quiet, silent=rank() > 0)
        return _Run(config, reporter, started, (run, state), watch).execute()
    finally:
        run.release()


def _read_stopped(run: RunFolder, given: dict[str, Any]) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings and the trainer's state of a run that was stopped, whose settings agree with `given`."""
    if (run.path / CONFIG).exists() and not (run.path / CHECKPOINT).exists():
        raise DataError(
            f"{run.path}: this run was stopped at step 0, before its first checkpoint, so there is nothing to resume; "
            f"fastmnist train --config {run.path / CONFIG} starts it again in a new folder"
        )
    content, state = load_checkpoint(run.path)
    saved = checked_settings(content, f"{run.path / CHECKPOINT}: ")
    in_file = run.read_config()
    for source, values, names in (
        (f"{run.path / CONFIG} has", in_file, sorted(saved.keys() | in_file.keys())),
        ("the command line has", given, sorted(given)),
    ):
        for name in names:
            before, now = (mapping.get(name, "nothing") for mapping in (saved, values))
            if before != now:
                raise ConfigError(
                    f"{run.path} was trained with {flag(name)} {before}, {source} {now}; "
                    "a resumed run keeps its settings: take the change back, or start a new run"
                )
    config = TrainConfig(**without_unused(saved))
    summary = run.read_summary()
    if summary.get("interrupted") is False:
        raise ConfigError(f"{run.path}: this run is complete; there is nothing to resume")
    return config, {"amp": _begun_with(summary, state)} | state


def _begun_with(summary: dict[str, Any], state: dict[str, Any]) -> str | None:
    """The precision of a run whose checkpoint is too old to name it; None if unknown."""
    scaler = state.get("scaler")
    return "fp16" if isinstance(scaler, dict) and scaler else summary.get("amp")


class _Run:
    """One call of `train` or `resume`, its methods in the order in which they run."""

    def __init__(
        self,
        config: TrainConfig,
        reporter: Reporter,
        started: float | None,
        resumed: tuple[RunFolder, dict[str, Any]] | None = None,
        watch: bool = False,
    ) -> None:
        self.config, self.reporter, self.resumed = config, reporter, resumed
        self.watch = Watch(()) if watch else None  # the trainer has the chunks
        self.started = started or time.perf_counter()
        self.clocks = {"compile": 0.0, "evaluate": 0.0}  # seconds

    def execute(self) -> TrainResult:
        if self.config.tensorboard:
            summary_writer()  # fails at once when it is not installed
        with Session(
            self.config, self.reporter, precision=self._choose_precision, resumed=self.resumed is not None
        ) as self.session:
            return self._execute()

    def _execute(self) -> TrainResult:
        session, resumed = self.session, self.resumed
        self.config, self.files = session.config, session.files
        self.loaders, self.trainer = session.loaders, session.trainer
        if self.watch is not None:
            self.trainer.watched = partial(self.watch.over, steps=self.trainer.chunk)
        self._compare_with_tuning()
        self.card = self._make_card()
        self.epochs = math.ceil(self.trainer.steps / len(self.loaders.train))
        self.records: list[Record] = []
        if resumed is None:
            self.folder = RunFolder.create(self.config.out, Path(str(self.config.dataset)).name)
            self.config = replace(self.config, out=None)  # another run of this config takes a new folder
        else:
            self.folder = resumed[0]
        try:
            if resumed is None:
                self.folder.write_config(self.config)
            else:
                self._load(resumed[1])
            self._announce()
            self._set_up_compile()
            return self._train()
        except BaseException:
            if resumed is None and not (self.folder.path / CHECKPOINT).exists():
                self.folder.discard()  # there is nothing to resume
            raise
        finally:
            self.folder.release()

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.clocks[name] += time.perf_counter() - begun

    def _choose_precision(self, device: torch.device) -> Precision:
        """A resumed run keeps its precision, whatever "auto" would choose on this device."""
        resumed = self.resumed
        amp = None if resumed is None else resumed[1]["amp"]
        if resumed is None or (amp is None and self.config.amp != "auto"):
            return choose_precision(self.config.amp, device)
        if amp is not None:
            if not isinstance(amp, str) or amp not in ("off", "bf16", "fp16"):
                raise DataError(f"{resumed[0].path / CHECKPOINT}: names an unknown precision; restore it")
            return keep_precision(amp, device)
        chosen = choose_precision("auto", device)
        if chosen.scaled:  # the run had no scaler
            raise ConfigError(
                f"{resumed[0].path} was begun with --amp bf16 or off; its checkpoint does not say which, and this "
                "device would use fp16: resume it where it was begun, or start a new run"
            )
        return chosen

    def _load(self, state: dict[str, Any]) -> None:
        try:
            self._check_test_file(state)
            self.trainer.load_state_dict(state | {"amp": self.session.precision.name})
        except DataError as error:
            raise DataError(f"{self.folder.path / CHECKPOINT}: {error}; start a new run, or restore it") from error
        self.records = broadcast(self.folder.forget_after(self.trainer.step))  # all must find the same epochs ended

    def _compare_with_tuning(self) -> None:
        here = tuned_on(self.session.device, self.files.train.image_shape, self.files.dataset)
        if self.config.tuned_on not in (None, here):
            self.reporter.say(
                f"Warning: the loader's settings were tuned on {self.config.tuned_on}; this is {here}. They work, but "
                "others may be faster: fastmnist tune finds them."
            )

    def _make_card(self) -> ModelCard:
        mean, std = self.files.train.moments
        assert self.config.dataset is not None
        return ModelCard(
            model=self.config.model,
            stem=self.config.stem,
            dataset=self.config.dataset,
            class_names=self.files.train.class_names,
            image_shape=self.files.train.image_shape,
            mean=mean,
            std=std,
        )

    def _announce(self) -> None:
        trainer, config = self.trainer, self.config
        held_out = f" ({config.val_size:,} held out for validation)" if config.val_size else ""
        epochs = "1 epoch" if config.epochs == 1 else f"{config.epochs:.3g} epochs"
        if world_size() > 1:
            self.reporter.say(
                f"{world_size()} processes ({backend()}) share each step's {config.batch_size} images, "
                f"{config.batch_size // world_size()} each; the learning rate is that of {config.batch_size}"
            )
        self.reporter.say(
            f"{self.files.dataset}: {len(self.files.train):,} training images{held_out}, {len(self.files.test):,} test "
            f"images; {config.model}, {self.session.parameters:,} parameters; {epochs}, {trainer.steps:,} steps of "
            f"{config.batch_size} images, on {trainer.device}"
        )
        self.reporter.say(f"mixed precision {self.session.precision.name}: {self.session.precision.reason}")

    def _set_up_compile(self) -> None:
        """Sets up how steps run, outside the training clock."""
        with self._clock("compile"):
            self.compile_mode, self.compile_reason = self.session.set_up()
        self.reporter.say(f"compile {self.compile_mode}: {self.compile_reason}")

    def _train(self) -> TrainResult:
        with (
            stop_on_ctrl_c(self.reporter.say) as stop,
            Checkpoints(self.folder.path, self.config.to_dict(), self.folder.check) as self.checkpoints,
            tensorboard_events(self.folder.path, self.config.tensorboard and self.folder.writes) as events,
        ):
            self.events = events
            try:
                done = self._epochs(stop)
                evaluation = self._evaluate(self.loaders.test, stop) if done else None
            except StopRequested:
                evaluation = None
            summary = self._summary(evaluation)
            if self.folder.writes:
                self.folder.check()
                self.checkpoints.wait()
                save_checkpoint(self.folder.path, self.config.to_dict(), self._state(), self.folder.check)
                save_weights(self.folder.path, self.trainer.model, self.card)
                self._draw(evaluation, summary)
            summary["total_seconds"] = time.perf_counter() - self.started
            self.folder.write_summary(summary)
        self._conclude(summary)
        return TrainResult(self.folder.path, summary)

    def _epochs(self, stop: Callable[[], bool]) -> bool:
        """Trains the remaining epochs; False when the user stopped."""
        trainer = self.trainer
        if (finished := trainer.finished_epoch) is not None and not self._has_record(finished):  # it was interrupted
            self._finish_epoch(trainer.epoch_record(finished), stop)
        with self.reporter.training(len(trainer.rates), trainer.step, self.config.batch_size):
            while trainer.step < trainer.steps:
                record = trainer.run_epoch(
                    stop=stop,
                    on_log=self._log,
                    on_tick=lambda record: self.reporter.show(record, self.epochs),
                    after_step=self._keep_state,
                )
                if record is None:
                    return False
                self._finish_epoch(record, stop)
                if stop():
                    return False
        return True

    def _keep_state(self) -> None:
        if self.folder.writes and self.checkpoints.due():
            self.folder.check()
            if self.watch is not None:
                self.watch.mark("checkpoint")
            self.checkpoints.begin(self._state())

    def _state(self) -> dict[str, Any]:
        return self.trainer.state_dict() | {"test_file": self.files.test.fingerprint}

    def _check_test_file(self, state: dict[str, Any]) -> None:
        """The loader's state names the training file; the test file must be the same, too."""
        before, now = state.get("test_file"), self.files.test.fingerprint
        if before != now:
            raise DataError(
                f"{self.files.test.path}: the run was begun with test file {before}, this is {now}; "
                "restore the original data, or start a new run"
            )

    def _has_record(self, epoch: int) -> bool:
        return any(record["kind"] == "epoch" and record["epoch"] == epoch for record in self.records)

    def _log(self, record: Record) -> None:
        self._keep(record)
        self.reporter.show(record, self.epochs)

    def _finish_epoch(self, record: Record, stop: Callable[[], bool]) -> None:
        if self.loaders.validation is not None:
            validation = self._evaluate(self.loaders.validation, stop)
            record |= {"val_loss": validation.loss, "val_accuracy": validation.accuracy}
        self._keep(record)
        self.reporter.epoch(record, self.epochs)

    def _keep(self, record: Record) -> None:
        self.records.append(record)
        self.folder.append(record)
        if self.events is not None:
            prefix = "" if record["kind"] == "epoch" else "step/"
            for name, value in record.items():
                if isinstance(value, float):
                    self.events.add_scalar(prefix + name, value, record["step"])

    def _evaluate(self, loader: Loader, stop: Callable[[], bool]) -> Evaluation:
        with self._clock("evaluate"):
            return self.session.evaluate(loader, stop=stop)

    def _summary(self, evaluation: Evaluation | None) -> dict[str, Any]:
        trainer, config = self.trainer, self.config
        validated = [r["val_accuracy"] for r in self.records if r.get("val_accuracy") is not None]
        return {
            "test_accuracy": evaluation and evaluation.accuracy,
            "val_accuracy": validated[-1] if validated else None,
            "test_loss": evaluation and evaluation.loss,
            "train_seconds": trainer.seconds,
            "compile_seconds": self.clocks["compile"],
            "data_seconds": self.session.data_seconds,
            "evaluate_seconds": self.clocks["evaluate"],
            "total_seconds": time.perf_counter() - self.started,
            "images_per_second": trainer.images_per_second,
            "images_per_second_per_process": trainer.images_per_second / world_size(),
            "world_size": world_size(),
            "batch_size": config.batch_size,
            "batch_size_per_process": config.batch_size // world_size(),
            "backend": backend(),
            "device": str(trainer.device),
            "amp": self.session.precision.name,
            "compile": self.compile_mode,
            "compile_reason": self.compile_reason,
            "loader": config.loader,
            "dataset": self.files.dataset,
            "data_note": self.files.note,
            "train_images": len(self.loaders.train.indices),
            "val_images": config.val_size,
            "test_images": len(self.files.test),
            "steps": trainer.step,
            "epochs": config.epochs,
            "epochs_done": trainer.step / len(trainer.loader),
            "interrupted": evaluation is None,
            "seed": config.seed,
            "model": config.model,
            "parameters": self.session.parameters,
            "versions": versions(),
            "hardware": hardware(trainer.device),
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        }

    def _draw(self, evaluation: Evaluation | None, summary: dict[str, Any]) -> None:
        from fastmnist.report.curves import plot_curves
        from fastmnist.report.html import write_report
        from fastmnist.report.plots import plot_confusion, plot_predictions

        folder, names = self.folder.path, self.files.train.class_names
        pictures = {}
        if self.records:
            pictures["curves"] = folder / "curves.png"
            plot_curves(self.records, pictures["curves"])
        if self.watch is not None and self.watch.counted:
            pictures["watch"] = folder / "watch.png"
            self.watch.save(folder / "watch.json")
            self.watch.save(pictures["watch"])
            self.reporter.result(self.watch.verdict)
        if evaluation is not None:
            pictures |= {name: folder / f"{name}.png" for name in ("confusion", "predictions")}
            subject = f"{summary['dataset']}, {len(self.files.test):,} test images"
            plot_confusion(evaluation.confusion(), names, pictures["confusion"], subject=subject)
            images = self.files.test.images(np.arange(len(self.files.test)))
            plot_predictions(images, evaluation.labels, evaluation.probabilities, names, pictures["predictions"])
        write_report(
            folder / "report.html",
            summary=summary,
            config=self.config.to_dict(),
            records=self.records,
            pictures=pictures,
        )

    def _conclude(self, summary: dict[str, Any]) -> None:
        path = self.folder.path
        if summary["interrupted"]:
            self.reporter.result(
                f"Stopped after step {summary['steps']} of {len(self.trainer.rates)}; "
                f"fastmnist train --resume {path} resumes it."
            )
            return
        wrong = round((1 - summary["test_accuracy"]) * summary["test_images"])
        self.reporter.result(
            f"Test accuracy {summary['test_accuracy']:.2%} ({wrong:,} of {summary['test_images']:,} wrong) on "
            f"{summary['dataset']} after {duration(summary['train_seconds'])} of training at "
            f"{summary['images_per_second']:,.0f} images/s; {duration(summary['total_seconds'])} in all."
        )
        self.reporter.result(f"{path / 'report.html'} shows the run.")
