"""Errors that a user can fix. Any other exception is a bug and keeps its traceback."""

from __future__ import annotations

import math
import operator
from typing import Any


class FastmnistError(Exception):
    """An error outside the program: the message says what is wrong, where, and what to do."""


class DataError(FastmnistError):
    """A data source or a compiled file is missing, damaged or not what it claims to be."""


class ReportedError(FastmnistError):
    """A failure that another process of the same job reports."""


class ConfigError(FastmnistError):
    """A setting cannot work; the command line exits with status 2."""


def whole_number(name: str, value: Any, least: int = 0, most: float = math.inf) -> int:
    """`value` as a Python int: JSON and `torch.load(weights_only=True)` take no integers of numpy or torch.

    Raises:
        ConfigError: `value` is no integer, or not in least to most.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} {value!r} must be a whole number") from None
    check_limits(name, number, least, most)
    return number


def check_limits(name: str, value: float, least: float, most: float) -> None:
    """Raises ConfigError if `value` is not in least to most, or NaN."""
    if not least <= value <= most:
        raise ConfigError(f"{name} {value} must be {f'at least {least}' if most == math.inf else f'{least} to {most}'}")
