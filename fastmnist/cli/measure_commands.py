"""Commands that measure: bench, doctor, tune, speedrun and ladder."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any, List, Optional

from fastmnist.cli.parser import (
    INTERRUPTED,
    Parser,
    add_data_flags,
    add_image_size,
    add_run_flags,
    configure,
    new_folder,
    new_parser,
    without_folders,
)
from fastmnist.files import write_json
from fastmnist.loader_settings import LOADER_SETTINGS

# ruff: noqa: UP006, UP035, UP045  # jsonargparse reads these types on Python 3.10 too


def bench_parser() -> Parser:
    parser = new_parser("Benchmark the loaders on this machine: one table, one picture, in under 3 minutes.")
    parser.add_argument("--quick", action="store_true", help="Only the most important loaders, in half a minute.")
    parser.add_argument("--dataset", type=Optional[str], help="As for train; by default mnist, or digits.")
    add_data_flags(parser, dataset=False)
    add_image_size(parser)
    parser.add_argument("--batch-size", type=int, default=512, help="Images per batch.")
    parser.add_argument("--device", type=str, default="auto", help="Device of the batches: auto, cpu, cuda and so on.")
    parser.add_argument(
        "--only", type=Optional[str], metavar="NAMES", help="Measure only these, named as in the table: a;b."
    )
    parser.add_argument("--out", type=Optional[str], help="Folder of results; by default runs/<date>-bench-<n>.")
    return parser


def bench_command(options: Any) -> int:
    from fastmnist.files import write_bytes
    from fastmnist.measure.bench import FULL, QUICK, bench, bench_file, choose_contenders
    from fastmnist.report.bench_chart import plot_bars
    from fastmnist.report.tables import footnotes, markdown, rich_table
    from fastmnist.system.progress import Reporter

    reporter = Reporter()
    contenders = choose_contenders(options.only, options.quick)
    data, note = bench_file(options.dataset, options.data_dir, image_size=options.image_size, progress=reporter.writing)
    if note:
        reporter.say(note)
    with new_folder(options.out, "bench") as folder:
        with reporter.working() as progress:
            result = bench(
                data,
                batch_size=options.batch_size,
                device=options.device,
                contenders=contenders,
                plan=QUICK if options.quick else FULL,
                progress=progress,
            )
        reporter.console.print(rich_table(result.rows))
        for line in footnotes(result.rows):
            reporter.say(line)
        write_json(folder / "bench.json", result.to_dict())
        write_bytes(folder / "bench.md", markdown(result.rows).encode())
        loaders = [row for row in result.rows if row["group"] == "loader"]
        plot_bars(loaders, [folder / "bench.png", folder / "bench.svg"])
    reporter.say(f"{folder} has the table, the picture and all values. {result.seconds:.0f} s in all.")
    write_json(options.json, result.to_dict() | {"folder": str(folder)})
    return INTERRUPTED if result.interrupted else 0


def doctor_parser() -> Parser:
    parser = new_parser("Diagnose a training run: does the model wait for data, and what would a faster loader gain.")
    parser.add_argument("--seconds", type=float, default=6.0, help="Seconds to measure.")
    parser.add_argument(
        "--compare",
        type=str,
        nargs=2,
        metavar=("BEFORE", "AFTER"),
        help="Measure nothing: tell what changed beyond noise between two files of --json, or two of train --watch.",
    )
    add_run_flags(parser)
    return parser


def doctor_command(options: Any) -> int:
    from fastmnist.measure.changes import compare_files
    from fastmnist.measure.doctor import diagnose_training
    from fastmnist.measure.straggler import Comparison, Step
    from fastmnist.system.processes import gather, rank
    from fastmnist.system.progress import Reporter

    reporter = Reporter(options.quiet, silent=rank() > 0)
    if options.compare:
        changes = compare_files(*options.compare)
        reporter.result(changes.verdict())
        for line in changes.lines():
            reporter.say(line)
        write_json(options.json, changes.to_dict())
        return 0
    result = diagnose_training(configure(options)[0], options.seconds, reporter)
    reporter.result(result.verdict)
    steps = gather(Step.of(result.evidence))
    content = result.to_dict()
    if len(steps) > 1:
        comparison = Comparison(steps)
        reporter.result(comparison.verdict())
        content |= comparison.to_dict()
    for line in result.lines():
        reporter.say(line)
    if not rank():
        write_json(options.json, content)
    return 0


def tune_parser() -> Parser:
    parser = new_parser("Tune a run's loader on this machine: find the fastest settings, as YAML for train --config.")
    parser.add_argument("--budget", type=float, default=30.0, help="Seconds; at least two settings are compared.")
    parser.add_argument("--loader-only", action="store_true", help="Measure the loader without the model.")
    parser.add_argument("--max-memory", type=Optional[float], metavar="MB", help="Memory limit of loaders (megabytes).")
    parser.add_argument(
        "--apply", action="store_true", help="Also run doctor with the settings before and with those found."
    )
    parser.add_argument(
        "--batch-sizes", type=List[int], default=[], help="Try these too, [128,256]; they train differently."
    )
    parser.add_argument("--orders", type=List[str], default=[], help="Try these orders too: [quasi_random].")
    add_run_flags(parser, loader=f"{', '.join(LOADER_SETTINGS)}, or all.")
    return parser


def tune_command(options: Any) -> int:
    from fastmnist.measure.changes import compare
    from fastmnist.measure.doctor import diagnose_training
    from fastmnist.measure.tune import tune, write_yaml
    from fastmnist.report.tables import search_table
    from fastmnist.report.tune_chart import plot_search
    from fastmnist.system.progress import Reporter

    reporter = Reporter(options.quiet)
    if options.loader == "all":
        options.given["loader"] = "ours"
    config, _ = configure(options)
    with new_folder(config.out, "tune") as folder:
        with reporter.working() as progress:
            result = tune(
                config,
                loader=options.loader,
                budget=options.budget,
                loader_only=options.loader_only,
                max_memory=None if options.max_memory is None else int(options.max_memory * 1e6),
                batch_sizes=options.batch_sizes,
                orders=options.orders,
                reporter=reporter,
                progress=progress,
            )
        reporter.console.print(search_table(result.to_dict()))
        write_yaml(result, folder / "tuned.yaml")
        write_json(folder / "tune.json", result.to_dict())
        plot_search(result.to_dict(), folder / "search.png")
        content = result.to_dict() | {"folder": str(folder)}
        if options.apply:
            applied = (diagnose_training(one, reporter=Reporter(quiet=True)) for one in (config, result.apply(config)))
            before, after = (diagnosis.to_dict() for diagnosis in applied)
            for name, diagnosis in {"before": before, "after": after}.items():
                write_json(folder / f"{name}.json", diagnosis)
            changes = compare(before, after)
            content |= {"before": before, "after": after, "changes": changes.to_dict()}
            for line in [*changes.lines(), changes.verdict()]:
                reporter.result(line)
    reporter.result(f"{result.verdict()} Use it: fastmnist train --config {folder / 'tuned.yaml'}")
    write_json(options.json, content)
    return 0


def speedrun_parser() -> Parser:
    parser = new_parser("Repeat a run with many seeds: accuracy and training seconds, their spread and a picture.")
    parser.add_argument("--seeds", type=int, default=20, help="Number of runs, with consecutive seeds from --seed.")
    parser.add_argument("--shifted", action="store_true", help="Also average over one-pixel shifts of test images.")
    add_run_flags(parser)
    return parser


def speedrun_command(options: Any) -> int:
    from fastmnist.presets import TARGETS
    from fastmnist.report.speedrun_chart import plot_speedrun
    from fastmnist.runs.speedrun import speedrun
    from fastmnist.system.processes import rank
    from fastmnist.system.progress import Reporter

    reporter = Reporter(options.quiet, silent=rank() > 0)
    config, preset = configure(options)
    with new_folder(config.out, "speedrun") as folder:
        with reporter.working() as progress:
            result = speedrun(
                replace(config, out=None),
                options.seeds,
                preset=preset,
                command=f"fastmnist {shlex.join(without_folders(options.arguments))}",
                shifted=options.shifted,
                target=TARGETS.get(preset),
                reporter=reporter,
                progress=progress,
            )
        if rank():
            return 0
        write_json(folder / "speedrun.json", result.to_dict())
        plot_speedrun(result.to_dict(), [folder / "speedrun.png", folder / "speedrun.svg"])
    reporter.result(f"{result.verdict()}. {folder} has the picture and every seed.")
    write_json(options.json, result.to_dict() | {"folder": str(folder)})
    return INTERRUPTED if result.interrupted else 0


def ladder_parser() -> Parser:
    parser = new_parser("Climb from a plain training script to the fast run: the gain of each rung on this machine.")
    parser.add_argument("--quick", action="store_true", help="One seed, a quarter of the images: two minutes.")
    parser.add_argument("--seeds", type=Optional[int], help="Runs per rung; by default 3, with --quick 1.")
    parser.add_argument(
        "--images",
        type=Optional[int],
        help="Training images per run; by default 12,000 on a CPU and 120,000 on a GPU, with --quick a quarter.",
    )
    parser.add_argument("--dataset", type=Optional[str], help="As for train; by default mnist, or digits.")
    add_data_flags(parser, dataset=False)
    add_image_size(parser)
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda and so on.")
    parser.add_argument("--out", type=Optional[str], help="Folder of results; by default runs/<date>-ladder-<n>.")
    return parser


def ladder_command(options: Any) -> int:
    from fastmnist.files import write_bytes
    from fastmnist.report.ladder_chart import ladder_markdown, ladder_table, notes, plot_ladder
    from fastmnist.runs.ladder import ladder
    from fastmnist.system.progress import Reporter

    reporter = Reporter()
    with new_folder(options.out, "ladder") as folder:
        with reporter.working() as progress:
            result = ladder(
                seeds=options.seeds,
                images=options.images,
                quick=options.quick,
                dataset=options.dataset,
                data_dir=options.data_dir,
                image_size=options.image_size,
                device=options.device,
                reporter=reporter,
                progress=progress,
            )
        reporter.console.print(ladder_table(result.rows))
        for line in notes(result.rows):
            reporter.say(line)
        write_json(folder / "ladder.json", result.to_dict())
        write_bytes(folder / "ladder.md", ladder_markdown(result.to_dict()).encode())
        plot_ladder(result.to_dict(), [folder / "ladder.png", folder / "ladder.svg"])
    reporter.say(f"{folder} has the table, the picture and all values. {result.seconds:.0f} s in all.")
    write_json(options.json, result.to_dict() | {"folder": str(folder)})
    return INTERRUPTED if result.interrupted else 0
