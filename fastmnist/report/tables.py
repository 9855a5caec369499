"""Tables of comparisons, evaluations and benchmarks, for the terminal and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from fastmnist.presets import verdict
from fastmnist.system.environment import describe_hardware
from fastmnist.system.numbers import mebibytes, rough_percent, rough_seconds, with_interval

if TYPE_CHECKING:
    import numpy as np
    from rich.table import Table

Row = Mapping[str, Any]
COLUMNS = 80  # of a terminal
HEADINGS = (
    "loader",
    "images/s",
    "times the plain DataLoader",
    "share of a copy's speed",
    "first batch",
    "peak memory",
)
CPU_HEADING = "CPU seconds per million images"  # a column of results that have it


def headings(rows: Sequence[Row]) -> tuple[str, ...]:
    """Of the columns that `cells` makes of these rows."""
    return (*HEADINGS, CPU_HEADING) if any(found["group"] == "CPU time" for found in rows) else HEADINGS


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A row of cells under `headings` per measured loader, the fastest first."""
    names = headings(rows)
    lines: list[tuple[str, ...]] = []
    of_group = {(found["group"], found["name"]): found for found in rows if "error" not in found}
    loaders = [found for (group, _), found in of_group.items() if group == "loader"]
    for found in sorted(loaders, key=lambda row: -row["median"]):
        limited = "of_limit" in found and found["kind"] != "limit"
        groups = ("first batch", "peak memory", "CPU time")
        first, memory, used = (of_group.get((group, found["name"])) for group in groups)
        lines.append(
            (
                found["name"],
                with_interval(found),
                with_interval(found["over_plain"]) if "over_plain" in found else "",
                with_interval(found["of_limit"], rough_percent) if limited else "",
                with_interval(first, rough_seconds) if first else "",
                with_interval(memory, mebibytes) if memory else "",
                with_interval(used) if used else "",
            )[: len(names)]
        )
    return lines


def footnotes(rows: Sequence[Row]) -> list[str]:
    """Cold caches, what could not be measured, and how and on what the rest was measured."""
    notes = []
    for found in rows:
        if found["group"] == "first batch" and found.get("settings", {}).get("jit_cache") == "cold":
            notes.append(
                f"{found['name'].removesuffix(', cold')} without its cached machine code: first batch after "
                f"{with_interval(found, rough_seconds)}."
            )
    notes += [
        f"{found['name']}, above 100 %: it reads bytes and writes floats; the copy of its floats reads floats too."
        for found in rows
        if "of_limit" in found and found["of_limit"]["low"] > 1
    ]
    notes += [f"{found['name']}: not measured: {found['error']}." for found in rows if "error" in found]
    measured = next((found for found in rows if "error" not in found and found["group"] == "loader"), None)
    if measured is not None:
        versions = measured["versions"]
        notes.append(
            f"Medians of {measured['n']} turns with 95 % intervals, batch {measured['settings']['batch_size']}, "
            f"{measured['images']:,} images of {measured['data']} on {measured['device']}; "
            f"{describe_hardware(measured['hardware'])}; Python {versions['python']}, torch {versions['torch']}; "
            f"{measured['date'][:10]}, commit {measured['commit'] or 'unknown'}."
        )
    return notes


def console_table(headings: Sequence[str], lines: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> Table:
    """A table of plain texts for 80 columns: lines break between words, never within one.

    left: the columns that are not aligned to the right.
    """
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    shown = [[text.replace(" (", "\n(") for text in line] for line in lines]  # an interval goes below its median
    columns = list(zip(headings, *shown, strict=True))
    widths, least = (
        [max(len(part) for text in column for part in split.findall(text)) for column in columns]
        for split in (re.compile(r".+"), re.compile(r"\S+"))
    )
    gap = 2
    while sum(widths) + gap * len(widths) > COLUMNS and widths != least:
        widest = max(range(len(widths)), key=lambda at: (widths[at] > least[at], widths[at]))
        widths[widest] -= 1
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, gap - 1, 0, 0))
    for at, (heading, width) in enumerate(zip(headings, widths, strict=True)):
        table.add_column(heading, justify="left" if at in left else "right", width=width)
    for line in shown:
        table.add_row(*map(escape, line))
    return table


def rich_table(rows: Sequence[Row]) -> Table:
    lines = cells(rows)
    # The last columns hardly vary, and a terminal is narrow.
    short = [[*line[:5], *(text.partition(" (")[0] for text in line[5:])] for line in lines]
    table = console_table(headings(rows), short)
    for line, shown in zip(lines, table.rows, strict=True):
        shown.style = "bold" if line[0].startswith("fastmnist") else None
    return table


def markdown(rows: Sequence[Row]) -> str:
    names = headings(rows)
    lines = ["| " + " | ".join(names) + " |", "| --- |" + " ---: |" * (len(names) - 1)]
    lines += ["| " + " | ".join(line) + " |" for line in cells(rows)]
    return "\n".join([*lines, "", *footnotes(rows)]) + "\n"


def evaluation_tables(confusion: np.ndarray, class_names: Sequence[str]) -> list[Table]:
    """Accuracy per class and, for at most ten classes, the confusion matrix.

    confusion: (C, C) counts, rows are true classes.
    """
    from rich.table import Table

    classes = Table("class", "images", "right", "accuracy", "most often taken for")
    short = [str(index) for index in range(len(class_names))]
    if max(map(len, class_names)) <= 3:
        short = list(class_names)
    matrix = Table("true \\ predicted", *short)
    for index, (name, row) in enumerate(zip(class_names, confusion, strict=True)):
        wrong = row.copy()
        wrong[index] = 0
        mistaken = f"{class_names[wrong.argmax()]} ({wrong.max()})" if wrong.any() else ""
        total = int(row.sum())
        classes.add_row(name, f"{total:,}", f"{row[index]:,}", f"{row[index] / max(total, 1):.2%}", mistaken)
        shown = name if short[index] == name else f"{short[index]} {name}"
        matrix.add_row(shown, *(str(count) if count else "·" for count in row))
    return [classes, matrix] if len(class_names) <= 10 else [classes]


def search_table(found: Mapping[str, Any]) -> Table:
    """The candidates of a search for the fastest settings, as `Tuning.to_dict` gives them."""
    lines = []
    for line in found["candidates"]:
        status = " · ".join(part for part in (line["status"], line["reason"]) if part)
        memory = line.get("memory_bytes")
        lines.append(
            (
                line["name"],
                with_interval(line) if "median" in line else "",
                str(line.get("n", "")),
                "" if memory is None else mebibytes(memory),
                f"chosen · {status}" if line["chosen"] else status,
            )
        )
    table = console_table(("settings", found["unit"], "n", "memory", "outcome"), lines, left=(0, 4))
    for line, shown in zip(found["candidates"], table.rows, strict=True):
        shown.style = "bold" if line["chosen"] else None
    return table


def time_table(rows: Sequence[Row]) -> str:
    """The rows of benchmarks/time_to_accuracy.py as Markdown."""
    lines = [
        "| trained by | seeds | seconds of training | times the preset's | test accuracy |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for found in rows:
        took = f"{found['median']:.3g} ({found['low']:.3g} to {found['high']:.3g})"
        over = found["over_preset"]
        times = (
            "1"
            if over["low"] == over["high"] == 1
            else f"{over['median']:.2g} ({over['low']:.2g} to {over['high']:.2g})"
        )
        accuracies = [run["test_accuracy"] for run in found["runs"]]
        spread = f"{100 * min(accuracies):.2f} to {100 * max(accuracies):.2f}"
        n = found["n"]
        lines.append(f"| {found['name']} | {n} | {took} | {times} | {found['test_accuracy_mean']:.2%} ({spread}) |")
    first = rows[0]
    lines += [
        "",
        f"Seconds: medians with their range; accuracies: means with theirs. "
        f"{describe_hardware(first['hardware'])}; torch {first['versions']['torch']}; {first['date'][:10]}.",
    ]
    return "\n".join(lines) + "\n"


def verdict_table(found: Mapping[str, Any]) -> str:
    """The planted troubles of benchmarks/research/verdicts.py and what each tool answered, as Markdown."""
    score, tools = found["score"], found["tools"]
    names = [f"{tool} {tools[tool]}" if tool in tools else tool for tool in score]
    lines = [f"| planted trouble | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for case in found["cases"]:
        answers = []
        for tool in score:
            answer = case["tools"][tool]
            words = ", ".join(answer["words"]) or ("failed" if "error" in answer else "no verdict")
            answers.append(words if answer["right"] else f"wrong: {words}")
        lines.append(f"| {case['case']} | {' | '.join(answers)} |")
    count = len(found["cases"])
    lines.append(f"| right | {' | '.join(f'{score[tool]} of {count}' for tool in score)} |")
    return "\n".join(lines) + "\n"


def gpu_table(found: Mapping[str, Any]) -> str:
    """Accuracy and clocks of benchmarks/gpu_suite.py as Markdown."""
    lines = [
        "| trained by | seeds | test accuracy | above its target | training | MLPerf's clock | set-up |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    sides = {f"{name} preset": run for name, run in found["presets"].items()}
    for name, run in (sides | {"fast99 preset, not compiled": found["graph"]}).items():
        claim = f"{run['target']:.1%}: {verdict(run['p_value'])}, p = {run['p_value']:.2g}"
        lines.append(
            f"| {name} | {run['n']} | {run['test_accuracy_mean']:.3%} ± {run['test_accuracy_stdev']:.3%} | "
            f"{claim} | {run['train_seconds_mean']:.3f} s | "
            f"{run['mlperf_seconds_mean']:.3f} s | {run['compile_seconds']:.1f} s |"
        )
    published = found["small CNN"]
    accuracies, training, mlperf = (
        [run[name] for run in published["runs"]] for name in ("test_accuracy", "train_seconds", "mlperf_seconds")
    )
    lines.append(
        f"| published small CNN, here | {len(accuracies)} | {fmean(accuracies):.3%} ± {stdev(accuracies):.3%} | | "
        f"{fmean(training):.3f} s | {fmean(mlperf):.3f} s | |"
    )
    hardware, versions = found["hardware"], found["versions"]
    lines += [
        "",
        f"{hardware['gpu']} (driver {hardware['driver']}, {hardware['power_limit']}, {hardware['clock']}), "
        f"{hardware['cores']} cores of the host; torch {versions['torch']}; {found['date'][:10]}.",
    ]
    return "\n".join(lines) + "\n"


def step_table(found: Mapping[str, Any]) -> str:
    """The steps of benchmarks/gpu_suite.py as Markdown."""
    lines = [
        "| step of 256 images | milliseconds | kernels | GPU busy | of the bf16 matrix peak | set-up |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for step in found["steps"]["rows"]:
        low, middle, high = (f"{1e3 * step[name]:.3f}" for name in ("low", "median", "high"))
        profile = step["profile"]
        lines.append(
            f"| {step['name']} | {middle} ({low} to {high}) | {profile['kernels']:.0f} | {profile['busy']:.0%} | "
            f"{step['of_bf16_peak']['median']:.1%} | {step['set_up_seconds']:.1f} s |"
        )
    return "\n".join(lines) + "\n"
