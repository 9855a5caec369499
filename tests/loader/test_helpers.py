"""Tasks and the threads that run them."""

from __future__ import annotations

import threading

import pytest

from fastmnist.loader import helpers
from fastmnist.loader.helpers import NAME, Helpers, Task


def test_a_task_runs_once_in_the_thread_that_comes_first():
    pool, done = Helpers(1), []
    task = pool.submit(done.append, 1)
    task.result()
    task.result()
    assert task.done()
    assert not task.run_if_free()
    assert done == [1]
    alone = Helpers(0).submit(lambda: done.append(2) or "result")
    assert not alone.done()
    assert alone.result() == "result"
    cancelled = Task(done.append, 3)
    cancelled.cancel()
    assert not cancelled.run_if_free()
    assert done == [1, 2]
    pool.end()
    pool.submit(done.append, 4).result()  # a new thread starts
    assert done == [1, 2, 4]
    pool.end()


def test_a_forked_child_repeats_a_task_that_its_parents_helper_had_begun(monkeypatch):
    pool, begun, released = Helpers(1), threading.Event(), threading.Event()

    def work() -> str:
        if threading.current_thread().name == NAME:
            begun.set()
            released.wait(60)
        return threading.current_thread().name

    finished = pool.submit(work)
    task = pool.submit(work)
    assert begun.wait(60)
    with monkeypatch.context() as patch:
        patch.setattr(helpers.os, "getpid", lambda: -1)  # as in the child
        assert finished.result() == threading.current_thread().name
    released.set()
    assert finished.result() == NAME
    task.result()
    pool.end()


def test_a_helper_that_died_is_not_waited_for_forever(monkeypatch):
    monkeypatch.setattr(helpers, "LIVENESS_SECONDS", 0.01)
    monkeypatch.setattr(helpers, "NAME", "a name that no thread has")
    task = Task(print)
    task.cancel()
    with pytest.raises(RuntimeError, match="helper thread"):
        task.result()
