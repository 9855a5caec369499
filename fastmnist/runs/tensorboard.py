"""TensorBoard events of a run; the package is an extra, so its absence is a usage error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastmnist.errors import ConfigError


def summary_writer() -> Callable[[str], Any]:
    """TensorBoard's writer; raises ConfigError where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "--tensorboard needs the package tensorboard: pip install tensorboard, or leave the flag out"
        ) from error
    return SummaryWriter


@contextmanager
def tensorboard_events(folder: Path, wanted: bool) -> Iterator[Any]:
    """An open writer into the run's folder; None unless `wanted`."""
    if not wanted:
        yield None
        return
    with summary_writer()(str(folder / "tensorboard")) as writer:
        yield writer
