"""How the project compiles its numba functions, and the one instruction that numba does not offer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

READ, KEEP, DATA_CACHE = 0, 3, 1  # arguments of LLVM's prefetch

# numba imports most of itself (and scipy's BLAS) when a compiled function is first called, which takes a third of a
# second: with the other imports, or the first batch would wait for it.
cpu_target.typing_context.refresh()
cpu_target.target_context.refresh()


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles without the GIL and keeps the machine code on disk; where no folder takes it, in memory alone."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba found neither the package's folder nor the user's cache writable
        return numba.njit(nogil=True)(function)


# FFCV declares these read-only for the whole process: what is compiled after that could not write to such an array.
# Kept here, they are the very objects that it declares so; numba would else make new ones beside them.
ARRAY_TYPES = (numba.uint8[::1], numba.uint8[:, ::1], numba.uint32[::1], numba.uint64[::1])


def mend_array_types() -> None:
    """Makes numba's types of arrays writable again; called before anything of ours may be compiled."""
    for array_type in ARRAY_TYPES:
        array_type.mutable = True


def _prefetch(context, array, index):  # type: ignore[no-untyped-def]
    """Asks for the cache line that holds array[index], a hint that never fails, whatever the index."""

    def generate(target, builder, signature, arguments):  # type: ignore[no-untyped-def]
        items = target.make_array(signature.args[0])(target, builder, arguments[0]).data
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        address = builder.bitcast(builder.gep(items, [arguments[1]]), pointer)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        )
        builder.call(function, [address, number(READ), number(KEEP), number(DATA_CACHE)])
        return target.get_dummy_value()

    return types.void(array, types.int64), generate


def _prefetch_nothing(array: Any, index: int) -> None:
    """The same where numba is told to compile nothing (NUMBA_DISABLE_JIT=1), as debuggers and coverage ask for."""


prefetch: Any = _prefetch_nothing if numba.config.DISABLE_JIT else intrinsic(_prefetch)  # type: ignore[attr-defined]
