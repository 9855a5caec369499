"""Throughput over commits: the suite's ratios at each commit, measured in turn, and the picture of them.

    python benchmarks/track.py COMMIT COMMIT... --output track.json [--turns 6] [-- PYTEST ARGUMENTS]
    python benchmarks/track.py v0.1.0 HEAD~10 HEAD --output track.json -- test_loader.py test_gather.py -k fastmnist

Each commit is measured from a checkout of its own with its own suite. A turn measures all of them; each row's value of
a turn is the median of its ratio to the plain copy ("of_limit") and, for a loader, to the plain DataLoader
("over_plain"). Rows without such a ratio are left out, since their times would show the machine. A PNG beside OUTPUT
draws ratio over commit, with the 95 % intervals of the turns, so that a change has a date.

Exit status: 1 when a row of the last commit is worse than at the first by the rules of compare.py, 0 when none is, 2
when a commit cannot be measured.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from compare import RATIOS, BadFileError, compare, key_of, read

from fastmnist.errors import FastmnistError
from fastmnist.files import write_json
from fastmnist.report.style import TRAIN, VALIDATION, new_figure, save, styled, wrapped
from fastmnist.system.statistics import LEAST_FOR_INTERVAL, in_turns, summarise

ROOT = Path(__file__).resolve().parents[1]
PLAIN = "DataLoader, plain"
NAMED = {"of_limit": "of the plain copy", "over_plain": "times the plain DataLoader"}
ACROSS, WIDTH, HEIGHT = 3, 3.6, 2.6  # panels side by side, and inches of each

Row = Mapping[str, Any]


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise FastmnistError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def measure(checkout: Path, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the checkout's own suite; raises FastmnistError where it writes none."""
    file = checkout / "rows.json"
    file.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, "--rows", str(file)],
        cwd=checkout / "benchmarks",
        env=os.environ | {"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )
    try:
        return read(file)
    except BadFileError as error:
        raise FastmnistError(f"{error}\n{done.stdout[-2000:]}{done.stderr[-2000:]}") from None


def measure_in_turn(
    hashes: Sequence[str], count: int, arguments: Sequence[str]
) -> dict[str, list[list[dict[str, Any]]]]:
    """The rows of each turn, by commit."""
    found: dict[str, list[list[dict[str, Any]]]] = {hash: [] for hash in hashes}
    with tempfile.TemporaryDirectory() as folder:
        places = {hash: Path(folder) / hash for hash in found}

        def turn_of(hash: str) -> float:
            found[hash].append(measure(places[hash], arguments))
            return 0.0

        try:
            for hash, place in places.items():
                git("worktree", "add", "--quiet", "--detach", str(place), hash)
            in_turns(
                {hash: partial(turn_of, hash) for hash in found},
                count,
                on_turn=lambda turn: print(f"turn {turn} of {count} done", flush=True),
            )
        finally:
            for place in places.values():
                git("worktree", "remove", "--force", str(place))
    return found


def ratios_of_turn(rows: Sequence[Row]) -> dict[Any, Row]:
    """The measured rows by key, each loader with its ratio to the plain DataLoader of the same turn."""
    measured = [row for row in rows if "error" not in row and row.get("kind") != "limit"]
    plain = next((row["median"] for row in measured if (row["group"], row["name"]) == ("loader", PLAIN)), None)
    found = {}
    for row in measured:
        if plain and row["group"] == "loader" and row["name"] != PLAIN:
            row = {**row, "over_plain": {"median": row["median"] / plain}}
        if any(ratio in row for ratio in RATIOS):
            found[key_of(row)] = row
    return found


def merged(turns: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """One row for each that every turn measured, its values the medians of the turns."""
    each = [ratios_of_turn(rows) for rows in turns]
    result = []
    for key, first in each[0].items():
        found = [turn[key] for turn in each if key in turn]
        if len(found) < len(each):
            continue
        values = [row["median"] for row in found]
        row = {**first, **summarise(values).to_dict(), "values": values}
        for ratio in RATIOS:
            if ratio in first:
                shares = [turn[ratio]["median"] for turn in found]
                row[ratio] = summarise(shares).to_dict() | {"values": shares}
        result.append(row)
    return result


def plot(commits: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws each ratio over the commits, the first to the left."""
    series: dict[tuple[str, str, str], list[tuple[int, Row]]] = {}
    for at, commit in enumerate(commits):
        for row in commit["rows"]:
            for ratio in RATIOS:
                if ratio in row:
                    series.setdefault((row["group"], row["name"], ratio), []).append((at, row[ratio]))
    down = -(-len(series) // ACROSS)
    with styled():
        figure = new_figure(ACROSS * WIDTH, down * HEIGHT)
        panels = figure.subplots(down, ACROSS, squeeze=False).flat
        for ((group, name, ratio), points), axes in zip(series.items(), panels, strict=False):
            places = [at for at, _ in points]
            low, middle, high = ([summary[part] for _, summary in points] for part in ("low", "median", "high"))
            axes.vlines(places, low, high, color=VALIDATION)
            axes.plot(places, middle, "o-", color=TRAIN, markersize=4)
            title = wrapped(f"{group}: {name}, {NAMED[ratio]}", WIDTH - 0.9, 9, "bold")
            axes.set_title("\n".join(title), fontsize=9)
            axes.set_ylim(0, 1.15 * max(high))
            axes.set_xlim(-0.5, len(commits) - 0.5)
            labels = [f"{commit['commit'][:7]}\n{commit['date'][5:10]}" for commit in commits]
            axes.set_xticks(range(len(commits)), labels, fontsize=7)
        for axes in list(panels):
            axes.remove()
        save(figure, path)


def tell(before: Mapping[str, Any], after: Mapping[str, Any], threshold: float) -> bool:
    """Prints what changed from one commit to another; whether anything got worse."""
    found = compare(before["rows"], after["rows"], threshold)
    print(f"{before['commit'][:7]} to {after['commit'][:7]}, {after['date'][:10]}, {after['subject']}:")
    changed = [row for row in found if row.verdict in ("better", "worse", "unclear")]
    for row in changed:
        change = row.changes[row.ratio or "figure"]
        print(f"  {row.verdict}: {row.key[0]}: {row.key[1]}: {change.before.median:.3g} to {change.after.median:.3g}")
    print(f"  {len(found) - len(changed)} of {len(found)} rows no different")
    return any(row.verdict == "worse" for row in found)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="+", help="at least two, the oldest first; whatever git rev-parse understands")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the picture goes beside it")
    parser.add_argument("--turns", type=int, default=6, help="processes per commit; fewer than 6 give no verdict (6)")
    parser.add_argument("--threshold", type=float, default=0.05, help="a share; less is no change (0.05)")
    given = list(sys.argv[1:] if arguments is None else arguments)
    at = given.index("--") if "--" in given else len(given)
    options, suite = parser.parse_args(given[:at]), given[at + 1 :]
    if options.turns < 1:
        parser.error(f"--turns {options.turns}: must be at least 1")
    try:
        hashes = [git("rev-parse", "--verify", f"{name}^{{commit}}") for name in options.commits]
        if len(set(hashes)) < 2:
            raise FastmnistError("name at least two different commits, the oldest first")
        turns = measure_in_turn(hashes, options.turns, suite)
    except FastmnistError as error:
        print(f"track.py: {error}", file=sys.stderr)
        return 2
    commits = []
    for hash in turns:
        date, subject = git("show", "--no-patch", "--format=%cI%n%s", hash).split("\n", 1)
        commits.append({"commit": hash, "date": date, "subject": subject, "rows": merged(turns[hash])})
    write_json(options.output, {"turns": options.turns, "commits": commits})
    plot(commits, options.output.with_suffix(".png"))
    pairs = list(itertools.pairwise(commits))
    if len(commits) > 2:
        pairs.append((commits[0], commits[-1]))
    worse = [tell(*pair, options.threshold) for pair in pairs]
    if options.turns < LEAST_FOR_INTERVAL:
        print(f"{options.turns} turns have no 95 % interval: nothing was judged")
    return int(worse[-1])


if __name__ == "__main__":
    sys.exit(main())
