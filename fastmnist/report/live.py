"""Live learning curves in a notebook while a run trains."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastmnist.report.curves import plot_curves
from fastmnist.system.progress import Reporter

REDRAW_EVERY = 2.0  # seconds; drawing takes most of one


class LiveCurves(Reporter):
    """A Reporter that also draws the learning curves so far below its notebook cell."""

    def __init__(self) -> None:
        super().__init__()
        self._records: list[Mapping[str, Any]] = []
        self._handle: Any = None
        self._drawn = 0.0

    @contextmanager
    def training(self, steps: int, done: int, batch_size: int) -> Iterator[None]:
        self._steps, self._batch_size = steps, batch_size
        yield
        self._draw()

    def show(self, record: Mapping[str, Any], epochs: int) -> None:
        self._records.append(record)
        if time.monotonic() - self._drawn > REDRAW_EVERY:
            self._draw()

    def epoch(self, record: Mapping[str, Any], epochs: int) -> None:
        self._records.append(record)
        super().epoch(record, epochs)

    def _draw(self) -> None:
        from IPython.display import Image, display

        if not self._records:
            return
        with tempfile.TemporaryDirectory() as folder:
            picture = Path(folder) / "curves.png"
            plot_curves(self._records, picture)
            image = Image(picture.read_bytes(), width=900)
        if self._handle is None:
            self._handle = display(image, display_id=True)
        else:
            self._handle.update(image)
        self._drawn = time.monotonic()
