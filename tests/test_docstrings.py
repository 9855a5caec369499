"""The examples in docstrings, in every module that has some."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import fastmnist

PACKAGE = Path(fastmnist.__file__).parent
MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if " >>> " in path.read_text()
]


@pytest.mark.parametrize("module", MODULES)
def test_examples_give_what_they_show(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write a file
    outcome = doctest.testmod(import_module(module))
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_the_public_settings_have_examples() -> None:
    assert {"fastmnist.config", "fastmnist.presets"} <= set(MODULES)
