"""Speedrun: the same run with many seeds in one process, for its mean accuracy and training time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
from scipy.stats import ttest_1samp

from fastmnist.config import TrainConfig
from fastmnist.errors import FastmnistError, check_limits
from fastmnist.loader.loader import Loader
from fastmnist.presets import verdict
from fastmnist.system.environment import origin
from fastmnist.system.interrupt import stop_on_ctrl_c
from fastmnist.system.numbers import duration
from fastmnist.system.processes import backend, gather, world_size
from fastmnist.system.progress import Reporter
from fastmnist.system.statistics import row
from fastmnist.training.loop import fastest_convolutions
from fastmnist.training.session import Session

POINTS = 10  # on the curve of accuracy over seconds
NEVER = 2**31  # steps between two log lines
CLAIM_SEEDS = 20  # fewest seeds for a claim about accuracy
AGE_WHEN_IMPORTED = time.time() - psutil.Process().create_time()  # seconds since this process began: imports, mostly


@dataclass(frozen=True)
class Speedrun:
    """Result of `speedrun`.

    runs: a dict per seed. test_accuracy (and test_accuracy_shifted, on request); data_seconds, from the open file to a
        loader, on a GPU with all images there; train_seconds; evaluate_seconds; and mlperf_seconds, the sum of the
        three: from the first touch of the data to the accuracy, without set-up, as MLPerf's training rules count. A
        run that diverged has `error`, and the accuracy of guessing.
    curve: train_seconds and test_accuracy along one more run with the first seed.
    setup: import_seconds, data_seconds, compile_seconds before the first run, and its settings.
    """

    runs: Sequence[dict[str, Any]]
    curve: Sequence[dict[str, float]]
    setup: dict[str, Any]
    origin: dict[str, Any]
    interrupted: bool
    target: float | None = None

    @property
    def accuracies(self) -> list[float]:
        return [run["test_accuracy"] for run in self.runs]

    @property
    def p_value(self) -> float | None:
        """Student's one-sided t-test of the mean accuracy against the target; None for fewer than 2 runs."""
        if self.target is None or len(self.runs) < 2:
            return None
        if len(set(self.accuracies)) == 1:  # no variance to test with, as when every run diverged
            return float(self.accuracies[0] <= self.target)
        return float(ttest_1samp(self.accuracies, self.target, alternative="greater").pvalue)

    @property
    def seconds(self) -> list[float]:
        return [run["train_seconds"] for run in self.runs]

    def rows(self) -> list[dict[str, Any]]:
        """Accuracy and training seconds as rows of a benchmark result."""
        settings = {name: self.setup[name] for name in ("preset", "command", "config")}
        rows = [
            row("speedrun", "test_accuracy", self.accuracies, "share", self.origin, settings),
            row("speedrun", "train_seconds", self.seconds, "seconds", self.origin, settings),
        ]
        for found in rows:
            found |= {"mean": statistics.fmean(found["values"]), "stdev": spread(found["values"])}
        return rows

    def to_dict(self) -> dict[str, Any]:
        return {
            "test_accuracy_mean": statistics.fmean(self.accuracies),
            "test_accuracy_stdev": spread(self.accuracies),
            "train_seconds_mean": statistics.fmean(self.seconds),
            "train_seconds_stdev": spread(self.seconds),
            "mlperf_seconds_mean": statistics.fmean(run["mlperf_seconds"] for run in self.runs),
            "target": self.target,
            "p_value": self.p_value,
            "n": len(self.runs),
            "interrupted": self.interrupted,
            **self.setup,
            "runs": list(self.runs),
            "curve": list(self.curve),
            "rows": self.rows(),
            **self.origin,
        }

    def verdict(self) -> str:
        """One sentence: accuracy, its spread, and the seconds."""
        n = len(self.runs)
        seeds = "1 seed" if n == 1 else f"{n} seeds"
        lowest, highest = min(self.accuracies), max(self.accuracies)
        claim, p = "", self.p_value
        if self.target is not None and p is not None and n >= CLAIM_SEEDS:
            margin = round(100 * (statistics.fmean(self.accuracies) - self.target), 3) + 0.0  # no -0
            claim = f"; {verdict(p)}: {margin:+.3f} points from {self.target:.1%}, p = {p:.2g} that it is no more"
        mlperf = statistics.fmean(run["mlperf_seconds"] for run in self.runs)
        return (
            f"{statistics.fmean(self.accuracies):.2%} test accuracy ({lowest:.2%} to {highest:.2%}) after "
            f"{duration(statistics.fmean(self.seconds))} of training ({duration(min(self.seconds))} to "
            f"{duration(max(self.seconds))}; {duration(mlperf)} by MLPerf's clock), mean of {seeds}{claim}"
        )


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def speedrun(
    config: TrainConfig,
    seeds: int = 20,
    *,
    preset: str = "none",
    command: str = "",
    curve: bool = True,
    shifted: bool = False,
    target: float | None = None,
    enough: Callable[[int], bool] = lambda done: False,
    reporter: Reporter | None = None,
    progress: Callable[[str, float], None] = lambda text, share: None,
) -> Speedrun:
    """Trains with `seeds` seeds from config.seed on, and evaluates each model once on the test set.

    The training clock of a seed runs from the data in place and the step compiled to the end of the last step. Set-up,
    compilation (once for all seeds), data and evaluation have clocks of their own. Weights, optimizer state, order and
    augmentation of a seed are those of `train` with that seed.

    >>> config = TrainConfig(dataset="digits", model="small-cnn", epochs=0.5, cache_dir="cache")
    >>> found = speedrun(config, seeds=2, curve=False)
    >>> [run["seed"] for run in found.runs], found.setup["steps"]
    ([0, 1], 6)

    Args:
        config: settings of the run; nothing is held out for validation unless val_size says so.
        preset, command: names for the result.
        curve: train the first seed once more, stopping the clock at some points to evaluate on the test set.
        shifted: also evaluate with logits averaged over each test image's shifts by a pixel.
        target: the accuracy, set beforehand, that the mean is tested against.
        enough: called after each seed with the number done; True leaves out the rest.
        reporter: shows what was chosen. progress: called with the current activity and the share done.

    Raises:
        FastmnistError: as `train`. Ctrl-C ends the speedrun; it raises only if no seed is done.
    """
    check_limits("--seeds", seeds, 1, math.inf)
    reporter = reporter or Reporter(quiet=True)
    config = replace(config, log_every=NEVER, val_size=config.val_size or 0)
    with Session(config, reporter) as session:
        repeated = _Repeated(session)
        reporter.say(repeated.describe())
        setup = repeated.setup() | {"import_seconds": AGE_WHEN_IMPORTED, "preset": preset, "command": command}
        return repeated.repeat(seeds, curve, shifted, target, enough, setup, reporter, progress)


class _Repeated:
    """One model and its recorded step, trained anew for each seed."""

    def __init__(self, session: Session) -> None:
        self.session, self.config, self.trainer = session, session.config, session.trainer
        begun = time.perf_counter()
        self.mode, self.reason = session.set_up()
        if session.device.type == "cuda":
            self._evaluate(session.loaders.test)  # cuDNN chooses its algorithms
        self.compile_seconds = time.perf_counter() - begun
        session.loaders.close()  # each seed has its own; a GPU's memory may hold only one

    def describe(self) -> str:
        session, trainer = self.session, self.trainer
        return (
            f"{session.files.dataset}, {self.config.model}, {session.parameters:,} parameters; {trainer.steps:,} steps "
            f"of {self.config.batch_size} images on {trainer.device}, mixed precision {session.precision.name}, "
            f"compile {self.mode} ({self.reason})"
        )

    def setup(self) -> dict[str, Any]:
        return {
            "data_seconds": self.session.data_seconds,
            "compile_seconds": self.compile_seconds,
            "world_size": world_size(),
            "backend": backend(),
            "device": str(self.session.device),
            "amp": self.session.precision.name,
            "compile": self.mode,
            "compile_reason": self.reason,
            "dataset": self.session.files.dataset,
            "parameters": self.session.parameters,
            "steps": self.trainer.steps,
            "train_images": len(self.trainer.loader.indices),
            "test_images": len(self.session.files.test),
            "config": self.config.recipe(),
        }

    def repeat(
        self,
        seeds: int,
        curve: bool,
        shifted: bool,
        target: float | None,
        enough: Callable[[int], bool],
        setup: dict[str, Any],
        reporter: Reporter,
        progress: Callable[[str, float], None],
    ) -> Speedrun:
        first, count = self.config.seed, seeds + curve
        runs: list[dict[str, Any]] = []
        points: list[dict[str, float]] = []
        interrupted = False
        with stop_on_ctrl_c(reporter.say) as stop:
            for number in range(seeds):
                progress(f"seed {first + number}, {number + 1} of {seeds}", number / count)
                found = self.run(first + number, shifted, stop)
                if found is None:
                    interrupted = True
                    break
                runs.append(found)
                wrong = f", {found['error']}" if "error" in found else ""
                accuracy, seconds = found["test_accuracy"], found["train_seconds"]
                reporter.say(f"seed {found['seed']}: {accuracy:.2%} after {duration(seconds)}{wrong}")
                if enough(len(runs)):
                    break
            if curve and not interrupted:
                progress(f"accuracy over seconds, seed {first}", seeds / count)
                points = self.curve(first, stop)
        if not runs:
            raise KeyboardInterrupt
        return Speedrun(runs, points, setup, origin(self.session.device), interrupted, target)

    def run(self, seed: int, shifted: bool, stop: Callable[[], bool]) -> dict[str, Any] | None:
        """Trains and evaluates one seed; None when the user stopped."""
        trainer = self.trainer
        model = self.session.make_model(seed)
        begun = time.perf_counter()
        loaders = self.session.make_loaders(seed)
        trainer.synchronize()
        found: dict[str, Any] = {"seed": seed, "data_seconds": time.perf_counter() - begun, "evaluate_seconds": 0.0}
        trainer.begin_again(model, loaders.train)
        with closing(loaders):
            try:
                while trainer.step < trainer.steps:
                    if trainer.run_epoch(stop=stop) is None:
                        return None
            except FastmnistError as error:  # the loss is no longer finite
                found |= {"error": str(error), "test_accuracy": 1 / len(self.session.files.test.class_names)}
            else:
                begun = time.perf_counter()
                found["test_accuracy"] = self._evaluate(loaders.test)
                found["evaluate_seconds"] = time.perf_counter() - begun
                if shifted:
                    found["test_accuracy_shifted"] = self._evaluate(loaders.test, shifted=True)
        found["train_seconds"] = trainer.seconds
        found["mlperf_seconds"] = sum(found[f"{clock}_seconds"] for clock in ("data", "train", "evaluate"))
        return found

    @fastest_convolutions
    def _evaluate(self, loader: Loader, *, shifted: bool = False) -> float:
        return self.session.evaluate(loader, shifted=shifted).accuracy

    def curve(self, seed: int, stop: Callable[[], bool]) -> list[dict[str, float]]:
        """Test accuracy along one run, the clock stopped at each point; empty when it diverges or is stopped."""
        trainer = self.trainer
        points: list[dict[str, float]] = []
        stops = {int(step) for step in np.linspace(0, trainer.steps, POINTS + 1).round()[1:]}
        loaders = self.session.make_loaders(seed)
        try:
            trainer.begin_again(self.session.make_model(seed), loaders.train)
            while trainer.step < trainer.steps:
                ended = trainer.run_epoch(stop=lambda: trainer.step in stops or stop())
                if any(gather(stop())):
                    return []
                if ended is None or trainer.step in stops:
                    accuracy = self._evaluate(loaders.test)
                    points.append({"train_seconds": trainer.seconds, "test_accuracy": accuracy})
        except FastmnistError:
            return []
        finally:
            loaders.close()
        return points
