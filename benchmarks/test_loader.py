"""Every way to load that `fastmnist bench` compares, each in a process of its own, against a plain copy in another.

What a side hands out in a quarter of a second, after a warm-up in every round, is counted for an epoch of all images;
where beginning an epoch costs (worker processes), a round is one epoch.
"""

from __future__ import annotations

import pytest

from fastmnist.baselines.peers import PEERS, missing
from fastmnist.measure.bench import OPEN_TIMEOUT, START_TIMEOUT, TURN_TIMEOUT, WRITE_TIMEOUT
from fastmnist.measure.client import SideError, SideProcess
from fastmnist.measure.contenders import SIDES

BATCH_SIZE = 512
WARM_UP, SECONDS, LIMIT_SECONDS = 0.1, 0.25, 0.1
ROUNDS, ROUNDS_OF_EPOCHS = 7, 6


def marks(side):
    return [pytest.mark.ffcv] if side.loader == "ffcv" else []


@pytest.fixture(scope="module")
def opened(data, device):
    """(side, process, folder) -> the answer to "open", with the side ready to be asked for turns."""

    def open_side(side, process, folder):
        process.ask("imports", START_TIMEOUT, side=side.name)
        where = {"data": str(data.path), "folder": str(folder)}
        if side.kind == "peer":
            process.ask("write", WRITE_TIMEOUT, **where)
        return process.ask("open", OPEN_TIMEOUT, **where, batch_size=BATCH_SIZE, device=str(device))

    return open_side


@pytest.fixture(scope="module")
def limits(opened, tmp_path_factory):
    """The processes that copy, by their sides' names."""
    found = {side.name: SideProcess(side.name) for side in SIDES if side.kind == "limit"}
    for side in SIDES:
        if side.name in found:
            opened(side, found[side.name], tmp_path_factory.mktemp("unused"))
            found[side.name].pause()
    yield found
    for process in found.values():
        process.close()


@pytest.mark.benchmark(group="loader")
@pytest.mark.parametrize("side", [pytest.param(side, id=side.name, marks=marks(side)) for side in SIDES])
def test_images_per_second(side, data, limits, opened, measure_told, turn, tmp_path):
    if side.kind == "peer" and (lacking := missing(PEERS[side.loader])):
        pytest.skip(lacking)

    def of_an_epoch(process, seconds: float) -> float:
        process.go_on()
        found = process.ask("turn", TURN_TIMEOUT, warm_up=WARM_UP, seconds=seconds)
        process.pause()  # workers load ahead, and threads that wait for work may spin
        return found["seconds"] * data.count / found["images"]

    try:
        with SideProcess(side.name) as process:
            answer = opened(side, process, tmp_path)
            process.pause()
            limit = None if side.kind == "limit" else limits[side.limit]
            measure_told(
                lambda: turn(
                    limit=None if limit is None else of_an_epoch(limit, LIMIT_SECONDS),
                    seconds=of_an_epoch(process, SECONDS),
                ),
                images=data.count,
                rounds=ROUNDS_OF_EPOCHS if side.whole_epochs else ROUNDS,
                warm_up=0,  # opening it took an epoch already, and a turn warms up by itself
                settings={"batch_size": BATCH_SIZE, **side.settings},
                kind=side.kind,
                output=[answer["shape"], answer["dtype"]],
            )
    except SideError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None
