"""Tables on a terminal of 80 columns: no line is longer, and no word is broken or cut."""

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fastmnist.report.ladder_chart import ladder_table
from fastmnist.report.tables import evaluation_tables, rich_table, search_table

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def candidate(**more):
    reason = "another process used the machine for too long in this turn, as its interval shows"
    return {"n": 7, "memory_bytes": 1 << 30, "status": "measured", "reason": reason, "chosen": False, **more}


SEARCH = {
    "unit": "images/s",
    "candidates": [
        candidate(name="threads=2 prefetch=3 placement=stream", median=1.4e6, low=1.2e6, high=1.6e6, chosen=True),
        candidate(name="tuned num_workers=2 prefetch_factor=4 persistent_workers=True pin_memory=False"),
    ],
}


@pytest.mark.parametrize(
    "table",
    [
        rich_table(result("bench")["rows"]),
        ladder_table(result("ladder")["rows"]),
        search_table(SEARCH),
        *evaluation_tables(np.full((10, 10), 987), CLOTHES),
    ],
    ids=["bench", "ladder", "search", "classes", "confusion"],
)
def test_words_stay_whole_in_80_columns(table):
    console = Console(width=80, file=StringIO())
    console.print(table)
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    there = shown.split()
    for column in table.columns:
        for text in (column.header, *column.cells):
            assert set(text.split()) <= set(there), text
