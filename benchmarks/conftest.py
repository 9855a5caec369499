"""Fixtures of the benchmarks: the images, the measurement of a round, and the rows of the result.

    pytest benchmarks [--data-dir FOLDER] [--rows benchmarks/results/suite.json]

With --rows each benchmark becomes a row as `fastmnist bench` writes it: every value, n, median, 95 % interval,
settings, hardware, versions, date and commit; one that failed or was skipped is a row with the reason as "error".
benchmarks/compare.py compares two such files. pytest-benchmark's own options (--benchmark-json, --benchmark-compare)
work too. Only ratios of one round mean something on a shared machine: "of_limit" is a round's ratio to the least that
it could take, measured right before it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from warnings import filterwarnings

import numpy as np
import pytest
import torch

from fastmnist.baselines.ffcv_loader import HOW_TO_GET_FFCV
from fastmnist.beton.reader import Beton
from fastmnist.errors import FastmnistError
from fastmnist.files import write_bytes
from fastmnist.measure.bench import bench_file
from fastmnist.prepare.prepare import beton_path
from fastmnist.system.environment import origin, versions
from fastmnist.system.machine import choose_device
from fastmnist.system.statistics import ratios, row

ROUNDS = 7  # at least 6: fewer values have no 95 % interval
Seconds = float
Turn = tuple[Seconds, Seconds | None]  # of a round, and of the limit in the same turn


class Data:
    """The training images of all benchmarks; note says why these."""

    def __init__(self, path: Path, note: str) -> None:
        self.path, self.note = path, note
        self.file = Beton(path)
        self.count, self.moments = len(self.file), self.file.moments

    @cached_property
    def images(self) -> torch.Tensor:
        """(N, H, W, C) uint8, in memory of its own."""
        return torch.from_numpy(self.file.images(np.arange(self.count)))

    @cached_property
    def labels(self) -> torch.Tensor:
        """(N,) int64."""
        return torch.from_numpy(self.file.labels.copy())

    @property
    def test_path(self) -> Path:
        assert self.file.integrity is not None
        return beton_path(self.file.integrity.dataset, "test", self.path.parent)

    def copying(self, dtype: torch.dtype) -> Callable[[int], Seconds]:
        """images -> seconds of a plain copy of as many, as `dtype`: the memory's limit."""
        dense = self.images.to(dtype)
        target = torch.empty_like(dense)

        def copy(images: int) -> Seconds:
            passes = max(1, round(images / self.count))
            begun = time.perf_counter()
            for _ in range(passes):
                target.copy_(dense)
            return (time.perf_counter() - begun) * images / (passes * self.count)

        return copy


@dataclass
class ManualClock:
    """A clock that only `now` moves: pytest-benchmark reads off it what was measured here or in another process."""

    now: Seconds = 0.0

    def __call__(self) -> Seconds:
        return self.now


@dataclass
class Result:
    """Rows for --rows and for the summary on the terminal, and the parts that all of them share."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    note: str = ""


CLOCK, RESULT = ManualClock(), Result()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastmnist")
    group.addoption("--rows", type=Path, metavar="FILE", help="write a row per benchmark to this JSON file")
    group.addoption(
        "--data-dir", metavar="FOLDER", help="images to measure with; by default $FASTMNIST_DATA, then the cache"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the benchmarks need pytest-benchmark: pip install '.[dev]'")
    # Its own warnings, of nothing to compare with for example, are no errors.
    filterwarnings("default", module="pytest_benchmark")
    config.addinivalue_line("markers", "last: changes this process for the benchmarks after it")
    file = config.getoption("--rows")
    if file is not None and not file.absolute().parent.is_dir():  # now, not after an hour of measuring
        raise pytest.UsageError(f"--rows {file}: there is no folder {file.absolute().parent}; make it first")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (marker := item.get_closest_marker("benchmark")) is not None:
            item.add_marker(pytest.mark.benchmark(**marker.kwargs, timer=CLOCK), append=False)
        # A benchmark that failed has an error of its own.
        item.add_marker(pytest.mark.filterwarnings("ignore:Benchmark fixture was not used at all"))
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device here")
    if item.get_closest_marker("ffcv") and "ffcv" not in versions():
        pytest.skip(f"the package ffcv is not installed; {HOW_TO_GET_FFCV}")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Of batches and models: the GPU if there is one."""
    return choose_device("auto")


@pytest.fixture(scope="session")
def data(request: pytest.FixtureRequest, device: torch.device) -> Data:
    """MNIST's training images, or 60,000 deformed copies of the embedded digits where MNIST cannot be had."""
    try:
        found = Data(*bench_file(None, request.config.getoption("--data-dir")))
    except FastmnistError as error:
        pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
    RESULT.origin = origin(device) | {"device": str(device)}
    RESULT.about = {"data": found.path.name, "shape": list(found.file.image_shape)}
    RESULT.note = f"measured with {found.path}. {found.note}".strip()
    return found


@pytest.fixture
def measure_turns(benchmark: Any, data: Data) -> Callable[..., list[Turn]]:
    """(target, images, rounds, warm_up, more) -> turns: `target` measures each round itself.

    It returns the round's seconds, and those of the limit or None. images: handled in a round. more: goes into the row.
    The turns of the warm-up are left out.
    """

    def run(
        target: Callable[[], Turn], *, images: int | None = None, rounds: int = ROUNDS, warm_up: int = 1, **more: Any
    ) -> list[Turn]:
        turns: list[Turn] = []

        def turn() -> None:
            turns.append(target())
            CLOCK.now += turns[-1][0]

        benchmark.pedantic(turn, rounds=rounds, warmup_rounds=warm_up)
        counted = turns[-rounds:]
        seconds, limits = zip(*counted, strict=True)
        if None not in limits:
            more["of_limit"] = ratios(limits, seconds).to_dict()
        more["images"] = images
        benchmark.extra_info.update({name: value for name, value in more.items() if value is not None})
        return counted

    return run


@pytest.fixture
def measure(measure_turns: Callable[..., list[Turn]]) -> Callable[..., None]:
    """(target, images, limit, setup, rounds, warm_up, more) -> None: times `target`, round by round.

    limit: images -> seconds of the least that they could take. setup: called first. Neither is part of the round.
    """

    def run(
        target: Callable[[], Any],
        *,
        images: int,
        limit: Callable[[int], Seconds],
        setup: Callable[[], Any] = lambda: None,
        **more: Any,
    ) -> None:
        def turn() -> Turn:
            setup()
            least = limit(images)
            begun = time.perf_counter()
            target()
            return time.perf_counter() - begun, least

        measure_turns(turn, images=images, **more)

    return run


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = (yield).get_result()
    marker = item.get_closest_marker("benchmark")
    if marker is None or report.when == "teardown" or (report.passed and report.when != "call"):
        return
    group = marker.kwargs["group"]
    name = item.callspec.id if hasattr(item, "callspec") else item.name
    if call.excinfo is not None:
        reason = " ".join(str(call.excinfo.value).split()) or call.excinfo.typename
        RESULT.rows.append({"group": group, "name": name, "error": reason})
    elif (stats := item.funcargs["benchmark"].stats) is not None:  # type: ignore[attr-defined]
        more = dict(stats.extra_info)
        images, values, unit = more.get("images"), stats.stats.data, "seconds"
        if images is not None:
            values, unit = [images / seconds for seconds in values], "images/s"
        more = {"kind": "ours" if name.startswith("fastmnist") else "baseline"} | RESULT.about | more
        RESULT.rows.append(row(group, name, values, unit, RESULT.origin, more.pop("settings", None), **more))


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--rows")
    if file is not None and RESULT.rows:
        rows = [found if "error" not in found else found | RESULT.about | RESULT.origin for found in RESULT.rows]
        lines = ",\n".join(f"  {json.dumps(found)}" for found in rows)
        write_bytes(file, f'{{"rows": [\n{lines}\n]}}\n'.encode())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if RESULT.note:
        terminalreporter.write_line(RESULT.note)
    for found in RESULT.rows:
        if "error" in found:
            terminalreporter.write_line(f"NOT MEASURED {found['group']}: {found['name']}: {found['error']}")
    file = config.getoption("--rows")
    if file is not None and RESULT.rows:
        terminalreporter.write_line(f"{len(RESULT.rows)} rows written to {file}")
