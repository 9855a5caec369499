"""The command line: parse, call, print. Nothing heavy is imported before a subcommand runs."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jsonargparse

import fastmnist
from fastmnist.cli import measure_commands as measure
from fastmnist.cli import run_commands as runs
from fastmnist.cli.parser import INTERRUPTED, Parser
from fastmnist.errors import ConfigError, FastmnistError

STARTED = time.perf_counter()


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


def parse(arguments: Sequence[str]) -> Any:
    """A command's options: its flags, its name as `command`, and as `given` what a flag or a file sets, by name.

    Raises:
        ConfigError: wrong usage. SystemExit: --help and --version end the process.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog="fastmnist", description=fastmnist.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fastmnist {fastmnist.__version__}")
    subcommands = parser.add_subcommands()
    commands = {name: describe() for name, (describe, _) in COMMANDS.items()}
    for name, command in commands.items():
        subcommands.add_subcommand(name, command, help=f"{str(command.description).split(':')[0]}.")
    parsed = parser.parse_args(arguments, defaults=False)
    given = parsed[parsed.subcommand]
    options = commands[parsed.subcommand].get_defaults()
    options.update(given)
    options.command, options.given = parsed.subcommand, vars(given)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 2 for wrong usage, 130 after Ctrl-C, 1 for any other failure."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    try:
        options = parse(arguments)
        options.arguments, options.started = arguments, STARTED
        return COMMANDS[options.command][1](options)
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
