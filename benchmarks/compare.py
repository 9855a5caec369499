"""Changes beyond the noise between two results: of `fastmnist bench`, `pytest benchmarks --rows` or gpu_suite.py.

    python benchmarks/compare.py BEFORE.json AFTER.json [--threshold 0.05]

Rows are matched by group, name, settings and device. A change counts when the medians differ by more than the threshold
and the 95 % intervals are disjoint; fewer than 6 values have no such interval, and no verdict. More is better of
images/s, ratios and shares; less of seconds and bytes.

A row with a ratio ("of_limit", to the least that it could take; else "over_plain", to the plain DataLoader) is worse
when both its figure and that ratio are. The ratio was taken turn by turn: where it stays, the whole machine was slower.
Where only the ratio changed, or the two contradict each other, another load may have met one side alone: "unclear". A
row without a ratio is judged by its figure, but a time must change by more than the plain copies of the two files do.
Where the hardware differs, only ratios are judged. The plain copies ("limit") have no verdict: they are the machine.

Exit status: 1 when a row is worse, 0 when none is, 2 when a file cannot be used. Rows that are in one file only, or
failed in one, are listed and decide nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastmnist.system.environment import describe_hardware
from fastmnist.system.numbers import number
from fastmnist.system.statistics import LEAST_FOR_INTERVAL, Summary

RATIOS = ("of_limit", "over_plain")
HEADINGS = {"of_limit": "of the limit", "over_plain": "over plain"}
MORE_IS_BETTER = {"images/s": True, "ratio": True, "share": True, "seconds": False, "bytes": False}
DRIFTS = ("images/s", "seconds")  # with the machine; the other units do not
NOT_A_TERMINAL = 150  # columns then
ORIGIN = "give a file that `fastmnist bench` or `pytest benchmarks --rows` wrote"

Row = Mapping[str, Any]
Key = tuple[str, str, str, str]


class BadFileError(Exception):
    """A file cannot be used: what is wrong, where, and what to do, in one line."""


@dataclass(frozen=True)
class Change:
    """One measure before and after. factor: the larger median over the smaller one."""

    before: Summary
    after: Summary

    @property
    def factor(self) -> float:
        low, high = sorted((self.before.median, self.after.median))
        if low == high:
            return 1.0
        return high / low if low > 0 else math.inf

    @property
    def text(self) -> str:
        if self.before.median <= 0:
            return "none" if self.factor == 1 else f"{self.before.median:g} to {self.after.median:g}"
        return f"{100 * (self.after.median / self.before.median - 1):+.1f} %"

    def verdict(self, more_is_better: bool, threshold: float) -> str:
        if min(self.before.n, self.after.n) < LEAST_FOR_INTERVAL:
            return "too few values"
        if self.before.overlaps(self.after) or self.factor <= 1 + threshold:
            return "no different"
        return "better" if (self.after.median > self.before.median) == more_is_better else "worse"


@dataclass(frozen=True)
class Compared:
    """A row of both files. changes: by measure, "figure" for its own. ratio: the one that was judged with it."""

    key: Key
    unit: str
    changes: dict[str, Change]
    verdict: str
    ratio: str | None


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; raises BadFileError when it is missing, no JSON, or has no or malformed rows."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadFileError(f"{path}: cannot be read: {error.strerror or error}; {ORIGIN}") from None
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"{path}: is no JSON ({' '.join(str(error).split())}); {ORIGIN}") from None
    rows = list(_rows(content))
    if not rows:
        raise BadFileError(f'{path}: has no "rows"; {ORIGIN}')
    for at, found in enumerate(rows):
        if (what := _wrong(found)) is not None:
            raise BadFileError(f"{path}: row {at + 1} {what}; {ORIGIN}")
    keys = [key_of(found) for found in rows if "error" not in found]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise BadFileError(f"{path}: has two rows of {twice[0]}: {twice[1]} with the same settings; {ORIGIN}")
    return rows


def _rows(content: Any) -> Iterator[Any]:
    """All "rows" of a result and of its parts."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from value if name == "rows" and isinstance(value, list) else _rows(value)


def _wrong(found: Any) -> str | None:
    """The defect of a row; None of a good one."""
    if not isinstance(found, dict) or not all(isinstance(found.get(key), str) for key in ("group", "name")):
        return "has no group and name"
    label = f"({found['group']}: {found['name']})"
    if "error" in found:
        return None
    if not isinstance(found.get("unit"), str) or not isinstance(found.get("settings", {}), dict):
        return f"{label} has no unit or no settings"
    for summary in (found, *(found[measure] for measure in RATIOS if measure in found)):
        if not isinstance(summary, dict) or not all(_is_number(summary.get(item.name)) for item in fields(Summary)):
            return f"{label} lacks a number of {', '.join(item.name for item in fields(Summary))}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def key_of(found: Row) -> Key:
    """Group, name, device, and the settings that are not None."""
    settings = {name: value for name, value in found.get("settings", {}).items() if value is not None}
    device = str(found.get("device", "")).partition(":")[0]
    return found["group"], found["name"], device, json.dumps(settings, sort_keys=True)


def _summary(found: Row) -> Summary:
    return Summary(**{item.name: found[item.name] for item in fields(Summary)})


def _changes(before: Row, after: Row) -> dict[str, Change]:
    found = {"figure": Change(_summary(before), _summary(after))}
    for measure in RATIOS:
        if measure in before and measure in after:
            change = Change(_summary(before[measure]), _summary(after[measure]))
            if not all(side.min == side.max == 1 for side in (change.before, change.after)):  # to itself
                found[measure] = change
    return found


def drift(before: Mapping[Key, Any], after: Mapping[Key, Any]) -> float:
    """The largest change of a plain copy, as a share: the effect of the machine alone."""
    both = [(before[key], after[key]) for key in before if key in after and before[key].get("kind") == "limit"]
    return max((_changes(*pair)["figure"].factor - 1 for pair in both), default=0.0)


def compare(before: Sequence[Row], after: Sequence[Row], threshold: float) -> list[Compared]:
    """A verdict on each row that was measured in both."""
    old, new = ({key_of(found): found for found in rows if "error" not in found} for rows in (before, after))
    drifted = max(threshold, drift(old, new))
    compared = []
    for key, found in old.items():
        if key in new:
            changes = _changes(found, new[key])
            ratio = next((measure for measure in RATIOS if measure in changes), None)
            verdict = _verdict(found, new[key], changes, ratio, threshold, drifted)
            compared.append(Compared(key, found["unit"], changes, verdict, ratio))
    return compared


def _verdict(
    before: Row,
    after: Row,
    changes: Mapping[str, Change],
    ratio: str | None,
    threshold: float,
    drifted: float,
) -> str:
    unit, same_hardware = before["unit"], before.get("hardware") == after.get("hardware")
    if "limit" in (before.get("kind"), after.get("kind")):
        return "the machine"
    if unit not in MORE_IS_BETTER or unit != after["unit"]:
        return "unknown unit"
    if ratio is None:
        needed = drifted if unit in DRIFTS else threshold
        return changes["figure"].verdict(MORE_IS_BETTER[unit], needed) if same_hardware else "other hardware"
    found = changes[ratio].verdict(True, threshold)
    if found not in ("better", "worse") or not same_hardware:
        return found
    return found if changes["figure"].verdict(MORE_IS_BETTER[unit], threshold) == found else "unclear"


def differences(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """Lines that name each difference in hardware, versions, device and data."""
    lines = []
    old, new = (next((found for found in rows if "error" not in found), {}) for rows in (before, after))
    for part in ("hardware", "versions"):
        one, other = old.get(part, {}), new.get(part, {})
        for name in dict.fromkeys([*one, *other]):
            if one.get(name) != other.get(name):
                lines.append(f"{name}: {one.get(name, 'none')} before, {other.get(name, 'none')} after")
    for name in ("device", "data"):
        if old.get(name) != new.get(name):
            lines.append(f"{name}: {old.get(name, 'unknown')} before, {new.get(name, 'unknown')} after")
    return lines


def one_sided(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """Lines that name each row measured in one file only, with the reason where the other file has one."""
    lines = []
    for rows, others, here, there in ((before, after, "before", "after"), (after, before, "after", "before")):
        measured = {key_of(found) for found in others if "error" not in found}
        failed = {(found["group"], found["name"]): found["error"] for found in others if "error" in found}
        for found in rows:
            if "error" not in found and (key := key_of(found)) not in measured:
                why = f": not measured {there}: {reason}" if (reason := failed.get(key[:2])) else ""
                lines.append(f"only {here}: {_label(key)}{why}")
    return lines


def _label(key: Key) -> str:
    group, name, device, settings = key
    said = ", ".join(f"{name} {value}" for name, value in json.loads(settings).items())
    details = ", ".join(part for part in (said, device) if part)
    return f"{group}: {name} ({details})" if details else f"{group}: {name}"


def _table(compared: Sequence[Compared]) -> Table:
    table = Table()
    measures = [measure for measure in RATIOS if any(measure in found.changes for found in compared)]
    for heading in ("group", "name"):
        table.add_column(heading, overflow="fold")
    for heading in ("before", "after", "change", *(HEADINGS[measure] for measure in measures)):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    styles = {"worse": "red", "better": "green", "unclear": "yellow"}
    for found in compared:
        figure = found.changes["figure"]
        texts = [found.changes[measure].text if measure in found.changes else "" for measure in measures]
        table.add_row(
            found.key[0],
            found.key[1],
            f"{number(figure.before.median)} {found.unit}",
            number(figure.after.median),
            figure.text,
            *texts,
            found.verdict,
            style=styles.get(found.verdict),
        )
    return table


def _where(path: Path, rows: Sequence[Row]) -> str:
    found = next((found for found in rows if "hardware" in found), {})
    parts = [describe_hardware(found["hardware"])] if "hardware" in found else []
    parts += [str(found.get("date", ""))[:16], f"commit {found['commit']}" if found.get("commit") else ""]
    return f"{path}: {len(rows)} rows, " + ", ".join(part for part in parts if part)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=0.05, help="a share; less is no change (0.05)")
    options = parser.parse_args(arguments)
    if not 0 <= options.threshold < math.inf:
        parser.error(f"--threshold {options.threshold}: must be 0 or more")
    try:
        before, after = read(options.before), read(options.after)
        compared = compare(before, after, options.threshold)
        if not compared:
            raise BadFileError(
                f"{options.before} and {options.after}: no row was measured in both; compare two files that the same "
                "command wrote"
            )
    except BadFileError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = NOT_A_TERMINAL
    for word, path, rows in (("before", options.before, before), ("after", options.after, after)):
        console.print(f"{word}: {_where(path, rows)}", soft_wrap=True)
    for line in differences(before, after):
        console.print(f"differs: {line}", style="yellow", soft_wrap=True)
    console.print(_table(compared))
    for line in one_sided(before, after):
        console.print(line, soft_wrap=True)
    verdicts = [found.verdict for found in compared]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    console.print(f"{len(compared)} row{'s' if len(compared) != 1 else ''} in both: {counts}.")
    return 1 if "worse" in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
