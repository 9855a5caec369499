"""Helper threads for tasks of some 50 microseconds.

concurrent.futures takes about as long to hand one over; here it costs two locks and a queue.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

NAME = "fastmnist-helper"  # of the threads
LIVENESS_SECONDS = 5.0  # between two checks that a helper still lives while its task is waited for


class Task:
    """A future that the waiting thread may run itself."""

    def __init__(self, work: Callable[..., Any], *arguments: Any) -> None:
        self._work, self._arguments = work, arguments
        self._begun, self._running = threading.Lock(), threading.Lock()
        self._running.acquire()
        self._result: Any = None
        self._error: BaseException | None = None
        self._process = os.getpid()

    def run_if_free(self) -> bool:
        """Runs the task unless it was begun or cancelled; True if it ran here."""
        if not self._begun.acquire(blocking=False):
            return False
        try:
            self._result = self._work(*self._arguments)
        except BaseException as error:
            self._error = error
        finally:
            self._forget()
            self._running.release()
        return True

    def _forget(self) -> None:
        """Releases the arguments' memory, though a helper's queue may still hold the task."""
        self._work, self._arguments = _nothing, ()

    def done(self) -> bool:
        return not self._running.locked()

    def cancel(self) -> None:
        """Keeps the task from being begun."""
        if self._begun.acquire(blocking=False):
            self._forget()

    def result(self) -> Any:
        """The task's result or its error, with its traceback; runs the task here if nobody has begun it.

        A forked child has none of its parent's threads and repeats a task that one of them had begun: tasks must allow
        that.

        Raises:
            RuntimeError: the thread that had begun it is gone.
        """
        if self._process != os.getpid() and not self.done():
            return self._work(*self._arguments)
        self.run_if_free()
        while not self._running.acquire(timeout=LIVENESS_SECONDS):
            if not any(thread.name == NAME for thread in threading.enumerate()):
                raise RuntimeError("a helper thread ended in the middle of its work; make a new loader")
        self._running.release()
        if self._error is not None:
            raise self._error
        return self._result


def _nothing() -> None: ...


class Helpers:
    """`count` threads that run tasks first in, first out; started with the first task.

    They end with `end`, or with the last reference to this object. A forked child starts its own.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._queue: SimpleQueue[Task | None] = SimpleQueue()
        self._process = 0
        self._end: Callable[[], Any] = lambda: None

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Task:
        """A task for the next helper that is free."""
        task = Task(work, *arguments)
        if self.count:
            if self._process != os.getpid():
                self._start()
            self._queue.put(task)
        return task

    def _start(self) -> None:
        self._process, self._queue = os.getpid(), SimpleQueue()
        threads = [
            threading.Thread(target=_run_tasks, args=(self._queue,), name=NAME, daemon=True) for _ in range(self.count)
        ]
        for thread in threads:
            thread.start()
        # Also called when the interpreter exits, which would abort in the middle of a kernel.
        self._end = weakref.finalize(self, _dismiss, self._queue, threads)

    def end(self) -> None:
        """Ends the threads after the tasks that they were given."""
        if self._process == os.getpid():
            self._end()
        self._process = 0


def _run_tasks(queue: SimpleQueue[Task | None]) -> None:
    while (task := queue.get()) is not None:
        task.run_if_free()
        del task  # and with it the memory of its result


def _dismiss(queue: SimpleQueue[Task | None], threads: list[threading.Thread]) -> None:
    for _ in threads:
        queue.put(None)
    for thread in threads:
        if thread is not threading.current_thread():  # a helper may hold the last reference to a loader
            thread.join()
