"""Kill -9 at random moments of compile, expand, train, resume, tune, speedrun and a job of three processes.

    python benchmarks/kills.py --kills 200 --output kills.json
    python benchmarks/kills.py --kills 50 --commands job --output kills_job.json

Each command runs once undisturbed, which gives its duration and its result; then it is killed at a moment drawn over
that duration. After a kill every file under a final name must be whole, the same command or --resume must end with the
same bytes or weights, and then no temporary file may be left. Of a job, one process is killed: the others must end by
themselves, with one line about it, and the job that starts again must end with the same weights. Commands run in forks
of this process, which has imported everything, with one thread each and a checkpoint every 0.05 s.
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
import sys
import tempfile
import time
import traceback
import xml.dom.minidom
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch.distributed import TCPStore

from fastmnist.beton.reader import Beton
from fastmnist.cli import main as cli
from fastmnist.files import write_json
from fastmnist.sources.datasets import DATASETS
from fastmnist.system.environment import origin
from fastmnist.training import checkpoint
from fastmnist.training.checkpoint import load_checkpoint

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
SAVE_EVERY = 0.05  # seconds between two checkpoints
IMAGES = 10_000  # of the training set that is compiled
RUN = "--dataset digits --model small-cnn --preset none --batch-size 64 --device cpu --amp off --quiet"
COMMANDS = {
    "compile": "compile",
    "train": f"train {RUN} --log-every 5 --epochs 4",
    "expand": "compile --dataset digits --expand 10",
    "resume": "train --resume",
    "tune": f"tune {RUN} --loader-only --budget 2",
    "speedrun": f"speedrun {RUN} --epochs 1 --seeds 2",
    "job": f"train {RUN} --log-every 5 --epochs 4 --batch-size 66 --timeout 0.5",
}
PROCESSES = 3  # of a job
MOST_SECONDS = 60.0  # in which the others end when one of them was killed
LEFT_OVER = (".tmp", ".lock")


class KillError(Exception):
    """A state that no kill may leave behind."""


def begin(command: Sequence[object], log: Path, environment: Mapping[str, str] = MappingProxyType({})) -> int:
    """Runs a command of fastmnist in a fork, its output in `log`; returns the process id."""
    process = os.fork()
    if process:
        return process
    status = 99
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if environment else os.O_TRUNC))
        os.dup2(out, 1)
        os.dup2(out, 2)
        checkpoint.SAVE_EVERY = SAVE_EVERY
        os.environ.update(environment)
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


def begin_job(command: Sequence[object], log: Path) -> tuple[list[int], Any]:
    """Runs a command in PROCESSES forks with what torchrun gives them; their ids, and the store where they meet."""
    log.unlink(missing_ok=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": "kills",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    ranks = map(str, range(PROCESSES))
    return [begin(command, log, common | {"RANK": rank, "LOCAL_RANK": rank}) for rank in ranks], store


def end_job(processes: Sequence[int], log: Path) -> list[int]:
    """Waits for all of them; their exit statuses, negative for a signal."""
    statuses, until = {}, time.monotonic() + MOST_SECONDS
    while len(statuses) < len(processes):
        for process in processes:
            if process not in statuses:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    statuses[process] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > until:
                    os.kill(process, signal.SIGKILL)
                    raise KillError(f"a process of the job hangs: {log.read_text()}")
        time.sleep(0.02)
    return [statuses[process] for process in processes]


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
    """No temporary file of a killed process is left."""
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


class Campaign:
    """Kills of all commands in a scratch folder.

    counts: (command, outcome) to how often. wrong: descriptions of states that no kill may leave.
    """

    def __init__(self, scratch: Path, seed: int, names: Sequence[str]) -> None:
        self.scratch, self.log, self.random, self.names = scratch, scratch / "log", random.Random(seed), names
        self.counts: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []
        self.durations: dict[str, float] = {}
        write_mnist(scratch / "idx")
        where = {"compile": ["--data-dir", scratch / "idx", "--output"], "expand": ["--output"], "resume": []}
        cache = ["--cache-dir", scratch / "cache", "--out"]
        self.commands = {name: [*words.split(), *where.get(name, cache)] for name, words in COMMANDS.items()}
        self.run("train", scratch / "first", 0, "--epochs", "1")  # fills caches
        for name in {"train" if name == "resume" else name: None for name in names}:
            begun = time.perf_counter()
            if name == "job":
                self._run_job(scratch / "whole-job")
            else:
                self.run(name, scratch / f"whole-{name}")
            self.durations[name] = time.perf_counter() - begun
        if "resume" in names:
            self.durations["resume"] = self.durations["train"]
            self._stop_a_run()

    def run(self, name: str, folder: Path, expected: int = 0, *more: object) -> str:
        return run([*self.commands[name], folder, *more], self.log, expected)

    def _stop_a_run(self) -> None:
        """Leaves a run that was killed soon after its first checkpoint, for `resume`."""
        self.stopped = self.scratch / "stopped"
        process = begin([*self.commands["train"], self.stopped], self.log)
        while not (self.stopped / "checkpoint.pt").exists():
            time.sleep(0.01)
            if os.waitpid(process, os.WNOHANG)[0]:
                raise KillError(f"the run ended without a checkpoint: {self.log.read_text()}")
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)

    def go(self, kills: int) -> None:
        for number, name in enumerate(itertools.islice(itertools.cycle(self.names), kills)):
            folder = self.scratch / f"{number}-{name}"
            after = self.random.uniform(0, self.durations[name])
            try:
                outcome = self.kill(name, folder, after)
            except KillError as error:
                outcome = "wrong"
                self.wrong.append(f"kill {number}, {name} after {after:.3f} s: {error}")
            self.counts[name, outcome] += 1
            print(f"{number + 1} of {kills}: {name} after {after:.2f} s: {outcome}", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)

    def kill(self, name: str, folder: Path, after: float) -> str:
        """Runs a command, kills it after so many seconds, and checks what is left; returns the outcome."""
        if name == "resume":
            shutil.copytree(self.stopped, folder)
        if name == "job":
            return self._kill_one_of_a_job(folder, after)
        killed = kill([*self.commands[name], folder], self.log, after)
        check_whole(folder)
        if name in ("compile", "expand"):
            outcome = self._written_again(name, folder)
        elif name in ("tune", "speedrun"):
            outcome = self._measured_again(name, folder)
        else:
            outcome = self._trained_to_the_end(folder)
        return outcome if killed else "had ended"

    def _run_job(self, folder: Path) -> None:
        processes, _store = begin_job([*self.commands["job"], folder], self.log)
        if any(statuses := end_job(processes, self.log)):
            raise KillError(f"exit statuses {statuses}: {self.log.read_text()}")

    def _kill_one_of_a_job(self, folder: Path, after: float) -> str:
        processes, _store = begin_job([*self.commands["job"], folder], self.log)
        time.sleep(after)
        victim = self.random.randrange(PROCESSES)
        with suppress(ProcessLookupError):
            os.kill(processes[victim], signal.SIGKILL)
        statuses = end_job(processes, self.log)
        check_whole(folder)
        others = [status for number, status in enumerate(statuses) if number != victim]
        if statuses[victim] != -signal.SIGKILL or not any(others):  # it, or all the others, had done their part
            outcome = "had ended"
        else:
            lines = [line for line in self.log.read_text().splitlines() if line.startswith("fastmnist:")]
            if 0 in others or len(lines) != 1:
                raise KillError(f"exit statuses {statuses}: {self.log.read_text()}")
            outcome = "killed one, then all started again to the same bits"
        if not (folder / "summary.json").exists():
            self._run_job(folder)
        check_tidy(folder)
        same_weights(folder, self.scratch / "whole-job")
        return outcome

    def _written_again(self, name: str, folder: Path) -> str:
        self.run(name, folder)
        check_tidy(folder)
        same_bytes(folder, self.scratch / f"whole-{name}")
        return "killed, then written to the same bytes"

    def _measured_again(self, name: str, folder: Path) -> str:
        there = folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())
        self.run(name, folder, 2 if there else 0)
        check_whole(folder)
        check_tidy(folder)
        return "had written results" if there else "killed, then measured anew"

    def _trained_to_the_end(self, folder: Path) -> str:
        """Resumes a run, or begins it again, and compares it with the undisturbed one."""
        outcome = "killed, then resumed to the same bits"
        if (folder / "summary.json").exists():  # the last file that is written
            outcome = "killed when all was written"
        elif (folder / "checkpoint.pt").exists():
            self.run("resume", folder)
            check_tidy(folder)
        elif (folder / "config.yaml").exists():
            config = str(folder / "config.yaml")
            if f"train --config {config}" not in self.run("resume", folder, 1):
                raise KillError("--resume does not say how to begin again")
            if not {path.name for path in folder.iterdir()} <= {"config.yaml", "metrics.jsonl"}:
                raise KillError(f"left over: {sorted(path.name for path in folder.iterdir())}")
            shutil.copy(config, self.scratch / "again.yaml")
            shutil.rmtree(folder)
            run(["train", "--config", self.scratch / "again.yaml", "--out", folder], self.log)
            outcome = "killed before a checkpoint, then begun again to the same bits"
        else:
            self.run("train", folder)
            check_tidy(folder)
            outcome = "killed before config.yaml, then begun again to the same bits"
        same_weights(folder, self.scratch / "whole-train")
        return outcome


def campaign(kills: int, seed: int, names: Sequence[str]) -> dict[str, Any]:
    torch.set_num_threads(1)  # a fork keeps no threads
    for name in IMPORTED:
        importlib.import_module(name)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        done = Campaign(Path(scratch), seed, names)
        done.go(kills)
    counts: dict[str, dict[str, int]] = {}
    for (name, outcome), count in done.counts.items():
        counts.setdefault(name, {})[outcome] = count
    return {
        "kills": kills,
        "seed": seed,
        "counts": counts,
        "wrong": done.wrong,
        "undisturbed_seconds": done.durations,
        "seconds": time.perf_counter() - begun,
        **origin(torch.device("cpu")),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--output", help="JSON file for the result")
    options = parser.parse_args()
    result = campaign(options.kills, options.seed, options.commands)
    print(json.dumps(result, indent=2))
    write_json(options.output, result)
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
