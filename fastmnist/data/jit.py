"""How the project compiles its numba functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles without the GIL and keeps the machine code on disk; where no folder takes it, in memory alone."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba found neither the package's folder nor the user's cache writable
        return numba.njit(nogil=True)(function)
