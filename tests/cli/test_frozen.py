"""The command line is a contract: a change of a flag, a default or an exit status breaks somebody's script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fastmnist.cli.main import COMMANDS, main, parse

FROZEN: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("command_line.yaml").read_text())
del FROZEN["settings of a run"]  # which the commands include
NEEDED = {"verify": ["FILE"], "evaluate": ["RUN"], "predict": ["RUN", "IMAGE"], "export": ["RUN"]}
OF_THE_LIBRARY = {"--help", "--print-config", "--print-shtab"}


def options(command: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """From each option in the command's help, with its choices, to its default; groups as they are shown."""
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    defaults = parse([command, *NEEDED.get(command, [])])
    found = {}
    for number, line in enumerate(lines):
        if not line.startswith("  -"):
            continue
        names, _, text = line.strip().partition("  ")
        words = [word.rstrip(",") for word in names.split() if word.startswith(("--", "{"))]
        if OF_THE_LIBRARY.isdisjoint(words):
            found[" ".join(words)] = getattr(defaults, words[0].lstrip("-").replace("-", "_"))
            assert text or lines[number + 1].startswith(" " * 20), f"{line} has no help text"
    return found


def test_the_commands_are_these(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith(" " * 4)]
    assert [word for word in shown if word in FROZEN] == list(FROZEN)
    assert list(COMMANDS) == list(FROZEN)


@pytest.mark.parametrize("command", FROZEN)
def test_flags_and_defaults_are_these(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert options(command, capsys) == FROZEN[command]


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], *([command, *NEEDED.get(command, []), "--nonsense"] for command in FROZEN)]
    + [[command, *needed[:count]] for command, needed in NEEDED.items() for count in range(len(needed))],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("command", [name for name in FROZEN if name not in ("verify", "predict")])
def test_data_that_is_not_there_is_status_1(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = [str(tmp_path / "run")] if command in ("evaluate", "export", "demo") else []
    assert main([command, *run, "--data-dir", str(tmp_path / "nowhere")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.rglob("*.json"))
