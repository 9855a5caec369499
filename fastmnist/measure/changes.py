"""Comparison of two saved diagnoses, or of two watched runs: what changed by more than the noise."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastmnist.errors import ConfigError, DataError
from fastmnist.system.numbers import mebibytes, milliseconds, rough_percent, with_interval

Content = Mapping[str, Any]


class Quantity(NamedTuple):
    """A figure with an interval; `summary` finds it in a file, None where it was not measured."""

    name: str
    summary: Callable[[Content], Mapping[str, float] | None]
    write: Callable[[float], str]


def _growth(run: Content) -> Mapping[str, float] | None:
    memory = run["memory"]
    return memory and {name: 60 * memory[name] for name in ("low", "high")} | {"median": 60 * memory["per_second"]}


QUANTITIES: dict[str, tuple[Quantity, ...]] = {
    "diagnosis": (
        Quantity("a step", lambda found: found["evidence"]["step_seconds"], milliseconds),
        Quantity("a step on one fixed batch", lambda found: found["evidence"]["fixed_step_seconds"], milliseconds),
        Quantity("a batch of the loader alone", lambda found: found["evidence"]["loader_seconds"], milliseconds),
        Quantity("copying a batch", lambda found: found["evidence"]["copy_seconds"], milliseconds),
        Quantity("gain of an infinitely fast loader", lambda found: found["evidence"]["gain"], "{:.2f} times".format),
    ),
    "watched run": (
        Quantity("a step", lambda run: run["step_seconds"], milliseconds),
        Quantity("share spent waiting for batches", lambda run: run["waiting"], rough_percent),
        Quantity("growth of memory in a minute", _growth, mebibytes),
    ),
}
HOW = {"diagnosis": "fastmnist doctor --json", "watched run": "fastmnist train --watch, or watch.save"}


@dataclass(frozen=True)
class Change:
    """One quantity, before and after, as {"median", "low", "high"}; `write` makes text of one of them."""

    name: str
    before: Mapping[str, float]
    after: Mapping[str, float]
    write: Callable[[float], str]

    @property
    def beyond_noise(self) -> bool:
        """Whether the two 95 % intervals have no value in common."""
        return self.after["low"] > self.before["high"] or self.after["high"] < self.before["low"]

    def line(self) -> str:
        before, after = (with_interval({"n": 2, **value}, self.write) for value in (self.before, self.after))
        return f"{self.name}: {before}, then {after}{'' if self.beyond_noise else ': within the noise'}."


@dataclass(frozen=True)
class Changes:
    """what: "diagnosis" or "watched run". verdicts: of both. changes: of what both measured."""

    what: str
    verdicts: tuple[str, str]
    changes: tuple[Change, ...]

    def verdict(self) -> str:
        """The changes beyond the noise, in one sentence."""
        moved = [change for change in self.changes if change.beyond_noise]
        if not moved:
            return f"Nothing changed beyond the noise, of {len(self.changes)} figures."
        told = (f"{one.name} {one.write(one.before['median'])} to {one.write(one.after['median'])}" for one in moved)
        return f"Changed beyond the noise: {'; '.join(told)}."

    def lines(self) -> list[str]:
        """Both verdicts, and each figure with its intervals."""
        return [
            f"Before: {self.verdicts[0]}",
            f"After: {self.verdicts[1]}",
            *(change.line() for change in self.changes),
        ]

    def to_dict(self) -> dict[str, Any]:
        names = ("name", "before", "after", "beyond_noise")
        changes = [{name: getattr(change, name) for name in names} for change in self.changes]
        return {"what": self.what, "verdict": self.verdict(), "verdicts": list(self.verdicts), "changes": changes}


def compare(before: Content, after: Content) -> Changes:
    """The changes between two contents of one kind, as `Diagnosis.to_dict` and `Watch.to_dict` give them."""
    what = _kind(before)
    found = []
    for quantity in QUANTITIES[what]:
        values = quantity.summary(before), quantity.summary(after)
        if values[0] is not None and values[1] is not None:
            found.append(Change(quantity.name, values[0], values[1], quantity.write))
    return Changes(what, (before["verdict"], after["verdict"]), tuple(found))


def compare_files(before: str | Path, after: str | Path) -> Changes:
    """The changes between two saved results.

    Raises:
        DataError: a file cannot be read, or is neither a diagnosis nor a watched run.
        ConfigError: they are not of one kind.
    """
    contents = [_read(path) for path in (before, after)]
    kinds = [_kind(content) for content in contents]
    if kinds[0] != kinds[1]:
        raise ConfigError(
            f"{before} is a {kinds[0]} ({HOW[kinds[0]]}), {after} a {kinds[1]} ({HOW[kinds[1]]}): compare two of a kind"
        )
    try:
        found = compare(*contents)
        found.verdict()
    except (KeyError, TypeError) as error:
        raise DataError(f"{before} or {after} lacks {error}; was it written by this version?") from error
    return found


def _kind(content: Content) -> str:
    return "diagnosis" if "evidence" in content else "watched run"


def _read(path: str | Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError:  # no JSON, or no text
        content = None
    if not isinstance(content, dict) or not {"evidence", "timeline"} & content.keys():
        ways = " or ".join(HOW.values())
        raise DataError(f"{path}: is neither a diagnosis nor a watched run; write one with {ways}")
    return content
