"""Keeps few pages of a file in memory that is larger than it: the next ones are read ahead, past ones given back."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from fastmnist.data.beton import Beton
from fastmnist.data.order import Window


class Paging:
    """Follows an epoch through its windows; what is read ahead is one window.

    Args:
        file: whose map is read.
        windows: of the epoch, one after the other; none, and nothing is done.
    """

    def __init__(self, file: Beton, windows: Sequence[Window]) -> None:
        self.file = file
        self._coming = deque(windows)
        self._present: deque[Window] = deque()

    def move(self, start: int, stop: int) -> None:
        """The samples at places `start` to `stop` of the epoch's order are about to be read, none before them again."""
        while self._coming and (self._coming[0].start < stop or len(self._present) < 2 or self._last_is_reached(stop)):
            self._present.append(self._coming.popleft())
            self.file.advise(self._present[-1].pages, needed=True)
        while len(self._present) > 1 and self._present[1].start <= start:
            self.file.advise(self._present.popleft().pages, needed=False)

    def _last_is_reached(self, stop: int) -> bool:
        return self._present[-1].start < stop
