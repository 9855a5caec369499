"""What the benchmarks share: the images, how a round is measured, and the rows that come of it.

    pytest benchmarks [--data-dir FOLDER] [--rows benchmarks/results/suite.json]

With --rows each benchmark becomes a row as `fastmnist bench` writes it: every value, n, median, 95 % interval,
settings, hardware, versions, date and commit. What failed or is missing here is a row too, with its reason as "error".
benchmarks/compare.py compares two such files. pytest-benchmark's own options (--benchmark-json, --benchmark-compare)
work as ever; where a benchmark measures in another process, or step by step in turn with something else, its clock is
told what was measured there. Only ratios of one round mean something on a machine that others use too: "of_limit" is
what a round is of the least that it could take, which is measured right before it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
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


class Data:
    """The training images that all are measured with; note: why it is these."""

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
        """images -> seconds of a plain copy of as many, as `dtype`: the memory's limit for who hands them out."""
        dense = self.images.to(dtype)
        target = torch.empty_like(dense)

        def copy(images: int) -> Seconds:
            passes = max(1, round(images / self.count))
            begun = time.perf_counter()
            for _ in range(passes):
                target.copy_(dense)
            return (time.perf_counter() - begun) * images / (passes * self.count)

        return copy


class Turn(NamedTuple):
    """What was measured elsewhere: seconds, and those of the limit in the same turn."""

    seconds: Seconds
    limit: Seconds | None = None


@dataclass
class Told:
    """A clock that stands still but for what it is told."""

    now: Seconds = 0.0

    def __call__(self) -> Seconds:
        return self.now


@dataclass
class Session:
    """What `pytest_terminal_summary` and --rows tell."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    origin: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    note: str = ""


TOLD, SESSION = Told(), Session()


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
    # What it has to say itself, of nothing to compare with for example, is no error.
    filterwarnings("default", module="pytest_benchmark")
    config.addinivalue_line("markers", "last: changes this process for what comes after it")
    file = config.getoption("--rows")
    if file is not None and not file.absolute().parent.is_dir():  # not after all has been measured
        raise pytest.UsageError(f"--rows {file}: there is no folder {file.absolute().parent}; make it first")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("benchmark")
        if marker is not None and "measure_told" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(**marker.kwargs, timer=TOLD), append=False)
        # That a benchmark failed is said once, by its own error.
        item.add_marker(pytest.mark.filterwarnings("ignore:Benchmark fixture was not used at all"))
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device here")
    if item.get_closest_marker("ffcv") and "ffcv" not in versions():
        pytest.skip(f"the package ffcv is not installed; {HOW_TO_GET_FFCV}")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where batches go and models are: the GPU if there is one."""
    return choose_device("auto")


@pytest.fixture(scope="session")
def data(request: pytest.FixtureRequest, device: torch.device) -> Data:
    """MNIST's training images, or 60,000 deformed copies of the embedded digits where MNIST cannot be had."""
    try:
        found = Data(*bench_file(None, request.config.getoption("--data-dir")))
    except FastmnistError as error:
        pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
    SESSION.origin = origin(device) | {"device": str(device)}
    SESSION.about = {"data": found.path.name, "shape": list(found.file.image_shape)}
    SESSION.note = f"measured with {found.path}. {found.note}".strip()
    return found


@pytest.fixture
def measure(benchmark: Any, data: Data) -> Callable[..., None]:
    """(target, images, settings, limit, setup, rounds, warm_up, more) -> None: measures `target`, round by round.

    images: that one round handles. limit: images -> seconds of the least that they could take, right before the round.
    setup: called before each round, not timed. more: goes into the row.
    """

    def run(
        target: Callable[[], Any],
        *,
        images: int | None = None,
        limit: Callable[[int], Seconds] | None = None,
        setup: Callable[[], Any] = lambda: None,
        rounds: int = ROUNDS,
        warm_up: int = 1,
        **more: Any,
    ) -> None:
        limits: list[Seconds] = []

        def before() -> None:
            setup()
            if limit is not None and images is not None:
                limits.append(limit(images))

        benchmark.pedantic(target, setup=before, rounds=rounds, warmup_rounds=warm_up)
        _note(benchmark, limits, images=images, **more)

    return run


@pytest.fixture
def measure_told(benchmark: Any, data: Data) -> Callable[..., list[Turn]]:
    """(target, images, rounds, warm_up, more) -> turns: the same for what says itself how long it took, a `Turn`.

    Returned are those that count.
    """

    def run(
        target: Callable[[], Turn],
        *,
        images: int | None = None,
        rounds: int = ROUNDS,
        warm_up: int = 1,
        **more: Any,
    ) -> list[Turn]:
        turns: list[Turn] = []

        def turn() -> None:
            turns.append(target())
            TOLD.now += turns[-1].seconds

        benchmark.pedantic(turn, rounds=rounds, warmup_rounds=warm_up)
        counted = turns[-rounds:]
        _note(benchmark, [turn.limit for turn in counted if turn.limit is not None], images=images, **more)
        return counted

    return run


@pytest.fixture(scope="session")
def turn() -> type[Turn]:
    return Turn


def _note(benchmark: Any, limits: list[Seconds], **more: Any) -> None:
    benchmark.extra_info.update({name: value for name, value in more.items() if value is not None})
    if limits and benchmark.stats is not None:  # there are none with --benchmark-disable
        seconds = benchmark.stats.stats.data
        benchmark.extra_info["of_limit"] = ratios(limits[-len(seconds) :], seconds).to_dict()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = (yield).get_result()
    marker = item.get_closest_marker("benchmark")
    if marker is None or report.when == "teardown" or (report.passed and report.when != "call"):
        return
    group, name = marker.kwargs["group"], _name(item)
    if call.excinfo is not None:
        reason = " ".join(str(call.excinfo.value).split()) or call.excinfo.typename
        SESSION.rows.append({"group": group, "name": name, "error": reason, "skipped": report.skipped})
    elif (stats := item.funcargs["benchmark"].stats) is not None:  # type: ignore[attr-defined]
        more = dict(stats.extra_info)
        images, values, unit = more.get("images"), stats.stats.data, "seconds"
        if images is not None:
            values, unit = [images / seconds for seconds in values], "images/s"
        more = {"kind": _kind(name)} | SESSION.about | more
        SESSION.rows.append(row(group, name, values, unit, SESSION.origin, more.pop("settings", None), **more))


def _name(item: Any) -> str:
    """A benchmark is called like its parameter; one without, like its function."""
    return item.callspec.id if hasattr(item, "callspec") else item.name.removeprefix("test_").replace("_", " ")


def _kind(name: str) -> str:
    return "ours" if name.startswith("fastmnist") else "baseline"


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--rows")
    if file is not None and SESSION.rows:
        rows = [{key: value for key, value in found.items() if key != "skipped"} for found in SESSION.rows]
        rows = [found if "error" not in found else found | SESSION.about | SESSION.origin for found in rows]
        write_bytes(file, (json.dumps({"rows": rows}, indent=2) + "\n").encode())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if SESSION.note:
        terminalreporter.write_line(SESSION.note)
    for found in SESSION.rows:
        if "error" in found:
            word = "MISSING" if found["skipped"] else "FAILED"
            terminalreporter.write_line(f"{word} {found['group']}: {found['name']}: {found['error']}")
    file = config.getoption("--rows")
    if file is not None and SESSION.rows:
        terminalreporter.write_line(f"{len(SESSION.rows)} rows written to {file}")
