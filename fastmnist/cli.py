"""The command line: parse, call, print. Nothing heavy is imported before a subcommand runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, List, NoReturn, Optional

import jsonargparse

import fastmnist
from fastmnist.config import GROUPS, TrainConfig, flag
from fastmnist.errors import ConfigError, FastmnistError

if TYPE_CHECKING:
    from fastmnist.training.evaluate import Evaluation

STARTED = time.perf_counter()
LONGEST_ERROR = 400  # characters; a file that is no configuration is quoted whole otherwise
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

# ruff: noqa: UP006, UP035, UP045  # jsonargparse reads these types on Python 3.10 too


class Parser(jsonargparse.ArgumentParser):
    """Flags with hyphens, --x and --no-x for a yes or no, and wrong usage in one line with exit status 2."""

    def add_argument(self, *names: Any, **options: Any) -> Any:
        if options.get("type") is bool:
            del options["type"]
            options["action"] = jsonargparse.ActionYesNo(no_prefix="no-")
        hyphened = [name.replace("_", "-") if isinstance(name, str) else name for name in names]
        return super().add_argument(*hyphened, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = re.sub(r'^Parser key "(\w+)":', lambda key: f"{flag(key[1])}:", message)
        text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("typing.", "")
        raise ConfigError(textwrap.shorten(text, LONGEST_ERROR, placeholder=" ..."))


def build_parser() -> Parser:
    """The whole command line."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog="fastmnist", description=fastmnist.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fastmnist {fastmnist.__version__}")
    commands = parser.add_subcommands()
    for name, (describe, _) in COMMANDS.items():
        command = describe()
        commands.add_subcommand(name, command, help=f"{str(command.description).split(':')[0]}.")
    return parser


def _parser(description: str, *, writes_json: bool = True) -> Parser:
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    if writes_json:
        parser.add_argument(
            "--json", type=Optional[str], metavar="FILE", help="Write the result to FILE, for programs."
        )
    return parser


def _add_data_flags(parser: Parser, dataset: bool) -> None:
    if dataset:
        parser.add_argument(
            "--dataset",
            type=str,
            default="mnist",
            help="mnist, fashion, kmnist, qmnist, emnist-<split> or digits.",
        )
    parser.add_argument(
        "--data-dir",
        type=Optional[str],
        help="Folder with the IDX files (.gz or not); by default $FASTMNIST_DATA, then a download.",
    )


def _describe_compile() -> Parser:
    parser = _parser("Compile a dataset: source to <dataset>-train.beton and <dataset>-test.beton.")
    _add_data_flags(parser, dataset=True)
    parser.add_argument("--output", type=Optional[str], help="Folder for the files; by default the user's cache.")
    parser.add_argument(
        "--expand",
        type=Optional[int],
        metavar="N",
        help="Also write <dataset>-train-x<N>.beton, N deformed copies of each training image.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Of the copies' deformations.")
    return parser


def _compile(options: Any, arguments: Sequence[str]) -> int:
    from fastmnist.data.prepare import compile_dataset
    from fastmnist.report.progress import Reporter

    reporter = Reporter()
    begun = time.perf_counter()
    files = compile_dataset(
        options.dataset,
        options.data_dir,
        options.output,
        progress=reporter.compiling,
        expand=options.expand,
        seed=options.seed,
        say=reporter.say,
    )
    seconds = time.perf_counter() - begun
    for file in files:
        reporter.say(f"{file.path}: {file.samples:,} samples, {file.status}")
    content = [{"path": str(f.path), "split": f.split, "samples": f.samples, "status": f.status} for f in files]
    _write_json(options.json, {"dataset": options.dataset, "files": content, "seconds": seconds})
    return 0


def _describe_verify() -> Parser:
    parser = _parser("Verify a compiled file: header, counts, every checksum.", writes_json=False)
    parser.add_argument("file", type=str, help="The .beton file.")
    return parser


def _verify(options: Any, arguments: Sequence[str]) -> int:
    from fastmnist.data.beton import Beton

    with Beton(options.file) as file:
        print(f"{options.file}: {file.verify_content()}")
    return 0


def _describe_train() -> Parser:
    parser = _parser("Train a model: compile the data where needed, train, evaluate, draw, write the run's folder.")
    parser.add_argument(
        "--resume", type=Optional[str], metavar="DIR", help="Go on with the run in DIR that was stopped."
    )
    _add_run_flags(parser)
    return parser


def _add_run_flags(parser: Parser, loader: str | None = None) -> None:
    """A run's settings. loader: what --loader says where it may also be "all"."""
    parser.add_argument(
        "--preset",
        type=str,
        default="auto",
        help="Settings that the flags below override: fast99, fast995 or accurate for a GPU, cpu, none; auto takes "
        "cpu or fast995 for MNIST, by the device.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below.")
    for group in GROUPS:
        parser.add_class_arguments(group, skip={"loader"} if loader else set())
    if loader:
        parser.add_argument("--loader", type=str, default="ours", help=loader)


def _given(options: Any, arguments: Sequence[str]) -> dict[str, Any]:
    """The run's settings that flags or a file name; defaults are not among them."""
    given = vars(getattr(build_parser().parse_args(arguments, defaults=False), options.subcommand))
    return {name: value for name, value in given.items() if name in TrainConfig.__dataclass_fields__}


def _config_of(options: Any, arguments: Sequence[str]) -> tuple[TrainConfig, str]:
    """The run's settings, and the name of the preset that they begin with."""
    from fastmnist.presets import choose_preset, preset_config
    from fastmnist.training.precision import choose_device

    name = choose_preset(options.preset, options.dataset, lambda: choose_device(options.device).type == "cuda")
    return preset_config(name, **_given(options, arguments)), name


def _train(options: Any, arguments: Sequence[str]) -> int:
    if options.resume is None:
        from fastmnist.run import train

        config, preset = _config_of(options, arguments)
        if preset != "none" and not config.quiet:
            print(f"preset {preset} (--preset none, or any flag, for other settings)")
        result = train(config, started=STARTED)
    else:
        from fastmnist.run import resume

        # What was not given keeps the run's own value, and is no change.
        result = resume(options.resume, _given(options, arguments), started=STARTED)
    _write_json(options.json, result.summary | {"folder": str(result.folder)})
    return INTERRUPTED if result.interrupted else 0


def _describe_evaluate() -> Parser:
    parser = _parser("Evaluate a run on its test set: accuracy, per class, confusion matrix.")
    parser.add_argument("run", type=str, help="The run's folder.")
    _add_data_flags(parser, dataset=False)
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda and so on.")
    return parser


def _evaluate(options: Any, arguments: Sequence[str]) -> int:
    from fastmnist.inference import evaluate

    result, names = evaluate(options.run, data_dir=options.data_dir, device=options.device)
    confusion = result.confusion()
    _print_evaluation(result, confusion, names)
    per_class = {
        name: float(row[i] / max(row.sum(), 1)) for i, (name, row) in enumerate(zip(names, confusion, strict=True))
    }
    content = {
        "test_accuracy": result.accuracy,
        "test_loss": result.loss,
        "test_images": len(result.labels),
        "per_class": per_class,
        "confusion": confusion.tolist(),
    }
    _write_json(options.json, content)
    return 0


def _print_evaluation(result: Evaluation, confusion: Any, names: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("class", "images", "right", "accuracy", "most often taken for")
    for index, (name, row) in enumerate(zip(names, confusion, strict=True)):
        wrong = row.copy()
        wrong[index] = 0
        mistaken = f"{names[wrong.argmax()]} ({wrong.max()})" if wrong.any() else ""
        total = int(row.sum())
        table.add_row(name, f"{total:,}", f"{row[index]:,}", f"{row[index] / max(total, 1):.2%}", mistaken)
    console = Console(highlight=False)
    console.print(table)
    if len(names) <= 10:
        matrix = Table("true \\ predicted", *names)
        for name, row in zip(names, confusion, strict=True):
            matrix.add_row(name, *(str(count) if count else "·" for count in row))
        console.print(matrix)
    wrong_count = int((result.predictions != result.labels).sum())
    console.print(
        f"Test accuracy {result.accuracy:.2%} ({wrong_count:,} of {len(result.labels):,} wrong)", markup=False
    )


def _describe_predict() -> Parser:
    parser = _parser("Predict what is on pictures: label and probabilities for any PNG or JPEG of a digit.")
    parser.add_argument("run", type=str, help="The run's folder.")
    parser.add_argument("images", type=str, nargs="+", metavar="IMAGE", help="Pictures, of any size and colour.")
    return parser


def _predict(options: Any, arguments: Sequence[str]) -> int:
    from fastmnist.inference import predict

    predictions = predict(options.run, options.images)
    for prediction in predictions:
        ranked = ", ".join(f"{name} {share:.1%}" for name, share in prediction.ranked()[:3])
        print(f"{prediction.path}: {prediction.label}  ({ranked})")
    _write_json(
        options.json,
        [{"path": str(p.path), "label": p.label, "probabilities": dict(p.ranked())} for p in predictions],
    )
    return 0


def _describe_bench() -> Parser:
    parser = _parser("Benchmark the ways to load images on this machine: one table, one picture, in under 3 minutes.")
    parser.add_argument("--quick", action="store_true", help="The most telling ones alone, in half a minute.")
    parser.add_argument("--dataset", type=Optional[str], help="As for train; by default mnist, or digits.")
    _add_data_flags(parser, dataset=False)
    parser.add_argument("--batch-size", type=int, default=512, help="Images per batch.")
    parser.add_argument("--device", type=str, default="auto", help="Where batches go: auto, cpu, cuda and so on.")
    parser.add_argument(
        "--only", type=Optional[str], metavar="NAMES", help="These alone, as the table names them, separated by ';'."
    )
    parser.add_argument(
        "--out", type=Optional[str], help="Folder for table, pictures and JSON; by default runs/<date>-bench-<n>."
    )
    return parser


def _bench(options: Any, arguments: Sequence[str]) -> int:
    from fastmnist.measure.bench import FULL, QUICK, bench, bench_file, choose_sides
    from fastmnist.report.bars import plot_bars
    from fastmnist.report.progress import Reporter
    from fastmnist.report.table import footnotes, markdown, rich_table

    reporter = Reporter()
    sides = choose_sides(options.only, options.quick)
    data, note = bench_file(options.dataset, options.data_dir, progress=reporter.compiling)
    if note:
        reporter.say(note)
    with _new_folder(options.out, "bench") as folder:
        with reporter.working() as progress:
            found = bench(
                data,
                batch_size=options.batch_size,
                device=options.device,
                sides=sides,
                plan=QUICK if options.quick else FULL,
                progress=progress,
            )
        reporter.console.print(rich_table(found.rows))
        for line in footnotes(found.rows):
            reporter.say(line)
        _write_json(str(folder / "bench.json"), found.to_dict())
        (folder / "bench.md").write_text(markdown(found.rows))
        loaders = [row for row in found.rows if row["group"] == "loader"]
        plot_bars(loaders, [folder / "bench.png", folder / "bench.svg"])
    reporter.say(f"{folder} has the table, the picture and all values. {found.seconds:.0f} s in all.")
    _write_json(options.json, found.to_dict() | {"folder": str(folder)})
    return INTERRUPTED if found.interrupted else 0


def _describe_doctor() -> Parser:
    parser = _parser("Diagnose a training run: does the model wait for data, and what could a faster loader gain.")
    parser.add_argument("--seconds", type=float, default=6.0, help="Seconds of measuring.")
    _add_run_flags(parser)
    return parser


def _doctor(options: Any, arguments: Sequence[str]) -> int:
    from fastmnist.measure.doctor import diagnose_training
    from fastmnist.report.progress import Reporter

    reporter = Reporter(options.quiet)
    found = diagnose_training(_config_of(options, arguments)[0], options.seconds, reporter)
    reporter.result(found.verdict)
    for line in found.lines():
        reporter.say(line)
    _write_json(options.json, found.to_dict())
    return 0


def _describe_tune() -> Parser:
    parser = _parser("Tune a run's loader on this machine: the fastest settings, as YAML for train --config.")
    parser.add_argument("--budget", type=float, default=30.0, help="Seconds in all.")
    parser.add_argument("--loader-only", action="store_true", help="Measure the loader alone, without the model.")
    parser.add_argument(
        "--max-memory", type=Optional[float], metavar="MB", help="Megabytes that loaders may take while they are tried."
    )
    parser.add_argument(
        "--batch-sizes", type=List[int], default=[], help="Try these too: [128,256]. Other batches train otherwise."
    )
    parser.add_argument("--orders", type=List[str], default=[], help="Try these orders too: [quasi_random].")
    _add_run_flags(parser, loader="ours, ffcv, dataloader, tuned, tensors, or all of them.")
    return parser


def _tune(options: Any, arguments: Sequence[str]) -> int:
    from fastmnist.measure.tune import tune, write_yaml
    from fastmnist.report.progress import Reporter
    from fastmnist.report.search import plot_search
    from fastmnist.report.table import search_table

    reporter = Reporter(options.quiet)
    loader = options.loader
    config = replace(_config_of(options, arguments)[0], loader="ours" if loader == "all" else loader)
    with _new_folder(config.out, "tune") as folder:
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
        _write_json(str(folder / "tune.json"), found.to_dict())
        plot_search(found.to_dict(), folder / "search.png")
    reporter.result(f"{found.verdict()} Use it: fastmnist train --config {folder / 'tuned.yaml'}")
    _write_json(options.json, found.to_dict() | {"folder": str(folder)})
    return 0


def _describe_speedrun() -> Parser:
    parser = _parser("Repeat a run with many seeds: accuracy and training seconds, with their spread and a picture.")
    parser.add_argument("--seeds", type=int, default=20, help="Runs, from --seed on.")
    parser.add_argument(
        "--shifted", action="store_true", help="Also average each test image over its shifts by one pixel."
    )
    _add_run_flags(parser)
    return parser


def _speedrun(options: Any, arguments: Sequence[str]) -> int:
    from fastmnist.report.progress import Reporter
    from fastmnist.report.speedrun import plot_speedrun
    from fastmnist.speedrun import speedrun

    reporter = Reporter(options.quiet)
    config, preset = _config_of(options, arguments)
    with _new_folder(config.out, "speedrun") as folder:
        with reporter.working() as progress:
            found = speedrun(
                replace(config, out=None),
                options.seeds,
                preset=preset,
                command=f"fastmnist {shlex.join(arguments)}",
                shifted=options.shifted,
                reporter=reporter,
                progress=progress,
            )
        _write_json(str(folder / "speedrun.json"), found.to_dict())
        plot_speedrun(found.to_dict(), [folder / "speedrun.png", folder / "speedrun.svg"])
    reporter.result(f"{found.verdict()}. {folder} has the picture and every seed.")
    _write_json(options.json, found.to_dict() | {"folder": str(folder)})
    return INTERRUPTED if found.interrupted else 0


@contextmanager
def _new_folder(out: str | None, what: str) -> Iterator[Path]:
    """A new folder, which is gone again when nothing came of it."""
    from fastmnist.runfolder import RunFolder

    folder = RunFolder.create(out, what)
    try:
        yield folder.path
    except BaseException:
        folder.discard()
        raise


COMMANDS: dict[str, tuple[Callable[[], Parser], Callable[[Any, Sequence[str]], int]]] = {
    "compile": (_describe_compile, _compile),
    "verify": (_describe_verify, _verify),
    "train": (_describe_train, _train),
    "evaluate": (_describe_evaluate, _evaluate),
    "predict": (_describe_predict, _predict),
    "bench": (_describe_bench, _bench),
    "doctor": (_describe_doctor, _doctor),
    "tune": (_describe_tune, _tune),
    "speedrun": (_describe_speedrun, _speedrun),
}


def _write_json(path: str | None, content: Any) -> None:
    if path is not None:
        from fastmnist.files import write_bytes

        write_bytes(Path(path), (json.dumps(content, indent=2) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 2 for wrong usage, 130 after Ctrl-C, 1 for any other failure."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    try:
        parsed = build_parser().parse_args(arguments)
        options = getattr(parsed, parsed.subcommand)
        options.subcommand = parsed.subcommand
        return COMMANDS[parsed.subcommand][1](options, arguments)
    except KeyboardInterrupt:
        print("fastmnist: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on: no second error at exit
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        usual = isinstance(error, FastmnistError)
        text = str(error) if usual else f"unexpected {type(error).__name__}: {error} (--debug shows where)"
        print(f"fastmnist: {' '.join(text.split())}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
