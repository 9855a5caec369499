"""Shared parts of the commands: their parser, the flags of a run, and the output folder."""

from __future__ import annotations

import difflib
import re
import sys
import textwrap
from argparse import SUPPRESS, Action
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, Optional

import jsonargparse
import yaml

from fastmnist.config import DEFAULTS, FOLDERS, GROUPS, MODELS, RETIRED, TrainConfig, flag, in_words, without_retired
from fastmnist.errors import ConfigError
from fastmnist.presets import PRESETS

LONGEST_ERROR = 400  # characters: jsonargparse quotes a broken configuration file whole
INTERRUPTED = 130  # exit status: 128 + SIGINT, as in shells

COMMON_NAMES = {
    "arch": "--model",
    "batch": "--batch-size",
    "bf16": "--amp bf16",
    "bs": "--batch-size",
    "checkpoint": "--resume",
    "cpu": "--device cpu",
    "cuda": "--device cuda",
    "data": "--data-dir",
    "data_path": "--data-dir",
    "epoch": "--epochs",
    "fp16": "--amp fp16",
    "gpu": "--device cuda",
    "log_interval": "--log-every",
    "lr": "--learning-rate",
    "max_epochs": "--epochs",
    "n_epochs": "--epochs",
    "num_epochs": "--epochs",
    "num_workers": "--workers",
    "opt": "--optimizer",
    "output_dir": "--out",
    "precision": "--amp",
    "root": "--data-dir",
    "save_dir": "--out",
    "train_batch_size": "--batch-size",
    "wd": "--weight-decay",
}
"""Flags of other training programs, without hyphens, and ours."""

# ruff: noqa: UP045  # jsonargparse reads these types on Python 3.10 too


def suggestion(given: str, flags: Iterable[str]) -> str:
    """The flag, with its value where that is clear, which `given` most likely means; "" if none is near.

    >>> suggestion("--lr=0.1", ["--learning-rate", "--seed"]), suggestion("--sead", ["--learning-rate", "--seed"])
    ('--learning-rate', '--seed')
    """
    known = {name.lstrip("-").replace("-", "_"): name for name in flags}
    name = given.lstrip("-").partition("=")[0].replace("-", "_").lower()
    common = COMMON_NAMES.get(name, "")
    if common.split(" ")[0] in known.values():
        return common
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return known[near[0]] if near else ""


class HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Help with types in plain words, where a word says more than the flag itself, and no default that is None."""

    def _get_help_string(self, action: Action) -> str:
        kind, text = getattr(action, "_typehint", None) or action.type, action.help or ""
        if action.dest == "model":
            text = text.replace("{models}", ", ".join(MODELS))
        if isinstance(action, jsonargparse.ActionYesNo):
            facts = [] if action.default is None else [f"default: {'yes' if action.default else 'no'}"]
        elif kind is None:
            return str(super()._get_help_string(action)) if action.default not in (None, False) else text
        else:
            words = in_words(kind)
            facts = [] if words.startswith(("text", "one of", "true")) else [words]
            if action.option_strings and action.default not in (None, SUPPRESS, []):
                facts.append("default: %(default)s")
        return f"{text} ({', '.join(facts)})" if facts else text

    def _metavar_formatter(self, action: Action, default_metavar: str) -> Any:
        shown = super()._metavar_formatter(action, default_metavar)
        return lambda size: tuple(text and text.replace(",null}", "}") for text in shown(size))


class Parser(jsonargparse.ArgumentParser):
    """ArgumentParser with hyphens in flags, --x and --no-x for bool, and ConfigError for wrong usage."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": HelpFormatter} | options)

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
        wrong_value = re.match(r'Parser key "(\w+)":.*(?:Got|Given) value: (.*)$', message, re.S)
        kinds = {action.dest: getattr(action, "_typehint", None) or action.type for action in self._actions}
        if wrong_value and kinds.get(wrong_value[1]) is not None:
            message = f"{flag(wrong_value[1])} {wrong_value[2]} must be {in_words(kinds[wrong_value[1]])}"
        elif message.startswith("unrecognized arguments: "):
            flags = [name for action in self._actions for name in action.option_strings]
            meant = [suggestion(word, flags) for word in message.split()[2:] if word.startswith("--")]
            if any(meant):
                message += f"; did you mean {' and '.join(filter(None, meant))}?"
        elif unknown := re.match(r"Subcommand '(\w+)' does not accept option '(.*)'", message):
            meant = [suggestion(unknown[2], map(flag, DEFAULTS)).removeprefix("--").replace("-", "_")]
            message = f"{unknown[1]} has no setting {unknown[2]}" + (f"; did you mean {meant[0]}?" if meant[0] else "")
        raise ConfigError(textwrap.shorten(message, LONGEST_ERROR, placeholder=" ..."))


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
            help="mnist, fashion, kmnist, qmnist, emnist-<split>, cifar10, cifar100, svhn, digits, or folder:PATH for "
            "pictures in PATH/train/<class>/ and PATH/test/<class>/, or in PATH/<class>/.",
        )
    parser.add_argument(
        "--data-dir",
        type=Optional[str],
        help="Folder with the dataset's files; by default $FASTMNIST_DATA, then a download.",
    )


def add_image_size(parser: Parser) -> None:
    parser.add_argument("--image-size", type=Optional[str], metavar="N|HxW", help="Resize a folder's pictures to it.")


def add_run_flags(parser: Parser, loader: str | None = None) -> None:
    """Adds the settings of a run. loader: the help text of --loader where it may also be "all"."""
    parser.add_argument(
        "--preset",
        type=str,
        default="auto",
        help=f"Settings that the flags below override: {', '.join(PRESETS)} (fastmnist/presets.py describes each), or "
        "none; for MNIST auto is fast995 on a GPU and cpu elsewhere, for other data none.",
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
