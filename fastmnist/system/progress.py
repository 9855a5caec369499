"""Console progress: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from fastmnist.system.numbers import duration

SHOW_AFTER = 1.0  # seconds before the progress of writing a file is shown
PLAIN_EVERY = 10.0  # seconds between two plain lines


class Reporter:
    """Prints to standard output, with `quiet` only results, with `silent` nothing."""

    def __init__(self, quiet: bool = False, console: Console | None = None, *, silent: bool = False) -> None:
        # As text in a notebook too, where long lines wrap: rich's HTML would cut them.
        self.console = console or Console(highlight=False, soft_wrap=True, force_jupyter=False, quiet=silent)
        self.quiet = quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._begun: dict[Path, float] = {}
        self._last_line = 0.0

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False)

    def result(self, text: str) -> None:
        self.console.print(text, markup=False)

    def writing(self, path: Path, done: int, total: int) -> None:
        """Progress of writing a file, from the first second on."""
        now = time.monotonic()
        begun = self._begun.setdefault(path, now)
        if self.quiet or now - begun < SHOW_AFTER:
            return
        if done == total or now - self._last_line > SHOW_AFTER:
            self._last_line = now
            rate = done / (now - begun)
            self.say(f"{path.name}: {done:,} of {total:,} samples, {rate:,.0f} a second")

    @contextmanager
    def training(self, steps: int, done: int, batch_size: int) -> Iterator[None]:
        """A progress bar for `show`, until the block ends."""
        self._steps, self._batch_size = steps, batch_size
        if self.quiet or not self.console.is_terminal:
            yield
            return
        columns = (BarColumn(bar_width=24), TextColumn("{task.description}"))
        with Progress(*columns, console=self.console, transient=True) as self._bar:
            self._task = self._bar.add_task("first step", total=steps, completed=done)
            try:
                yield
            finally:
                self._bar = None

    @contextmanager
    def working(self) -> Iterator[Callable[[str, float], None]]:
        """Yields a function that shows the current activity and the share done, 0 to 1."""
        if self.quiet or not self.console.is_terminal:
            yield self._plain_line
            return
        columns = (BarColumn(bar_width=24), TextColumn("{task.description}"))
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task("", total=1.0)
            yield lambda text, share: bar.update(task, completed=share, description=escape(text))

    def _plain_line(self, text: str, share: float) -> None:
        if time.monotonic() - self._last_line > PLAIN_EVERY:
            self._last_line = time.monotonic()
            self.say(f"{share:.0%}  {text}")

    def show(self, record: Mapping[str, Any], epochs: int) -> None:
        """Shows one step record as the progress line."""
        if self.quiet:
            return
        rate = record["images_per_second"]
        left = (self._steps - record["step"]) * self._batch_size / rate if rate else 0.0
        text = (
            f"epoch {record['epoch'] + 1}/{epochs}  {rate:,.0f} images/s  loss {record['loss']:.3f}  "
            f"accuracy {record['accuracy']:.1%}  {duration(left)} left"
        )
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=record["step"], description=text)
        elif time.monotonic() - self._last_line > PLAIN_EVERY:
            self._last_line = time.monotonic()
            self.say(f"step {record['step']}/{self._steps}  {text}")

    def epoch(self, record: Mapping[str, Any], epochs: int) -> None:
        """Prints one epoch record."""
        text = (
            f"epoch {record['epoch'] + 1}/{epochs}: loss {record['train_loss']:.4f}, "
            f"training accuracy {record['train_accuracy']:.2%}"
        )
        if record.get("val_accuracy") is not None:
            text += f", validation accuracy {record['val_accuracy']:.2%}"
        self.say(f"{text}, {record['images_per_second']:,.0f} images/s, {duration(record['seconds'])}")
