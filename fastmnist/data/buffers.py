"""Host memory for batches, used again once nobody refers to it."""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
import torch

# numpy knows no bfloat16: the two-byte floats travel through it as integers of that width.
NUMPY_TYPES = {
    torch.uint8: np.uint8,
    torch.float32: np.float32,
    torch.float16: np.int16,
    torch.bfloat16: np.int16,
    torch.int64: np.int64,
}
MOST_KEPT = 16  # buffers that wait for their next use; more of them are given back to the system


class BufferPool:
    """Tensors of up to `rows` rows, each safe to keep: its memory comes back only when its last view is gone.

    Fresh memory for each batch would cost a page fault per 4 KiB, more than the gather itself. A tensor made from a
    numpy array keeps that array alive for as long as any tensor shares its storage, so the array's end is the sign.

    Args:
        rows: rows of a whole batch.
        row_size: values per row.
        dtype: of the tensors, one of NUMPY_TYPES.
        reuse: hand out one and the same memory each time.
    """

    def __init__(self, rows: int, row_size: int, dtype: torch.dtype, *, reuse: bool = False) -> None:
        self.dtype = dtype
        self.shape = (rows, row_size)
        self.reuse = reuse
        self.numpy_type = NUMPY_TYPES[dtype]
        self.free: deque[np.ndarray] = deque(maxlen=MOST_KEPT)

    def take(self, rows: int) -> tuple[np.ndarray, torch.Tensor]:
        """The same memory twice: (rows, row_size) to be written by a kernel, and as a tensor of `dtype`."""
        try:
            memory = self.free.popleft()
        except IndexError:
            memory = np.empty(self.shape, self.numpy_type)
        view = memory[:rows]
        if self.reuse:
            self.free.append(memory)
        else:
            weakref.finalize(view, self.free.append, memory).atexit = False
        tensor = torch.from_numpy(view)
        return view, tensor if tensor.dtype == self.dtype else tensor.view(self.dtype)
