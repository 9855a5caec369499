"""Console progress on a terminal and elsewhere."""

import io
import re

import pytest
from rich.console import Console

from fastmnist.system import progress
from fastmnist.system.progress import Reporter

RECORD = {"step": 5, "epoch": 0, "loss": 0.5, "accuracy": 0.75, "images_per_second": 100.0}


def reporter(terminal: bool = False, quiet: bool = False) -> tuple[Reporter, io.StringIO]:
    out = io.StringIO()
    return Reporter(quiet, Console(file=out, force_terminal=terminal, width=120, soft_wrap=True)), out


def test_time_left_follows_from_speed_and_steps_left() -> None:
    shown, out = reporter()
    with shown.training(steps=105, done=0, batch_size=10):
        shown.show(RECORD, epochs=2)
    facts = ("5/105", "1/2", "100 images/s", "0.500", "75.0%", "10 s")  # 100 steps of 10 images at 100 images/s
    assert [fact for fact in facts if fact not in out.getvalue()] == []
    assert out.getvalue().count("\n") == 1


def test_a_terminal_gets_one_live_line() -> None:
    shown, out = reporter(terminal=True)
    with shown.training(steps=10, done=0, batch_size=10):
        shown.show(RECORD, epochs=2)
        shown.say("a line that stays")
    assert "100 images/s" in out.getvalue()
    assert "a line that stays" in out.getvalue()
    assert "5/10" not in out.getvalue()


def test_plain_lines_come_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown, out = reporter()
    with shown.training(steps=10, done=0, batch_size=10):
        for _ in range(30):
            shown.show(RECORD, epochs=2)
            now[0] += 1.0
    assert len(out.getvalue().splitlines()) == 3


def test_compiling_is_shown_only_when_it_takes_long(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown, out = reporter()
    shown.writing(tmp_path / "a", 10, 100)
    now[0] += 0.5
    shown.writing(tmp_path / "a", 100, 100)
    assert out.getvalue() == ""
    now[0] += 2.0
    shown.writing(tmp_path / "a", 50, 100)
    assert re.findall(r"\d+", out.getvalue()) == ["50", "100", "20"]  # done, total, per second


def test_quiet_leaves_the_result_alone() -> None:
    shown, out = reporter(quiet=True)
    shown.say("[bold]something")
    with shown.training(10, 0, 10):
        shown.show(RECORD, epochs=1)
    shown.result("[the] result")
    assert out.getvalue() == "[the] result\n"
