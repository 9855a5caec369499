"""The command line: parse, call, print. Nothing heavy is imported before a subcommand runs."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from typing import Any

import jsonargparse

import fastmnist
from fastmnist.cli import measure_commands as measure
from fastmnist.cli import run_commands as runs
from fastmnist.cli.parser import INTERRUPTED, Parser
from fastmnist.errors import ConfigError, FastmnistError

STARTED = time.perf_counter()


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


COMMANDS: dict[str, tuple[Callable[[], Parser], Callable[[Any], int]]] = {
    "compile": (runs.describe_compile, runs.compile_command),
    "verify": (runs.describe_verify, runs.verify_command),
    "train": (runs.describe_train, runs.train_command),
    "evaluate": (runs.describe_evaluate, runs.evaluate_command),
    "predict": (runs.describe_predict, runs.predict_command),
    "demo": (runs.describe_demo, runs.demo_command),
    "export": (runs.describe_export, runs.export_command),
    "bench": (measure.describe_bench, measure.bench_command),
    "doctor": (measure.describe_doctor, measure.doctor_command),
    "tune": (measure.describe_tune, measure.tune_command),
    "speedrun": (measure.describe_speedrun, measure.speedrun_command),
    "ladder": (measure.describe_ladder, measure.ladder_command),
}


def _given(arguments: Sequence[str], subcommand: str) -> dict[str, Any]:
    """What flags and a configuration file say, without defaults."""
    with redirect_stderr(StringIO()):  # what there is to say of a file was said when it was parsed first
        return vars(getattr(build_parser().parse_args(arguments, defaults=False), subcommand))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 2 for wrong usage, 130 after Ctrl-C, 1 for any other failure."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    try:
        parsed = build_parser().parse_args(arguments)
        options = getattr(parsed, parsed.subcommand)
        options.given = partial(_given, arguments, parsed.subcommand)
        options.arguments, options.started = arguments, STARTED
        return COMMANDS[parsed.subcommand][1](options)
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
