"""Checkpoints written beside training: when, of which state, and what happens when they cannot be written."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastmnist.errors import FastmnistError
from fastmnist.training import checkpoint
from fastmnist.training.checkpoint import SAVE_EVERY, Checkpoints, load_checkpoint


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def state(value: float = 1.0) -> dict:
    return {"model": {"weight": torch.full((3,), value)}, "step": 5}


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The thread writes only once this is set."""
    event, real = threading.Event(), checkpoint.save_checkpoint

    def save(*arguments, **options) -> None:
        assert event.wait(60)
        real(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    return event


def test_one_is_due_by_the_clock_and_once_the_last_is_written(tmp_path: Path, held: threading.Event) -> None:
    clock = Clock()
    with Checkpoints(tmp_path, {}, clock=clock) as checkpoints:
        assert not checkpoints.due()
        clock.now += SAVE_EVERY - 0.1
        assert not checkpoints.due()
        clock.now += 0.1
        assert checkpoints.due()
        checkpoints.begin(state())
        clock.now += 10 * SAVE_EVERY
        assert not checkpoints.due()  # one at a time
        held.set()
        checkpoints.wait()
        assert checkpoints.due()
    assert SAVE_EVERY <= 25  # of the 30 s that may be lost, some are for writing


def test_what_is_written_is_the_state_of_its_moment(tmp_path: Path, held: threading.Event) -> None:
    training = state(1.0)
    with Checkpoints(tmp_path, {"seed": 3}, clock=Clock()) as checkpoints:
        checkpoints.begin(training)
        training["model"]["weight"].fill_(2.0)  # the next step
        training["step"] = 6
        held.set()
    config, saved = load_checkpoint(tmp_path)
    assert config == {"seed": 3}
    assert saved["step"] == 5
    assert torch.equal(saved["model"]["weight"], torch.ones(3))


def due_at_last(checkpoints: Checkpoints) -> None:
    """`due` does not wait for the thread."""
    until = time.monotonic() + 60
    while time.monotonic() < until and not checkpoints.due():
        time.sleep(0.01)


@pytest.mark.parametrize(
    "ask",
    [due_at_last, Checkpoints.wait, lambda checkpoints: checkpoints.begin(state(3.0))],
    ids=["due", "wait", "begin"],
)
def test_an_error_of_the_thread_reaches_the_caller_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[[Checkpoints], None]
) -> None:
    """A full disk; the checkpoint from before stays."""
    with Checkpoints(tmp_path, {}, clock=Clock()) as checkpoints:
        checkpoints.begin(state(1.0))
        checkpoints.wait()

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("fastmnist.files.os.fsync", full)
        checkpoints.begin(state(2.0))
        with pytest.raises(FastmnistError, match=r"checkpoint\.pt.*No space.*--resume"):
            ask(checkpoints)
        checkpoints.wait()
    assert torch.equal(load_checkpoint(tmp_path)[1]["model"]["weight"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_without_memory_for_a_copy_training_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(value: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(checkpoint.copy, "deepcopy", full)
    with Checkpoints(tmp_path, {}, clock=Clock()) as checkpoints:
        checkpoints.begin(state())
        assert load_checkpoint(tmp_path)[1]["step"] == 5


@pytest.mark.gpu
def test_on_a_gpu_what_is_written_is_the_state_of_its_moment(tmp_path: Path, held: threading.Event) -> None:
    weight = torch.ones(1 << 20, device="cuda")
    with Checkpoints(tmp_path, {}, clock=Clock()) as checkpoints:
        checkpoints.begin({"model": {"weight": weight}})
        for _ in range(100):
            weight.add_(1)
        held.set()
    assert torch.equal(load_checkpoint(tmp_path)[1]["model"]["weight"], torch.ones(1 << 20))


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(3),
        [1, 2],
        {},
        "text",
        None,
        {"version": 2, "config": {}},
        {"version": 99, "config": {}, "trainer": {}},
        {"version": True, "config": {}, "trainer": {}},
        {"version": "2", "config": {}, "trainer": {}},
        {"version": torch.zeros(2), "config": {}, "trainer": {}},
        {"version": 2, "config": [], "trainer": {}},
        {"version": 2, "config": {}, "trainer": torch.zeros(2)},
    ],
)
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(FastmnistError, match=r"checkpoint\.pt") as caught:
        load_checkpoint(tmp_path)
    assert len(str(caught.value)) < 400
