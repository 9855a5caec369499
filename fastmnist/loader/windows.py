"""Reads a file that is larger than memory by windows of pages, the next one while the current one is used.

A memory map would fetch 4 KiB at a time from random places of a window; whole pages come at the disk's speed.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from fastmnist.beton.reader import Beton
from fastmnist.errors import DataError
from fastmnist.loader.helpers import Helpers, Piece
from fastmnist.loader.order import Window

AHEAD = 2  # pages that the disk is at work on beyond the one that is read: twice as fast as none, and so are more


class WindowReader:
    """The images of an epoch's windows in memory of its own, `slots` windows at a time.

    Args:
        file: that is read.
        windows: of the epoch, one after the other.
        first: the place of the epoch that it begins with; windows before it are not read.
        step: samples that are asked for at a time, at most.
        lag: samples before those that may still be gathered from `data` when the next ones are asked for.
        helper: the thread that reads.
    """

    def __init__(
        self, file: Beton, windows: Sequence[Window], *, first: int, step: int, lag: int, helper: Helpers
    ) -> None:
        self._file, self._helper, self._lag = file, helper, lag
        windows = windows[sum(window.start <= first for window in windows) - 1 :]
        self._coming = deque(windows)
        self._present: deque[tuple[Window, int, Piece]] = deque()  # with its slot
        self._page_size = file.page_size
        self._width = max(len(window.pages) for window in windows)
        starts = np.array([window.start for window in windows])
        # However the step falls, so many windows are in use at a time; one more is on its way.
        in_use = np.searchsorted(starts, starts + step + lag, side="left") - np.arange(len(starts)) + 1
        slots = min(int(in_use.max()) + 1, len(windows))
        self._free = deque(range(slots))
        self._memory = np.empty(slots * self._width * self._page_size, np.uint8)
        self.data = self._memory.view()
        self.data.flags.writeable = False
        self._place = np.zeros(-(-file.file_size // self._page_size), np.int64)  # in `data`, of each page

    def offsets(self, samples: np.ndarray, start: int) -> np.ndarray:
        """(n,) int64: where in `data` the images of `samples` (n,) are, which come at place `start` of the epoch.

        Raises:
            DataError: the file cannot be read to its end.
        """
        stop = start + len(samples)
        while len(self._present) > 1 and self._present[1][0].start <= start - self._lag:
            self._free.append(self._present.popleft()[1])
        while self._coming and self._free:
            self._begin(self._coming.popleft(), self._free.popleft())
        for window, slot, piece in self._present:
            if window.start >= stop:
                break
            piece.wait()
            self._place[window.pages] = (slot * self._width + np.arange(len(window.pages))) * self._page_size
        at = self._file.offsets[samples]
        page = at // self._page_size
        found: np.ndarray = self._place[page] + (at - page * self._page_size)
        return found

    def _begin(self, window: Window, slot: int) -> None:
        first = slot * self._width * self._page_size
        memory = self._memory[first : first + len(window.pages) * self._page_size]
        self._present.append((window, slot, self._helper.submit(_read, self._file, window.pages, memory)))


def _announce(file: Beton, start: int) -> None:
    """Has the disk begin with a page: the system reads ahead of what is read in order, not of these."""
    with suppress(AttributeError, OSError):  # macOS has no such call, some file systems do not take it
        os.posix_fadvise(file.descriptor, start, file.page_size, os.POSIX_FADV_WILLNEED)


def _read(file: Beton, pages: np.ndarray, memory: np.ndarray) -> None:
    """Fills `memory` with whole pages (n,) of the file, in the order of their places on the disk."""
    size, turns = file.page_size, np.argsort(pages).tolist()
    for turn, number in enumerate(turns):
        for later in turns[turn + AHEAD : turn + AHEAD + 1] if turn else turns[: AHEAD + 1]:
            _announce(file, int(pages[later]) * size)
        start = int(pages[number]) * size
        left = memory.data[number * size : number * size + min(size, file.file_size - start)]
        while left:
            try:
                count = os.preadv(file.descriptor, [left], start)
            except OSError as error:
                raise DataError(f"{file.path}: cannot be read at byte {start:,}: {error.strerror}") from error
            if not count:
                raise DataError(f"{file.path}: ends at byte {start:,} of {file.file_size:,}; it was cut while open")
            left, start = left[count:], start + count
