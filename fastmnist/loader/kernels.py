"""numba kernels that gather a batch, as bytes or normalised; and how the project compiles its numba functions.

Arguments that they share: data (bytes,) uint8, the memory that holds the images; offsets (N,) int64, where each begins;
order (n,) int64, samples to gather; start, the place in `order` of the first one. Nothing is checked here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

READ, KEEP, DATA_CACHE = 0, 3, 1  # arguments of LLVM's prefetch
LINE = 64  # bytes of a cache line
BYTES_AHEAD = 6 << 10  # of images prefetched: hides a cache miss, and leaves most of a 32 KB cache
MOST_ROWS = 16  # images prefetched
MOST_LINES = 64  # of one image: a longer run the processor prefetches by itself

# numba imports most of itself (and scipy's BLAS) at the first call of a compiled function, a third of a second that the
# first batch would wait for: here it belongs to the imports.
cpu_target.typing_context.refresh()
cpu_target.target_context.refresh()


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `function` to run without the GIL; machine code is cached on disk where a folder can be written."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba found neither the package's folder nor the user's cache writable
        return numba.njit(nogil=True)(function)


# FFCV declares these types read-only for the whole process, and no function compiled later could write to such arrays.
# References kept here make them the very objects that FFCV changes; numba would otherwise make new ones.
ARRAY_TYPES = (numba.uint8[::1], numba.uint8[:, ::1], numba.uint32[::1], numba.uint64[::1])


def mend_array_types() -> None:
    """Makes numba's array types writable again after FFCV; called before our functions may be compiled."""
    for array_type in ARRAY_TYPES:
        array_type.mutable = True


def _prefetch(context, array, index):  # type: ignore[no-untyped-def]
    """Prefetches the cache line of array[index]: a hint, which never fails, whatever the index."""

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
    """The same under NUMBA_DISABLE_JIT=1, for debuggers and coverage."""


prefetch: Any = _prefetch_nothing if numba.config.DISABLE_JIT else intrinsic(_prefetch)  # type: ignore[attr-defined]


@jit
def rows_ahead(size):  # type: ignore[no-untyped-def]
    """Images of `size` bytes to prefetch: their places are random, so that no processor foresees them."""
    return max(1, min(MOST_ROWS, BYTES_AHEAD // size))


@jit
def lines_of(size):  # type: ignore[no-untyped-def]
    """Cache lines to prefetch of an image of `size` bytes."""
    return min(MOST_LINES, size // LINE + 1)


@jit
def gather(data, offsets, order, start, out):  # type: ignore[no-untyped-def]
    """out[i] = the image at offsets[order[start + i]]; out (n, bytes) uint8."""
    size = out.shape[1]
    ahead, lines, last = rows_ahead(size), lines_of(size), len(order) - 1
    for i in range(len(out)):
        coming = offsets[order[min(start + i + ahead, last)]]
        for line in range(lines):
            prefetch(data, coming + line * LINE)
        at = offsets[order[start + i]]
        image = data[at : at + size]
        for j in range(size):  # vectorises; assigning the slice does not
            out[i, j] = image[j]


@jit
def gather_float32(data, offsets, order, start, mean, std, out):  # type: ignore[no-untyped-def]
    """out[i, j] = (byte j of image i / 255 - mean) / std of j's channel; mean, std (C,), out (n, values) float32."""
    channels, size = len(mean), out.shape[1]
    ahead, lines, last = rows_ahead(size), lines_of(size), len(order) - 1
    byte = np.float32(255)
    for i in range(len(out)):
        coming = offsets[order[min(start + i + ahead, last)]]
        for line in range(lines):
            prefetch(data, coming + line * LINE)
        at = offsets[order[start + i]]
        image = data[at : at + size]
        for channel in range(channels):
            offset, scale = mean[channel], std[channel]
            if channels == 1:  # a constant step of 1 vectorises
                for j in range(size):
                    out[i, j] = (np.float32(image[j]) / byte - offset) / scale
            else:
                for j in range(channel, size, channels):
                    out[i, j] = (np.float32(image[j]) / byte - offset) / scale


@jit
def gather_looked_up(data, offsets, order, start, table, out):  # type: ignore[no-untyped-def]
    """out[i, j] = table[channel of j, byte j of image i]; table (C, 256) and out (n, values) int16.

    For two-byte floats, which numba cannot compute with.
    """
    channels, size = table.shape[0], out.shape[1]
    ahead, lines, last = rows_ahead(size), lines_of(size), len(order) - 1
    for i in range(len(out)):
        coming = offsets[order[min(start + i + ahead, last)]]
        for line in range(lines):
            prefetch(data, coming + line * LINE)
        at = offsets[order[start + i]]
        image = data[at : at + size]
        for channel in range(channels):
            values = table[channel]
            for j in range(channel, size, channels):
                out[i, j] = values[image[j]]
