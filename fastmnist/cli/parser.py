"""Shared parts of the commands: their parser, the flags of a run, and the output folder."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, Optional

import jsonargparse
import yaml

from fastmnist.config import FOLDERS, GROUPS, RETIRED, TrainConfig, flag, without_retired
from fastmnist.errors import ConfigError

LONGEST_ERROR = 400  # characters: jsonargparse quotes a broken configuration file whole
INTERRUPTED = 130  # exit status: 128 + SIGINT, as in shells

# ruff: noqa: UP045  # jsonargparse reads these types on Python 3.10 too


class Parser(jsonargparse.ArgumentParser):
    """ArgumentParser with hyphens in flags, --x and --no-x for bool, and ConfigError for wrong usage."""

    def add_argument(self, *names: Any, **options: Any) -> Any:
        if options.get("type") is bool:
            del options["type"]
            options["action"] = jsonargparse.ActionYesNo(no_prefix="no-")
        hyphened = [name.replace("_", "-") if isinstance(name, str) else name for name in names]
        return super().add_argument(*hyphened, **options)

    def parse_string(self, content: str, *args: Any, **options: Any) -> Any:
        """The settings in a configuration file. Retired ones are ignored, each with a line on stderr."""
        with suppress(yaml.YAMLError):  # refused below
            settings = yaml.safe_load(content)
            if isinstance(settings, dict) and not RETIRED.keys().isdisjoint(settings):
                for name in sorted(RETIRED.keys() & settings):
                    print(f"{name} is ignored: {RETIRED[name]}", file=sys.stderr)
                content = yaml.safe_dump(without_retired(settings), sort_keys=False)
        return super().parse_string(content, *args, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = re.sub(r'^Parser key "(\w+)":', lambda key: f"{flag(key[1])}:", message)
        text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("typing.", "")
        raise ConfigError(textwrap.shorten(text, LONGEST_ERROR, placeholder=" ..."))


def new_parser(description: str, *, writes_json: bool = True) -> Parser:
    parser = Parser(description=description, allow_abbrev=False, print_config="--print-config")
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    if writes_json:
        parser.add_argument("--json", type=Optional[str], metavar="FILE", help="Also write the result to FILE as JSON.")
    return parser


def add_data_flags(parser: Parser, dataset: bool) -> None:
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


def add_run_flags(parser: Parser, loader: str | None = None) -> None:
    """Adds the settings of a run. loader: the help text of --loader where it may also be "all"."""
    parser.add_argument(
        "--preset",
        type=str,
        default="auto",
        help="Settings that the flags below override: fast99, fast995 or accurate for a GPU, cpu, or none; for MNIST "
        "auto is fast995 on a GPU and cpu elsewhere, for other data none.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below.")
    for group in GROUPS:
        parser.add_class_arguments(group, skip={"loader"} if loader else set())
    if loader:
        parser.add_argument("--loader", type=str, default="ours", help=loader)


def given_settings(options: Any) -> dict[str, Any]:
    """The settings of a run that flags or a file set, without defaults."""
    return {name: value for name, value in options.given.items() if name in TrainConfig.__dataclass_fields__}


def without_folders(arguments: Sequence[str]) -> list[str]:
    """The command line for readers of a result: without folders of this machine and without --json.

    >>> without_folders(["speedrun", "--out", "here", "--seeds", "5", "--data-dir=there"])
    ['speedrun', '--seeds', '5']
    """
    names = {*(flag(name) for name in FOLDERS), "--json"}
    kept: list[str] = []
    skip = False
    for word in arguments:
        if skip:
            skip = False
        elif word in names:
            skip = True
        elif word.partition("=")[0] not in names:
            kept.append(word)
    return kept


def configure(options: Any) -> tuple[TrainConfig, str]:
    """The configuration of a run, and the name of the preset that it starts from."""
    from fastmnist.presets import choose_preset, preset_config
    from fastmnist.system.machine import choose_device

    name = choose_preset(options.preset, options.dataset, lambda: choose_device(options.device).type == "cuda")
    return preset_config(name, **given_settings(options)), name


@contextmanager
def new_folder(out: str | None, what: str) -> Iterator[Path]:
    """A new folder for results; it is removed if the block raises."""
    from fastmnist.training.run_folder import RunFolder

    folder = RunFolder.create(out, what)
    try:
        yield folder.path
    except BaseException:
        folder.discard()
        raise
    finally:
        folder.release()
