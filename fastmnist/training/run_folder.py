"""Run folder: config.yaml, metrics.jsonl, summary.json, and the lock of the process that writes them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO

import torch
import yaml

from fastmnist.config import TrainConfig, checked_settings, short
from fastmnist.errors import ConfigError, DataError, FastmnistError
from fastmnist.files import OPEN_FILES_STAY, open_alone, remove, remove_orphans, write_bytes
from fastmnist.system.processes import broadcast, rank
from fastmnist.training.checkpoint import CHECKPOINT

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
LOCK = ".lock"  # exists while a process writes the folder
LONGEST_CONFIG = 1 << 16  # bytes; ours have 2,000, and PyYAML takes a second for 100 kB
RUNS = Path("runs")


class RunFolder:
    """A run's text files; between `claim` and `release` no other process writes to the folder.

    Attributes:
        writes: whether this process writes them: of several processes, the first one does.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._lock: BinaryIO | None = None
        self._identity: os.stat_result

    @classmethod
    def create(cls, out: str | None, dataset: str) -> RunFolder:
        """A new folder, claimed: `out`, which must be new or empty, or the next runs/<date>-<dataset>-<n>.

        A folder counts as empty when a killed process left only temporary files in it. Several processes get the
        same folder, which the first one creates.

        Raises:
            ConfigError: `out` is not empty. FastmnistError: the folder cannot be created.
        """
        if rank():
            return cls(broadcast(None), writes=False)
        folder = cls._create(out, dataset)
        broadcast(folder.path)
        return folder

    @classmethod
    def _create(cls, out: str | None, dataset: str) -> RunFolder:
        try:
            if out is not None:
                path = Path(out).expanduser()
                folder = cls._claimed_if_empty(path)
                if folder is None:
                    raise ConfigError(f"--out {path}: not empty; name a new folder, or --resume it")
                return folder
            number = 0
            while True:
                number += 1
                path = RUNS / f"{date.today().isoformat()}-{dataset}-{number}"
                if path.is_dir() or not path.exists():
                    folder = cls._claimed_if_empty(path)
                    if folder is not None:
                        return folder
        except OSError as error:
            raise FastmnistError(
                f"{path}: cannot be created: {error.strerror or error}; name a writable folder with --out"
            ) from error

    @classmethod
    def _claimed_if_empty(cls, path: Path) -> RunFolder | None:
        path.mkdir(parents=True, exist_ok=True)
        there = list(path.iterdir())
        if there and not any(entry.name == LOCK or entry.suffix == ".tmp" for entry in there):
            return None  # a run that ended
        folder = cls(path)
        try:
            folder.claim()
        except FastmnistError:
            return None
        if all(entry.name == LOCK for entry in path.iterdir()):
            return folder
        folder.release()
        return None

    def claim(self) -> None:
        """Locks the folder until `release` or the end of this process, and removes temporary files of killed ones.

        Raises:
            FastmnistError: another process is writing here. OSError: the folder cannot be written.
        """
        self._lock = open_alone(
            self.path / LOCK, f"{self.path}: another process is writing this run; wait for it to end, or stop it first"
        )
        self._identity = os.stat(self.path)
        remove_orphans(self.path)

    def release(self) -> None:
        """Unlocks the folder; may be called again."""
        if self._lock is not None:
            if self._exists():
                remove(self._lock, self.path / LOCK)
            self._lock.close()
            self._lock = None

    def discard(self) -> None:
        """Removes the claimed folder with its content, but not another one that has taken its place."""
        if self.writes and self._exists():
            if OPEN_FILES_STAY:
                self.release()
            shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def check(self) -> None:
        """Raises FastmnistError when the claimed folder is gone: nothing must be written in its place."""
        if self.writes and not self._exists():
            raise FastmnistError(
                f"{self.path}: this folder was deleted, moved or replaced during the run, which wrote nothing more to "
                "it; start a new run, or resume the folder where it is now"
            )

    def _exists(self) -> bool:
        try:
            return os.path.samestat(self._identity, os.stat(self.path))
        except OSError:
            return False

    def write_config(self, config: TrainConfig) -> None:
        self._write(CONFIG, yaml.safe_dump(config.to_dict(), sort_keys=False))

    def read_config(self) -> dict[str, Any]:
        """The settings in config.yaml, possibly not all.

        Raises:
            DataError: the file is missing or damaged. ConfigError: a setting is unknown or has the wrong type.
        """
        path = self.path / CONFIG
        with _reading(path, advice := "restore it, or start a new run"):
            if path.stat().st_size > LONGEST_CONFIG:
                raise ValueError(f"more than {LONGEST_CONFIG:,} bytes")
            values = yaml.safe_load(path.read_text())
        if not isinstance(values, dict):
            raise DataError(f"{path}: holds no settings; {advice}")
        return checked_settings(values, f"{path}: ")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._write(SUMMARY, json.dumps(summary, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any]:
        """The content of summary.json; empty when there is none yet. Raises DataError when it is damaged."""
        path, advice = self.path / SUMMARY, "delete it, and --resume writes it again"
        if not path.exists():
            return {}
        with _reading(path, advice):
            content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise DataError(f"{path}: holds no summary; {advice}")
        return content

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line to metrics.jsonl."""
        if not self.writes:
            return
        self.check()
        path = self.path / METRICS
        try:
            with open(path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise FastmnistError(f"{path}: cannot be written: {error.strerror or error}; make room") from error

    def records(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl but a last one that a crash cut short.

        Raises:
            DataError: another line is damaged.
        """
        path = self.path / METRICS
        if not path.exists():
            return []
        with _reading(path, "restore or delete it"):
            *lines, rest = path.read_bytes().split(b"\n")
        found = []
        for number, line in enumerate(lines, 1):
            with _reading(path, "delete that line", f"line {number} "):
                found.append(_record(line))
        with suppress(Exception):
            found.append(_record(rest))
        return found

    def forget_after(self, step: int) -> list[dict[str, Any]]:
        """Drops the lines after `step`, which will be trained again, and returns the others."""
        if not self.writes:
            return []
        kept = [record for record in self.records() if record["step"] <= step]
        self._write(METRICS, "".join(json.dumps(record) + "\n" for record in kept))
        return kept

    def _write(self, name: str, text: str) -> None:
        if self.writes:
            self.check()
            write_bytes(self.path / name, text.encode())


def continues(out: str | None) -> bool:
    """Whether a job that torchrun starts again finds its run, stopped, in the folder `out`.

    A run without a checkpoint is removed: it begins anew.

    Raises:
        ConfigError: torchrun would start the job again, and `out` is None: it could not find its run.
    """
    if not torch.distributed.is_torchelastic_launched():
        return False
    if out is None:
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
            raise ConfigError("torchrun --max-restarts starts a run again: name its folder with --out, to continue it")
        return False
    return bool(broadcast(_holds_stopped_run(RunFolder(Path(out).expanduser())) if not rank() else None))


def _holds_stopped_run(run: RunFolder) -> bool:
    if not (run.path / CONFIG).exists() or run.read_summary().get("interrupted") is False:
        return False
    if not (run.path / CHECKPOINT).exists():
        run.claim()
        run.discard()
        return False
    return True


def _record(line: bytes) -> dict[str, Any]:
    """Parses a line of metrics.jsonl; raises ValueError when it is damaged."""
    record = json.loads(line)
    if not isinstance(record, dict) or record.get("kind") not in ("step", "epoch"):
        raise ValueError("no record of a step or an epoch")
    for name in ("step", "epoch"):
        if type(record.get(name)) is not int:
            raise ValueError(f"{name} is not a whole number")
    wrong = [name for name, value in record.items() if name != "kind" and type(value) not in (int, float, NoneType)]
    if wrong:
        raise ValueError(f"{short(wrong[0])} is not a number")
    return record


@contextmanager
def _reading(path: Path, advice: str, where: str = "") -> Iterator[None]:
    """Turns any error of a parser, which may raise anything on a damaged file, into DataError."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path}: {where}cannot be read: {reason}; {advice}") from error
