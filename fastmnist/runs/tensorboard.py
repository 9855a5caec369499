"""TensorBoard, for those who ask for it; an extra, so its absence is an error of usage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastmnist.errors import ConfigError


def summary_writer() -> Callable[[str], Any]:
    """TensorBoard's writer, which is an extra; raises ConfigError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "--tensorboard needs the package tensorboard: pip install tensorboard, or leave the flag out"
        ) from error
    return SummaryWriter


@contextmanager
def tensorboard_events(folder: Path, wanted: bool) -> Iterator[Any]:
    """TensorBoard's writer, or None."""
    if not wanted:
        yield None
        return
    with summary_writer()(str(folder / "tensorboard")) as writer:
        yield writer
