"""The errors that a user can put right. Anything else that is raised is a bug and keeps its traceback."""

from __future__ import annotations

import operator
from typing import Any


class FastmnistError(Exception):
    """Something outside the program is wrong: the message says what, where and what to do."""


class DataError(FastmnistError):
    """A data source or a compiled file is missing, damaged or not what it claims to be."""


class ConfigError(FastmnistError):
    """A setting has a value that cannot work; the command line answers it with exit status 2."""


def whole_number(name: str, value: Any, least: float = 0) -> int:
    """`value` as a Python int: those of numpy and torch are neither JSON nor loaded with weights_only.

    Raises:
        ConfigError: it is no integer, or below `least`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} {value!r} must be a whole number") from None
    if number < least:
        raise ConfigError(f"{name} {number} must be at least {least}")
    return number
