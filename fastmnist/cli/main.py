"""Command line: its commands, one parse of the arguments, and the exit status.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jsonargparse

import fastmnist
from fastmnist.cli import measure_commands as measure
from fastmnist.cli import run_commands as runs
from fastmnist.cli.parser import INTERRUPTED, Parser
from fastmnist.errors import ConfigError, FastmnistError, ReportedError

STARTED = time.perf_counter()

COMMANDS: dict[str, tuple[Callable[[], Parser], Callable[[Any], int]]] = {
    "compile": (runs.compile_parser, runs.compile_command),
    "verify": (runs.verify_parser, runs.verify_command),
    "train": (runs.train_parser, runs.train_command),
    "evaluate": (runs.evaluate_parser, runs.evaluate_command),
    "predict": (runs.predict_parser, runs.predict_command),
    "demo": (runs.demo_parser, runs.demo_command),
    "export": (runs.export_parser, runs.export_command),
    "bench": (measure.bench_parser, measure.bench_command),
    "doctor": (measure.doctor_parser, measure.doctor_command),
    "tune": (measure.tune_parser, measure.tune_command),
    "speedrun": (measure.speedrun_parser, measure.speedrun_command),
    "ladder": (measure.ladder_parser, measure.ladder_command),
}


OF_SEVERAL_PROCESSES = ("train", "speedrun", "evaluate", "doctor")


def parse(arguments: Sequence[str]) -> Any:
    """The options of a command: its flags; `command`, its name; `given`, the values from flags and file, by name.

    Raises:
        ConfigError: wrong usage.
        SystemExit: --help, --version or --print-config has printed.
    """
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog="fastmnist", description=fastmnist.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fastmnist {fastmnist.__version__}")
    subcommands = parser.add_subcommands()
    commands = {name: make_parser() for name, (make_parser, _) in COMMANDS.items()}
    for name, command in commands.items():
        summary = str(command.description).partition(":")[0].rstrip(".")
        subcommands.add_subcommand(name, command, help=f"{summary}.")
    parsed = parser.parse_args(arguments, defaults=False)
    given = parsed[parsed.subcommand]
    options = commands[parsed.subcommand].get_defaults()
    options.update(given)
    options.command, options.given = parsed.subcommand, vars(given)
    return options


def joined(options: Any) -> AbstractContextManager[None]:
    """The group of the processes that torchrun started for a command; nothing without torchrun.

    Raises:
        ConfigError: the command runs in a single process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and options.command not in OF_SEVERAL_PROCESSES:
        raise ConfigError(
            f"fastmnist {options.command} runs in one process, not in {os.environ['WORLD_SIZE']}: start it without "
            "torchrun"
        )
    if "WORLD_SIZE" not in os.environ or options.command not in OF_SEVERAL_PROCESSES:
        return nullcontext()
    from fastmnist.system.processes import TIMEOUT, process_group

    return process_group(options.device, getattr(options, "timeout", TIMEOUT))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 2 for wrong usage, 130 after Ctrl-C, 1 for any other failure."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    # Wrong usage is the same in all processes of a job: the first one reports it. Later errors are each one's own.
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        options = parse(arguments)
        options.arguments, options.started = arguments, STARTED
        with joined(options):
            speaks = True
            return COMMANDS[options.command][1](options)
    except ReportedError:
        return 1
    except KeyboardInterrupt:
        print("fastmnist: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or flushing at exit fails again
        return 1
    except Exception as error:
        if not speaks and isinstance(error, ConfigError):
            return 2
        if debug:
            traceback.print_exc()
        expected = isinstance(error, FastmnistError)
        text = str(error) if expected else f"unexpected {type(error).__name__}: {error} (--debug shows the traceback)"
        print(f"fastmnist: {' '.join(text.split())}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
