"""The subcommands that measure: bench, doctor, tune and speedrun."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any, List, Optional

from fastmnist.cli.parser import (
    INTERRUPTED,
    Parser,
    add_data_flags,
    add_run_flags,
    config_of,
    new_folder,
    new_parser,
    without_folders,
    write_json,
)

# ruff: noqa: UP006, UP035, UP045  # jsonargparse reads these types on Python 3.10 too


def describe_bench() -> Parser:
    parser = new_parser(
        "Benchmark the ways to load images on this machine: one table, one picture, in under 3 minutes."
    )
    parser.add_argument("--quick", action="store_true", help="The most telling ones alone, in half a minute.")
    parser.add_argument("--dataset", type=Optional[str], help="As for train; by default mnist, or digits.")
    add_data_flags(parser, dataset=False)
    parser.add_argument("--batch-size", type=int, default=512, help="Images per batch.")
    parser.add_argument("--device", type=str, default="auto", help="Where batches go: auto, cpu, cuda and so on.")
    parser.add_argument(
        "--only", type=Optional[str], metavar="NAMES", help="These alone, as the table names them, separated by ';'."
    )
    parser.add_argument(
        "--out", type=Optional[str], help="Folder for table, pictures and JSON; by default runs/<date>-bench-<n>."
    )
    return parser


def bench_command(options: Any) -> int:
    from fastmnist.files import write_bytes
    from fastmnist.measure.bench import FULL, QUICK, bench, bench_file, choose_contenders
    from fastmnist.report.bench_chart import plot_bars
    from fastmnist.report.tables import footnotes, markdown, rich_table
    from fastmnist.system.progress import Reporter

    reporter = Reporter()
    contenders = choose_contenders(options.only, options.quick)
    data, note = bench_file(options.dataset, options.data_dir, progress=reporter.compiling)
    if note:
        reporter.say(note)
    with new_folder(options.out, "bench") as folder:
        with reporter.working() as progress:
            found = bench(
                data,
                batch_size=options.batch_size,
                device=options.device,
                contenders=contenders,
                plan=QUICK if options.quick else FULL,
                progress=progress,
            )
        reporter.console.print(rich_table(found.rows))
        for line in footnotes(found.rows):
            reporter.say(line)
        write_json(str(folder / "bench.json"), found.to_dict())
        write_bytes(folder / "bench.md", markdown(found.rows).encode())
        loaders = [row for row in found.rows if row["group"] == "loader"]
        plot_bars(loaders, [folder / "bench.png", folder / "bench.svg"])
    reporter.say(f"{folder} has the table, the picture and all values. {found.seconds:.0f} s in all.")
    write_json(options.json, found.to_dict() | {"folder": str(folder)})
    return INTERRUPTED if found.interrupted else 0


def describe_doctor() -> Parser:
    parser = new_parser("Diagnose a training run: does the model wait for data, and what could a faster loader gain.")
    parser.add_argument("--seconds", type=float, default=6.0, help="Seconds of measuring.")
    add_run_flags(parser)
    return parser


def doctor_command(options: Any) -> int:
    from fastmnist.measure.doctor import diagnose_training
    from fastmnist.system.progress import Reporter

    reporter = Reporter(options.quiet)
    found = diagnose_training(config_of(options)[0], options.seconds, reporter)
    reporter.result(found.verdict)
    for line in found.lines():
        reporter.say(line)
    write_json(options.json, found.to_dict())
    return 0


def describe_tune() -> Parser:
    parser = new_parser("Tune a run's loader on this machine: the fastest settings, as YAML for train --config.")
    parser.add_argument("--budget", type=float, default=30.0, help="Seconds in all; two settings are compared anyway.")
    parser.add_argument("--loader-only", action="store_true", help="Measure the loader alone, without the model.")
    parser.add_argument(
        "--max-memory", type=Optional[float], metavar="MB", help="Megabytes that loaders may take while they are tried."
    )
    parser.add_argument(
        "--batch-sizes", type=List[int], default=[], help="Try these too: [128,256]. Other batches train otherwise."
    )
    parser.add_argument("--orders", type=List[str], default=[], help="Try these orders too: [quasi_random].")
    add_run_flags(parser, loader="ours, ffcv, dataloader, tuned, tensors, or all of them.")
    return parser


def tune_command(options: Any) -> int:
    from fastmnist.measure.tune import tune, write_yaml
    from fastmnist.report.tables import search_table
    from fastmnist.report.tune_chart import plot_search
    from fastmnist.system.progress import Reporter

    reporter = Reporter(options.quiet)
    loader = options.loader
    config = replace(config_of(options)[0], loader="ours" if loader == "all" else loader)
    with new_folder(config.out, "tune") as folder:
        with reporter.working() as progress:
            found = tune(
                config,
                loader=loader,
                budget=options.budget,
                loader_only=options.loader_only,
                max_memory=None if options.max_memory is None else int(options.max_memory * 1e6),
                batch_sizes=options.batch_sizes,
                orders=options.orders,
                reporter=reporter,
                progress=progress,
            )
        reporter.console.print(search_table(found.to_dict()))
        write_yaml(found, folder / "tuned.yaml")
        write_json(str(folder / "tune.json"), found.to_dict())
        plot_search(found.to_dict(), folder / "search.png")
    reporter.result(f"{found.verdict()} Use it: fastmnist train --config {folder / 'tuned.yaml'}")
    write_json(options.json, found.to_dict() | {"folder": str(folder)})
    return 0


def describe_speedrun() -> Parser:
    parser = new_parser("Repeat a run with many seeds: accuracy and training seconds, with their spread and a picture.")
    parser.add_argument("--seeds", type=int, default=20, help="Runs, from --seed on.")
    parser.add_argument(
        "--shifted", action="store_true", help="Also average each test image over its shifts by one pixel."
    )
    add_run_flags(parser)
    return parser


def speedrun_command(options: Any) -> int:
    from fastmnist.presets import TARGETS
    from fastmnist.report.speedrun_chart import plot_speedrun
    from fastmnist.runs.speedrun import speedrun
    from fastmnist.system.progress import Reporter

    reporter = Reporter(options.quiet)
    config, preset = config_of(options)
    with new_folder(config.out, "speedrun") as folder:
        with reporter.working() as progress:
            found = speedrun(
                replace(config, out=None),
                options.seeds,
                preset=preset,
                command=f"fastmnist {shlex.join(without_folders(options.arguments))}",
                shifted=options.shifted,
                target=TARGETS.get(preset),
                reporter=reporter,
                progress=progress,
            )
        write_json(str(folder / "speedrun.json"), found.to_dict())
        plot_speedrun(found.to_dict(), [folder / "speedrun.png", folder / "speedrun.svg"])
    reporter.result(f"{found.verdict()}. {folder} has the picture and every seed.")
    write_json(options.json, found.to_dict() | {"folder": str(folder)})
    return INTERRUPTED if found.interrupted else 0


def describe_ladder() -> Parser:
    parser = new_parser("Climb from the plain notebook to the fast run: what each rung is worth here.")
    parser.add_argument("--quick", action="store_true", help="One seed and fewer images: 2 minutes on two cores.")
    parser.add_argument("--seeds", type=Optional[int], help="Runs per rung; by default 3, with --quick 1.")
    parser.add_argument(
        "--images",
        type=Optional[int],
        help="Training images per run; by default 12,000 on a CPU and 120,000 on a GPU, with --quick a quarter.",
    )
    parser.add_argument("--dataset", type=Optional[str], help="As for train; by default mnist, or digits.")
    add_data_flags(parser, dataset=False)
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda and so on.")
    parser.add_argument(
        "--out", type=Optional[str], help="Folder for table, picture and JSON; by default runs/<date>-ladder-<n>."
    )
    return parser


def ladder_command(options: Any) -> int:
    from fastmnist.files import write_bytes
    from fastmnist.report.ladder_chart import ladder_markdown, ladder_table, notes, plot_ladder
    from fastmnist.runs.ladder import ladder
    from fastmnist.system.progress import Reporter

    reporter = Reporter()
    with new_folder(options.out, "ladder") as folder:
        with reporter.working() as progress:
            found = ladder(
                seeds=options.seeds,
                images=options.images,
                quick=options.quick,
                dataset=options.dataset,
                data_dir=options.data_dir,
                device=options.device,
                reporter=reporter,
                progress=progress,
            )
        reporter.console.print(ladder_table(found.rows))
        for line in notes(found.rows):
            reporter.say(line)
        write_json(str(folder / "ladder.json"), found.to_dict())
        write_bytes(folder / "ladder.md", ladder_markdown(found.to_dict()).encode())
        plot_ladder(found.to_dict(), [folder / "ladder.png", folder / "ladder.svg"])
    reporter.say(f"{folder} has the table, the picture and all values. {found.seconds:.0f} s in all.")
    write_json(options.json, found.to_dict() | {"folder": str(folder)})
    return INTERRUPTED if found.interrupted else 0
