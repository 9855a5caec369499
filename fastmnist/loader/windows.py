"""Windows of pages, read into memory one ahead of use: for a file larger than memory.

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
from fastmnist.files import read_at
from fastmnist.loader.helpers import Helpers, Task
from fastmnist.loader.order import Window

AHEAD = 2  # pages announced to the disk beyond the one read: twice as fast as none; more gain nothing


class WindowReader:
    """The images of an epoch's windows, a few windows at a time in memory of its own.

    Attributes:
        data: (bytes,) uint8, that memory.

    Args:
        windows: of the epoch, in order.
        first: position in the epoch to begin with; windows before it are not read.
        step: most samples of a call of `offsets`.
        lag: samples before a call's that may still be gathered from `data`.
        helper: one thread, which reads.
    """

    def __init__(
        self, file: Beton, windows: Sequence[Window], *, first: int, step: int, lag: int, helper: Helpers
    ) -> None:
        self._file, self._helper, self._lag = file, helper, lag
        windows = windows[sum(window.start <= first for window in windows) - 1 :]
        self._coming = deque(windows)
        self._present: deque[tuple[Window, int, Task]] = deque()  # with its slot
        self._page_size = file.page_size
        self._width = max(len(window.pages) for window in windows)
        starts = np.array([window.start for window in windows])
        # The most windows in use at a time, wherever a step falls; one more is being read.
        in_use = np.searchsorted(starts, starts + step + lag, side="left") - np.arange(len(starts)) + 1
        slots = min(int(in_use.max()) + 1, len(windows))
        self._free = deque(range(slots))
        self._memory = np.empty(slots * self._width * self._page_size, np.uint8)
        self.data = self._memory.view()
        self.data.flags.writeable = False
        self._place = np.zeros(-(-file.file_size // self._page_size), np.int64)  # of each page in `data`

    def offsets(self, samples: np.ndarray, start: int) -> np.ndarray:
        """(n,) int64: where in `data` the images of `samples` (n,), from position `start` of the epoch, begin.

        Raises:
            DataError: the file cannot be read to its end.
        """
        stop = start + len(samples)
        while len(self._present) > 1 and self._present[1][0].start <= start - self._lag:
            self._free.append(self._present.popleft()[1])
        while self._coming and self._free:
            self._begin(self._coming.popleft(), self._free.popleft())
        for window, slot, task in self._present:
            if window.start >= stop:
                break
            task.result()
            self._place[window.pages] = (slot * self._width + np.arange(len(window.pages))) * self._page_size
        at = self._file.offsets[samples]
        page = at // self._page_size
        offsets: np.ndarray = self._place[page] + (at - page * self._page_size)
        return offsets

    def _begin(self, window: Window, slot: int) -> None:
        first = slot * self._width * self._page_size
        memory = self._memory[first : first + len(window.pages) * self._page_size]
        self._present.append((window, slot, self._helper.submit(_read, self._file, window.pages, memory)))


def _announce(file: Beton, start: int) -> None:
    """Asks the disk for a page: the system reads ahead in sequence only, and pages are in random order."""
    with suppress(AttributeError, OSError):  # macOS and Windows lack the call, some file systems refuse it
        os.posix_fadvise(file.descriptor, start, file.page_size, os.POSIX_FADV_WILLNEED)


def _read(file: Beton, pages: np.ndarray, memory: np.ndarray) -> None:
    """Fills `memory` with whole pages (n,) of the file, which are read in the order of the file."""
    size, turns = file.page_size, np.argsort(pages).tolist()
    for turn, number in enumerate(turns):
        for later in turns[turn + AHEAD : turn + AHEAD + 1] if turn else turns[: AHEAD + 1]:
            _announce(file, int(pages[later]) * size)
        start = int(pages[number]) * size
        left = memory.data[number * size : number * size + min(size, file.file_size - start)]
        while left:
            try:
                count = read_at(file.descriptor, left, start)
            except OSError as error:
                raise DataError(f"{file.path}: cannot be read at byte {start:,}: {error.strerror}") from error
            if not count:
                raise DataError(f"{file.path}: ends at byte {start:,} of {file.file_size:,}; it was cut while open")
            left, start = left[count:], start + count
