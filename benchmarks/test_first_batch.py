"""Seconds from making a loader to its first batch, in a new process each round, after its imports.

With numba's cached machine code, as when a program runs for the second time, and without. FFCV compiles anew each time.
"""

from __future__ import annotations

import pytest

from fastmnist.measure.bench import OPEN_TIMEOUT, START_TIMEOUT
from fastmnist.measure.contenders import BY_NAME, OURS, PLAIN
from fastmnist.measure.worker import WorkerError, WorkerProcess

BATCH_SIZE, ROUNDS = 512, 6
TOGETHER = 2  # processes that import at the same time, while nothing is measured
NAMES = (OURS, PLAIN, "DataLoader, tuned", "FFCV")


class Ready:
    """New processes that have imported what a contender needs; some are begun together."""

    def __init__(self, name: str, environment) -> None:
        self.name, self.environment = name, environment
        self.waiting: list[WorkerProcess] = []

    def take(self) -> WorkerProcess:
        if not self.waiting:
            self.waiting = [WorkerProcess(self.name, self.environment()) for _ in range(TOGETHER)]
            for process in self.waiting:
                process.send("imports", contender=self.name)
            for process in self.waiting:
                process.receive(START_TIMEOUT)
        return self.waiting.pop()

    def close(self) -> None:
        for process in self.waiting:
            process.close()


@pytest.fixture
def ready():
    """(name, environment) -> Ready, which is closed at the end."""
    made: list[Ready] = []

    def make(*arguments) -> Ready:
        made.append(Ready(*arguments))
        return made[-1]

    yield make
    for found in made:
        found.close()


@pytest.mark.benchmark(group="first batch")
@pytest.mark.parametrize(
    ("name", "cache"),
    [
        pytest.param(
            name,
            cache,
            id=name if cache == "warm" else f"{name}, cold",
            marks=[pytest.mark.ffcv] if BY_NAME[name].loader == "ffcv" else [],
        )
        for name in NAMES
        for cache in ("warm", "cold")
    ],
)
def test_first_batch(name, cache, data, device, ready, measure_turns, tmp_path_factory):
    contender = BY_NAME[name]

    def environment() -> dict[str, str]:
        return {"NUMBA_CACHE_DIR": str(tmp_path_factory.mktemp("numba"))} if cache == "cold" else {}

    processes = ready(name, environment)

    def first_batch():
        with processes.take() as process:
            answer = process.request(
                "open", OPEN_TIMEOUT, data=str(data.path), batch_size=BATCH_SIZE, device=str(device), folder=""
            )
        return answer["first_batch"], None

    try:
        measure_turns(
            first_batch,
            rounds=ROUNDS,
            warm_up=1 if cache == "warm" else 0,  # fills the cache
            settings={"batch_size": BATCH_SIZE, **contender.settings, "jit_cache": cache},
            kind=contender.kind,
        )
    except WorkerError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None
