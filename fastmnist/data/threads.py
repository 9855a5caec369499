"""Threads that share the work on some batches with the one that asks for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Piece:
    """Work that another thread was given."""

    def __init__(self, future: Future[None], work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._future, self._work, self._arguments = future, work, arguments
        self._process = os.getpid()

    def wait(self) -> None:
        """Until it is done; raises what it raised, with its traceback. In a forked child, which has no such thread,
        does it here."""
        if self._process == os.getpid():
            self._future.result()
        else:
            self._work(*self._arguments)


class Helpers:
    """Threads that begin when they are first needed; a forked child begins its own."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0

    def submit(self, work: Callable[..., None], *arguments: Any) -> Piece:
        """Lets a helper call work(*arguments), which must be the same however often it is done."""
        if self._pool is None or self._process != os.getpid():
            self._pool = ThreadPoolExecutor(self.count, "fastmnist-gather")
            self._process = os.getpid()
        return Piece(self._pool.submit(work, *arguments), work, arguments)

    def end(self) -> None:
        """Ends them, once what they were given is done."""
        if self._pool is not None and self._process == os.getpid():
            self._pool.shutdown()
        self._pool = None
