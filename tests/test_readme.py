"""README's figures are those of the files that it names."""

import json
from pathlib import Path

import pytest

from fastmnist.report.table import markdown

ROOT = Path(__file__).parents[1]


def test_the_table_is_that_of_the_last_run() -> None:
    """Made by `fastmnist bench`; see benchmarks/results/README.md."""
    text = (ROOT / "README.md").read_text()
    shown = text.partition("<!-- bench -->\n")[2].partition("<!-- /bench -->")[0]
    assert shown == markdown(json.loads((ROOT / "benchmarks/results/bench.json").read_text())["rows"])


@pytest.mark.parametrize("name", ["bench.png", "bench.svg", "bench.md"])
def test_what_comes_with_it_is_there(name: str) -> None:
    assert (ROOT / "benchmarks" / "results" / name).stat().st_size > 100
