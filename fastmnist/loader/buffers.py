"""Host memory for batches, used again once nobody refers to it."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable

import numpy as np
import torch

# numpy knows no bfloat16: the two-byte floats travel through it as integers of that width.
NUMPY_TYPES = {
    torch.uint8: np.uint8,
    torch.float32: np.float32,
    torch.float16: np.int16,
    torch.bfloat16: np.int16,
}
LEAST_KEPT = 16  # buffers to look through for one that is free; those beyond belong to whoever holds them


class _Buffer:
    """Memory of one call's images: `rows` (n, values) for the kernels, `images` (n, C, H, W) channels_last."""

    def __init__(self, count: int, image_shape: tuple[int, int, int], numpy_type: type) -> None:
        self._memory: np.ndarray = np.empty((count, *image_shape), numpy_type)
        self.rows = self._memory.reshape(count, -1)
        self.images = self._memory.transpose(0, 3, 1, 2)
        self._unused = sys.getrefcount(self._memory)

    def is_free(self) -> bool:
        """True once no part is left: each array of a part refers to the whole memory, each tensor to its array."""
        return sys.getrefcount(self._memory) == self._unused


class BufferPool:
    """Memory for up to `most` images at a time, used again only when the last part of it is gone.

    Fresh memory for each batch would cost a page fault per 4 KiB, more than the gather itself.

    Args:
        most: images of a buffer.
        image_shape: (H, W, C).
        dtype: of the tensors, one of NUMPY_TYPES.
        keep: buffers to keep at least, for a caller that takes many at a time.
    """

    def __init__(self, most: int, image_shape: tuple[int, int, int], dtype: torch.dtype, *, keep: int = 0) -> None:
        self._shape = most, image_shape, NUMPY_TYPES[dtype]
        self._kept: deque[_Buffer] = deque(maxlen=max(keep, LEAST_KEPT))

    def __len__(self) -> int:
        """Buffers that are kept, free or not."""
        return len(self._kept)

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The same memory twice: (count, values) to be written by a kernel, and (count, C, H, W) channels_last."""
        buffer = self._free_buffer()
        return buffer.rows[:count], buffer.images[:count]  # parts, which mark the buffer as taken

    def _free_buffer(self) -> _Buffer:
        for _ in range(len(self._kept)):
            buffer = self._kept[0]
            self._kept.rotate(-1)  # the one that was used last comes last
            if buffer.is_free():
                return buffer
        buffer = _Buffer(*self._shape)
        self._kept.append(buffer)
        return buffer


def tensor_maker(dtype: torch.dtype) -> Callable[[np.ndarray], torch.Tensor]:
    """The function that makes a tensor of `dtype` over an array's memory.

    Each tensor has a storage of its own, over its part of the memory: unlike views of one tensor, two of them share
    no version counter, and `torch.save` writes a part alone.
    """
    if dtype in (torch.uint8, torch.float32):
        return torch.from_numpy

    def make(array: np.ndarray) -> torch.Tensor:
        integers = torch.from_numpy(array)
        empty = torch.empty(0, dtype=dtype, device="cpu")
        return empty.set_(integers.untyped_storage(), 0, integers.shape, integers.stride())  # type: ignore[call-overload]

    return make
