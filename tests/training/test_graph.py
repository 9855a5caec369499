"""A recorded step trains as a plain one: on a CPU with a stand-in that replays by running, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastmnist.config import TrainConfig
from fastmnist.loader.loader import Loader
from fastmnist.training.compiling import set_up_compile
from fastmnist.training.graph import Body, side_stream
from fastmnist.training.loop import Trainer
from fastmnist.training.precision import Precision

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [None, torch.bfloat16, torch.float16]
SIZE = 16  # images of a batch; 6 batches an epoch


def stand_in(body: Body, reset: Body) -> Body:
    """Runs the body to record it, and again at each replay."""
    for _ in range(3):
        reset()
        body()
    return body


def failing(body: Body, reset: Body) -> Body:
    stand_in(body, reset)
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory, write_small_beton: Callable[..., None]) -> Path:
    path = tmp_path_factory.mktemp("graph") / "a.beton"
    write_small_beton(path, 100)
    return path


class Begin:
    """Makes trainers that prepare `chunk` batches at a time, recorded or not."""

    def __init__(self, path: Path, device: str, chunk: int) -> None:
        self.path, self.device, self.chunk = path, device, chunk

    def __call__(
        self, recorded: bool, dtype: torch.dtype | None = None, dropout: float = 0.0, **settings: Any
    ) -> Trainer:
        config = TrainConfig(**({"epochs": 2.5, "batch_size": SIZE} | settings))
        torch.manual_seed(config.seed)
        loader = Loader(self.path, SIZE, seed=config.seed, device=self.device, drop_last=True)
        model: nn.Module = nn.Sequential(
            nn.Dropout(dropout),
            nn.Conv2d(1, 8, 3, stride=3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 9 * 9, 10),
        )
        model = model.to(device=self.device, memory_format=torch.channels_last)
        each = Trainer(model.train(), loader, config, Precision(dtype, "a test"))
        each.chunk = self.chunk
        if recorded:
            record(each)
        return each


def record(each: Trainer) -> None:
    if each.device.type == "cuda":
        with side_stream(each.device):
            each.record_graph()
    else:
        each.record_graph(stand_in)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=[1, 4, 100], ids="chunk {}".format)
def begin(beton: Path, device: str, request: pytest.FixtureRequest) -> Begin:
    return Begin(beton, device, request.param)


def state(of: Trainer) -> dict[str, torch.Tensor]:
    """All that a later step depends on."""
    found = {name: value.clone() for name, value in of.model.state_dict().items()}
    for number, value in enumerate(of.optimizer.tensors()):
        found[f"optimizer {number}"] = value.clone()
    if of.precision.scaled:
        found["scale"] = torch.tensor(of.optimizer.scaler.get_scale())
    return found


def check_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    for (name, x), y in zip(a.items(), b.values(), strict=True):
        assert torch.equal(x, y), name


def check_trained_alike(a: Trainer, b: Trainer) -> None:
    """Bit for bit on a CPU; on a GPU, where the order of additions is open, by the losses of the last epoch."""
    if a.device.type == "cpu":
        check_same(state(a), state(b))
        return
    assert a.step == b.step
    found, expected = a._losses.mean().item(), b._losses.mean().item()
    assert found == pytest.approx(expected, rel=0.02 if a.precision.amp is None else 0.1)


def finish(*trainers: Trainer) -> None:
    for each in trainers:
        while each.step < each.steps:
            assert each.run_epoch() is not None


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_weights_and_records(begin: Begin, dtype: torch.dtype | None, optimizer: str) -> None:
    recorded, plain = (begin(each, dtype, optimizer=optimizer) for each in (True, False))
    check_same(state(recorded), state(plain))
    tolerance = 1e-6 if dtype is None else 1e-2
    while plain.step < plain.steps:  # the last epoch is a part of one
        a, b = recorded.run_epoch(), plain.run_epoch()
        assert a is not None
        assert b is not None
        assert a["train_loss"] == pytest.approx(
            b["train_loss"], rel=tolerance if recorded.device.type == "cpu" else 0.1
        )
        assert (a["step"], a["epoch"], a["epochs"]) == (b["step"], b["epoch"], b["epochs"])
    check_trained_alike(recorded, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [1, 4, 6, 9])
def test_stopped_and_gone_on_with(begin: Begin, dtype: torch.dtype | None, at: int) -> None:
    """Within a prepared chunk; the recording is made before or after the state is loaded."""
    whole, stopped = begin(True, dtype), begin(True, dtype)
    finish(whole)
    while stopped.step < at:
        stopped.run_epoch(stop=lambda: stopped.step == at)
    assert stopped.step == at
    before, after = begin(True, dtype, seed=0), begin(False, dtype)
    for each in (before, after):
        each.load_state_dict(stopped.state_dict())
    record(after)
    assert before.seconds == after.seconds == stopped.seconds
    finish(before, after, stopped)
    for each in (before, after, stopped):
        check_trained_alike(each, whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_begun_again_with_the_same_recording(begin: Begin, dtype: torch.dtype | None) -> None:
    used, new = begin(True, dtype, seed=1), begin(False, dtype, seed=2)
    finish(used)
    fresh = begin(False, dtype, seed=2)
    used.begin_again(fresh.model, fresh.loader)
    check_same(state(used), state(new))
    finish(used, new)
    check_trained_alike(used, new)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_recording_leaves_no_trace_whether_it_works_or_not(
    begin: Begin, dtype: torch.dtype | None, optimizer: str
) -> None:
    untouched, tried = (begin(False, dtype, dropout=0.3, optimizer=optimizer) for _ in range(2))
    for each in (untouched, tried):  # not at the beginning, where momenta are zero
        torch.manual_seed(7)  # of dropout
        each.run_epoch(stop=lambda each=each: each.step == 2)
    before = state(tried)
    with pytest.raises(RuntimeError, match="is capturing"):
        tried.record_graph(failing)
    assert tried.graph is None
    record(tried)
    tried.graph = None  # as if it had not paid
    assert not any(parameter.grad is not None for parameter in tried.model.parameters())
    check_same(state(tried), before)
    going_on = torch.get_rng_state()
    finish(tried)
    torch.set_rng_state(going_on)
    finish(untouched)
    check_trained_alike(tried, untouched)


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_fp16_starts_where_no_step_is_lost(begin: Begin, mode: str) -> None:
    each = begin(False, torch.float16)
    set_up_compile(each, mode)
    finish(each)
    assert each.optimizer.scaler.get_scale() == 1024
    assert all(torch.isfinite(value).all() for value in state(each).values())
