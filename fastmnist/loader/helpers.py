"""Work that is shared with helper threads, in pieces of some 50 microseconds.

concurrent.futures takes about as long to hand one over; here it is two locks and a queue.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

NAME = "fastmnist-helper"  # of the threads
LOOK_AGAIN = 5.0  # seconds between two looks at whether a helper that is waited for still lives


class Piece:
    """A call that is made once, by whoever comes first, and whose result all may wait for."""

    def __init__(self, work: Callable[..., Any], *arguments: Any) -> None:
        self._work, self._arguments = work, arguments
        self._taken, self._over = threading.Lock(), threading.Lock()
        self._over.acquire()
        self._result: Any = None
        self._error: BaseException | None = None
        self._process = os.getpid()

    def run_if_free(self) -> bool:
        """Makes the call, unless somebody has begun it."""
        if not self._taken.acquire(blocking=False):
            return False
        try:
            self._result = self._work(*self._arguments)
        except BaseException as error:
            self._error = error
        finally:
            self._forget()
            self._over.release()
        return True

    def _forget(self) -> None:
        """What the call is about may be used again, though a helper's queue still has the piece."""
        self._work, self._arguments = _nothing, ()

    def is_over(self) -> bool:
        return not self._over.locked()

    def cancel(self) -> None:
        """Nobody begins it any more."""
        if self._taken.acquire(blocking=False):
            self._forget()

    def wait(self) -> Any:
        """The call's result, or what it raised, with its traceback. Makes the call if nobody has begun it.

        A forked child has none of the parent's threads: it makes the call that was begun again, which must not matter.

        Raises:
            RuntimeError: who had begun it is no more.
        """
        if self._process != os.getpid() and not self.is_over():
            return self._work(*self._arguments)
        self.run_if_free()
        while not self._over.acquire(timeout=LOOK_AGAIN):
            if not any(thread.name == NAME for thread in threading.enumerate()):
                raise RuntimeError("a helper thread ended in the middle of its work; make a new loader")
        self._over.release()
        if self._error is not None:
            raise self._error
        return self._result


def _nothing() -> None: ...


class Helpers:
    """Threads that make calls in the order in which they are given; they begin when they are first needed.

    They end with `end`, or when this object is forgotten. A forked child begins its own.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._queue: SimpleQueue[Piece | None] = SimpleQueue()
        self._process = 0
        self._end: Callable[[], Any] = lambda: None

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Piece:
        """A piece that a helper begins as soon as it has time."""
        piece = Piece(work, *arguments)
        if self.count:
            if self._process != os.getpid():
                self._begin()
            self._queue.put(piece)
        return piece

    def _begin(self) -> None:
        self._process, self._queue = os.getpid(), SimpleQueue()
        threads = [
            threading.Thread(target=_help, args=(self._queue,), name=NAME, daemon=True) for _ in range(self.count)
        ]
        for thread in threads:
            thread.start()
        # Called at the interpreter's exit too, which would abort in the middle of a kernel.
        self._end = weakref.finalize(self, _dismiss, self._queue, threads)

    def end(self) -> None:
        """Ends them, once what they were given is done."""
        if self._process == os.getpid():
            self._end()
        self._process = 0


def _help(queue: SimpleQueue[Piece | None]) -> None:
    while (piece := queue.get()) is not None:
        piece.run_if_free()
        del piece  # with the memory that it was about


def _dismiss(queue: SimpleQueue[Piece | None], threads: list[threading.Thread]) -> None:
    for _ in threads:
        queue.put(None)
    for thread in threads:
        if thread is not threading.current_thread():  # which may be the one that forgets the last loader
            thread.join()
