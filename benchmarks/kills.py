"""Kill -9 at random moments of compile, expand, train, resume, tune and speedrun, and what is there afterwards.

    python benchmarks/kills.py --kills 200 --output benchmarks/results/kills.json
    python benchmarks/kills.py --cost 6 --output benchmarks/results/checkpoint_cost.json

Each command runs once undisturbed, which gives its duration and its result; then it is killed at a moment that is drawn
over that duration. After each kill every file under a final name must be whole, the same command or --resume must end
with the same bytes or weights, and no temporary file may be left then. Commands run in forks of this process, which
has imported everything, with one thread each and a checkpoint every 0.05 s.

--cost N measures what checkpoints cost instead: N turns of ResNet-18 with one every 2 s, and N without, alternating.
Give it an idle machine.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
import xml.dom.minidom
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from common import report, summarise
from PIL import Image
from safetensors.torch import load_file

from fastmnist.beton.reader import Beton
from fastmnist.cli import main as cli
from fastmnist.config import TrainConfig
from fastmnist.sources.datasets import DATASETS
from fastmnist.system.progress import Reporter
from fastmnist.training import checkpoint
from fastmnist.training.checkpoint import Checkpoints, load_checkpoint
from fastmnist.training.session import Session

IMPORTED = (
    "fastmnist.runs.train",
    "fastmnist.runs.speedrun",
    "fastmnist.prepare.expand",
    "fastmnist.measure.tune",
    "fastmnist.report.curves",
    "fastmnist.report.html",
    "fastmnist.report.plots",
    "fastmnist.report.tune_chart",
    "fastmnist.report.speedrun_chart",
    "sklearn.datasets",
)
KILL_SAVES_EVERY, COST_SAVES_EVERY = 0.05, 2.0
IMAGES = 30_000  # of the training set that is compiled
RUN = [
    "--dataset",
    "digits",
    "--model",
    "small-cnn",
    "--preset",
    "none",
    "--batch-size",
    "64",
    "--device",
    "cpu",
    "--amp",
    "off",
    "--quiet",
]
TRAIN = ["train", *RUN, "--epochs", "8", "--log-every", "5"]
TUNE = ["tune", *RUN, "--loader-only", "--budget", "5"]
SPEEDRUN = ["speedrun", *RUN, "--epochs", "3", "--seeds", "2"]
LEFT_OVER = (".tmp", ".lock")


class KillError(Exception):
    """What must not be after a kill."""


def begin(command: Sequence[object], log: Path) -> int:
    """The process id of a fork that runs a command of fastmnist; what it prints goes to `log`."""
    process = os.fork()
    if process:
        return process
    status = 99
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        checkpoint.SAVE_EVERY = KILL_SAVES_EVERY
        status = cli.main([str(word) for word in command])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(command: Sequence[object], log: Path, expected: int = 0) -> str:
    """Runs a command to its end and returns what it printed."""
    _, status = os.waitpid(begin(command, log), 0)
    printed = log.read_text()
    if os.waitstatus_to_exitcode(status) != expected:
        raise KillError(f"{command}: exit status {os.waitstatus_to_exitcode(status)} instead of {expected}: {printed}")
    return printed


def kill(command: Sequence[object], log: Path, after: float) -> bool:
    """Runs a command and kills it after so many seconds; False when it had ended by then."""
    process = begin(command, log)
    time.sleep(after)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status):
        raise KillError(f"{command}: {log.read_text()}")
    return os.WIFSIGNALED(status)


def check_beton(path: Path) -> None:
    with Beton(path, verify="full"):
        pass


def check_mapping(values: object) -> None:
    if not isinstance(values, dict):
        raise ValueError("no mapping")


def check_lines(path: Path) -> None:
    for line in path.read_text().split("\n")[:-1]:
        check_mapping(json.loads(line))


def check_page(path: Path) -> None:
    if not path.read_text().rstrip().endswith("</html>"):
        raise ValueError("its end is missing")


CHECKS: dict[str, Callable[[Path], object]] = {
    ".beton": check_beton,
    ".json": lambda path: check_mapping(json.loads(path.read_text())),
    ".jsonl": check_lines,
    ".yaml": lambda path: check_mapping(yaml.safe_load(path.read_text())),
    ".safetensors": load_file,
    ".pt": lambda path: load_checkpoint(path.parent),
    ".png": lambda path: Image.open(path).load(),
    ".svg": lambda path: xml.dom.minidom.parse(str(path)),
    ".html": check_page,
}


def check_whole(folder: Path) -> None:
    """Every file under a final name can be read to its end."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.endswith(LEFT_OVER):
            try:
                CHECKS[path.suffix](path)
            except Exception as error:
                raise KillError(f"{path.name} is not whole: {type(error).__name__}: {error}") from error


def check_tidy(folder: Path) -> None:
    """Nothing that a killed process left is still there."""
    left = [path.name for path in folder.rglob("*") if path.name.endswith(LEFT_OVER)]
    if left:
        raise KillError(f"left over: {left}")


def same_bytes(a: Path, b: Path) -> None:
    names = [sorted(path.name for path in folder.iterdir()) for folder in (a, b)]
    if names[0] != names[1] or any((a / name).read_bytes() != (b / name).read_bytes() for name in names[0]):
        raise KillError(f"{names[0]} are not the files of an undisturbed run, {names[1]}")


def same_weights(a: Path, b: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (a, b))
    if first.keys() != second.keys() or not all(torch.equal(first[name], second[name]) for name in first):
        raise KillError("the weights are not those of the undisturbed run")


def write_mnist(folder: Path) -> None:
    """Random images as MNIST's four files."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for split, count in (("train", IMAGES), ("test", 1000)):
        images = generator.integers(0, 256, (count, 28, 28), np.uint8)
        labels = generator.integers(0, 10, count).astype(np.uint8)
        for stem, array in zip(DATASETS["mnist"].files[split], (images, labels), strict=True):
            head = np.array([0x0800 + array.ndim, *array.shape], ">i4")
            (folder / stem).write_bytes(head.tobytes() + array.tobytes())


@dataclass
class Campaign:
    """The kills of all commands, in a scratch folder.

    counts: per command what happened how often. wrong: what must not be, as text.
    """

    scratch: Path
    seed: int
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    durations: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.log = self.scratch / "log"
        write_mnist(self.scratch / "idx")
        cache = ["--cache-dir", self.scratch / "cache"]
        self.train, self.tune, self.speedrun = ([*words, *cache] for words in (TRAIN, TUNE, SPEEDRUN))
        self.compile = ["compile", "--data-dir", self.scratch / "idx"]
        self.expand = ["compile", "--dataset", "digits", "--expand", "40"]
        run([*TRAIN[:-4], "--epochs", "1", *cache, "--out", self.scratch / "first"], self.log)  # fills caches
        self._undisturbed("compile", [*self.compile, "--output"])
        self._undisturbed("expand", [*self.expand, "--output"])
        self._undisturbed("train", [*self.train, "--out"])
        self._undisturbed("tune", [*self.tune, "--out"])
        self._undisturbed("speedrun", [*self.speedrun, "--out"])
        self._stop_a_run()

    def _undisturbed(self, name: str, command: list[object]) -> None:
        begun = time.perf_counter()
        run([*command, self.scratch / f"whole-{name}"], self.log)
        self.durations[name] = time.perf_counter() - begun

    def _stop_a_run(self) -> None:
        """Leaves a run that was killed soon after its first checkpoint: what `resume` goes on with."""
        self.stopped = self.scratch / "stopped"
        process = begin([*self.train, "--out", self.stopped], self.log)
        while not (self.stopped / "checkpoint.pt").exists():
            time.sleep(0.01)
            if os.waitpid(process, os.WNOHANG)[0]:
                raise KillError(f"the run ended without a checkpoint: {self.log.read_text()}")
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        self.durations["resume"] = self.durations["train"]

    def go(self, kills: int) -> None:
        commands = itertools.cycle(("compile", "train", "expand", "resume", "tune", "train", "speedrun", "resume"))
        for number, name in enumerate(itertools.islice(commands, kills)):
            folder = self.scratch / f"{number}-{name}"
            after = self.random.uniform(0, self.durations[name])
            try:
                what = getattr(self, f"kill_{name}")(folder, after)
            except KillError as error:
                what = "wrong"
                self.wrong.append(f"kill {number}, {name} after {after:.3f} s: {error}")
            counts = self.counts.setdefault(name, {})
            counts[what] = counts.get(what, 0) + 1
            print(f"{number + 1} of {kills}: {name} after {after:.2f} s: {what}", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)

    def kill_compile(self, folder: Path, after: float) -> str:
        return self._written_again([*self.compile, "--output", folder], folder, after, "compile")

    def kill_expand(self, folder: Path, after: float) -> str:
        return self._written_again([*self.expand, "--output", folder], folder, after, "expand")

    def _written_again(self, command: list[object], folder: Path, after: float, name: str) -> str:
        killed = kill(command, self.log, after)
        check_whole(folder)
        run(command, self.log)
        check_tidy(folder)
        same_bytes(folder, self.scratch / f"whole-{name}")
        return "killed, then written to the same bytes" if killed else "had ended"

    def kill_train(self, folder: Path, after: float) -> str:
        killed = kill([*self.train, "--out", folder], self.log, after)
        return self._finished(folder) if killed else "had ended"

    def kill_resume(self, folder: Path, after: float) -> str:
        shutil.copytree(self.stopped, folder)
        killed = kill(["train", "--resume", folder], self.log, after)
        return self._finished(folder) if killed else "had ended"

    def _finished(self, folder: Path) -> str:
        """Goes on with a run, by its checkpoint or from its beginning, and holds it against the undisturbed one."""
        check_whole(folder)
        what = "killed, then resumed to the same bits"
        if (folder / "summary.json").exists():  # the last file that is written
            what = "killed when all was written"
        elif (folder / "checkpoint.pt").exists():
            run(["train", "--resume", folder], self.log)
            check_tidy(folder)
        elif (folder / "config.yaml").exists():
            config = str(folder / "config.yaml")
            if f"train --config {config}" not in run(["train", "--resume", folder], self.log, 1):
                raise KillError("--resume does not say how to begin again")
            if not {path.name for path in folder.iterdir()} <= {"config.yaml", "metrics.jsonl"}:
                raise KillError(f"left over: {sorted(path.name for path in folder.iterdir())}")
            shutil.copy(config, self.scratch / "again.yaml")
            shutil.rmtree(folder)
            run(["train", "--config", self.scratch / "again.yaml", "--out", folder], self.log)
            what = "killed before a checkpoint, then begun again to the same bits"
        else:
            run([*self.train, "--out", folder], self.log)
            check_tidy(folder)
            what = "killed before config.yaml, then begun again to the same bits"
        same_weights(folder, self.scratch / "whole-train")
        return what

    def kill_tune(self, folder: Path, after: float) -> str:
        return self._measured_again(self.tune, folder, after)

    def kill_speedrun(self, folder: Path, after: float) -> str:
        return self._measured_again(self.speedrun, folder, after)

    def _measured_again(self, command: list[object], folder: Path, after: float) -> str:
        killed = kill([*command, "--out", folder], self.log, after)
        check_whole(folder)
        there = folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())
        run([*command, "--out", folder], self.log, 2 if there else 0)
        check_whole(folder)
        check_tidy(folder)
        return "killed, then measured anew" if killed and not there else "had written results"


def campaign(kills: int, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)  # a fork keeps no threads
    for name in IMPORTED:
        importlib.import_module(name)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        done = Campaign(Path(scratch), seed)
        done.go(kills)
    return {
        "kills": kills,
        "seed": seed,
        "counts": done.counts,
        "wrong": done.wrong,
        "undisturbed_seconds": done.durations,
        "seconds": time.perf_counter() - begun,
    }


def cost(turns: int, steps: int = 60) -> dict[str, Any]:
    """The training clock of `steps` steps with a checkpoint every 2 s and without, in turn; the first is left out."""
    clocks: dict[str, list[float]] = {"with": [], "without": []}
    written = 0
    with tempfile.TemporaryDirectory() as scratch:
        config = TrainConfig(dataset="digits", batch_size=128, epochs=(2 * turns + 2) * steps, cache_dir=scratch)
        with Session(config, Reporter(quiet=True)) as session:
            trainer, config = session.trainer, session.config
            checkpoint.SAVE_EVERY = COST_SAVES_EVERY
            for turn in range(turns + 1):
                for side, values in clocks.items():
                    with Checkpoints(Path(scratch), config.to_dict()) as checkpoints:

                        def save(checkpoints: Checkpoints = checkpoints) -> None:
                            nonlocal written
                            if checkpoints.due():
                                checkpoints.begin(trainer.state_dict())
                                written += 1

                        last, before = trainer.step + steps, trainer.seconds
                        while trainer.step < last:
                            trainer.run_epoch(
                                stop=lambda last=last: trainer.step >= last,  # type: ignore[misc]
                                after_step=save if side == "with" else lambda: None,
                            )
                        if turn:
                            values.append(trainer.seconds - before)
                        else:
                            written = 0
                        checkpoints.wait()
        size = (Path(scratch) / checkpoint.CHECKPOINT).stat().st_size
    if not written:
        raise SystemExit(f"{steps} steps ended before the first checkpoint: nothing was measured")
    more = statistics.median(clocks["with"]) - statistics.median(clocks["without"])
    each = more * turns / written
    return {
        "seconds_per_turn": {side: summarise(values) for side, values in clocks.items()},
        "checkpoint_bytes": size,
        "checkpoints": written,
        "seconds_per_checkpoint": each,
        "share_of_the_training_clock": each / SAVES_EVERY,
    }


SAVES_EVERY = checkpoint.SAVE_EVERY  # as it is where nobody changes it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--cost", type=int, metavar="N", help="turns: measure the cost of checkpoints instead")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    result = campaign(options.kills, options.seed) if options.cost is None else cost(options.cost)
    report(result, options.output)
    return 1 if result.get("wrong") else 0


if __name__ == "__main__":
    sys.exit(main())
