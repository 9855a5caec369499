"""Every way to load that `fastmnist bench` compares, each in a process of its own, against a plain copy in another.

A round is a quarter of a second after a warm-up, scaled to an epoch of all images. Where starting an epoch costs
(worker processes), it is one epoch.
"""

from __future__ import annotations

import pytest

from fastmnist.baselines.peers import PEERS, missing
from fastmnist.measure.bench import OPEN_TIMEOUT, START_TIMEOUT, TURN_TIMEOUT, WRITE_TIMEOUT
from fastmnist.measure.contenders import CONTENDERS
from fastmnist.measure.worker import WorkerError, WorkerProcess

BATCH_SIZE = 512
WARM_UP, SECONDS, LIMIT_SECONDS = 0.1, 0.25, 0.1
ROUNDS, ROUNDS_OF_EPOCHS = 7, 6


def marks(contender):
    return [pytest.mark.ffcv] if contender.loader == "ffcv" else []


@pytest.fixture(scope="module")
def opened(data, device):
    """(contender, process, folder) -> the answer to "open", with the contender ready to be asked for turns."""

    def open_contender(contender, process, folder):
        process.request("imports", START_TIMEOUT, contender=contender.name)
        where = {"data": str(data.path), "folder": str(folder)}
        if contender.kind == "peer":
            process.request("write", WRITE_TIMEOUT, **where)
        return process.request("open", OPEN_TIMEOUT, **where, batch_size=BATCH_SIZE, device=str(device))

    return open_contender


@pytest.fixture(scope="module")
def limits(opened, tmp_path_factory):
    """The processes that copy, by their contenders' names."""
    found = {contender.name: WorkerProcess(contender.name) for contender in CONTENDERS if contender.kind == "limit"}
    for contender in CONTENDERS:
        if contender.name in found:
            opened(contender, found[contender.name], tmp_path_factory.mktemp("unused"))
            found[contender.name].pause()
    yield found
    for process in found.values():
        process.close()


@pytest.mark.benchmark(group="loader")
@pytest.mark.parametrize(
    "contender", [pytest.param(contender, id=contender.name, marks=marks(contender)) for contender in CONTENDERS]
)
def test_images_per_second(contender, data, limits, opened, measure_turns, tmp_path):
    if contender.kind == "peer" and (lacking := missing(PEERS[contender.loader])):
        pytest.skip(lacking)

    def of_an_epoch(process, seconds: float) -> float:
        process.resume()
        found = process.request("turn", TURN_TIMEOUT, warm_up=WARM_UP, seconds=seconds)
        process.pause()  # workers load ahead, and threads that wait for work may spin
        return found["seconds"] * data.count / found["images"]

    try:
        with WorkerProcess(contender.name) as process:
            answer = opened(contender, process, tmp_path)
            process.pause()
            limit = None if contender.kind == "limit" else limits[contender.limit]

            def turn():
                least = None if limit is None else of_an_epoch(limit, LIMIT_SECONDS)
                return of_an_epoch(process, SECONDS), least

            measure_turns(
                turn,
                images=data.count,
                rounds=ROUNDS_OF_EPOCHS if contender.whole_epochs else ROUNDS,
                warm_up=0,  # opening it took an epoch already, and a turn warms up by itself
                settings={"batch_size": BATCH_SIZE, **contender.settings},
                kind=contender.kind,
                output=[answer["shape"], answer["dtype"]],
            )
    except WorkerError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None
