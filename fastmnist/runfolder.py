"""A run's folder: config.yaml, metrics.jsonl and summary.json; the weights are in training.checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError, DataError, FastmnistError
from fastmnist.files import write_bytes

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
RUNS = Path("runs")


class RunFolder:
    """Writes and reads what a run keeps as text."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, out: str | None, dataset: str) -> RunFolder:
        """A new folder: `out`, which must be new or empty, or the next runs/<date>-<dataset>-<n>.

        Raises:
            ConfigError: `out` holds something. FastmnistError: the folder cannot be made.
        """
        try:
            if out is not None:
                path = Path(out).expanduser()
                path.mkdir(parents=True, exist_ok=True)
                if any(path.iterdir()):
                    raise ConfigError(f"--out {path}: there is something in it; name a new folder, or --resume it")
                return cls(path)
            number = 1
            while True:
                path = RUNS / f"{date.today().isoformat()}-{dataset}-{number}"
                try:
                    path.mkdir(parents=True)
                except FileExistsError:
                    number += 1
                else:
                    return cls(path)
        except OSError as error:
            raise FastmnistError(
                f"{path}: cannot be made: {error.strerror or error}; name a folder that can be written with --out"
            ) from error

    def discard(self) -> None:
        """Removes the folder and what is in it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def write_config(self, config: TrainConfig) -> None:
        self._write(CONFIG, yaml.safe_dump(config.to_dict(), sort_keys=False))

    def read_config(self) -> dict[str, Any]:
        """The settings in config.yaml as they stand there; raises DataError when it is missing or no mapping."""
        path = self.path / CONFIG
        try:
            values = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{path}: cannot be read: {reason}; restore it, or begin the run anew") from error
        if not isinstance(values, dict):
            raise DataError(f"{path}: holds no settings; restore it, or begin the run anew")
        return values

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._write(SUMMARY, json.dumps(summary, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any]:
        """What summary.json says; empty where the run has not come that far."""
        try:
            content = json.loads((self.path / SUMMARY).read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def append(self, record: Mapping[str, Any]) -> None:
        """One more line of metrics.jsonl."""
        path = self.path / METRICS
        try:
            with open(path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise FastmnistError(f"{path}: cannot be written: {error.strerror or error}; make room") from error

    def records(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl; a last line that was cut short by a crash is left out."""
        try:
            lines = (self.path / METRICS).read_text().splitlines()
        except FileNotFoundError:
            return []
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    def forget_after(self, step: int) -> list[dict[str, Any]]:
        """Drops the lines of steps after `step`, which will be done again, and returns those that stay."""
        kept = [record for record in self.records() if record["step"] <= step]
        self._write(METRICS, "".join(json.dumps(record) + "\n" for record in kept))
        return kept

    def _write(self, name: str, text: str) -> None:
        write_bytes(self.path / name, text.encode())
