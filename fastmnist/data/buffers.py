"""Host memory for batches, used again once nobody refers to it."""

from __future__ import annotations

import sys
from collections import deque

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
    """Memory of one batch: `rows` (B, values) for the kernels, `images` (B, C, H, W) for torch."""

    def __init__(self, batch_size: int, image_shape: tuple[int, int, int], numpy_type: type) -> None:
        memory: np.ndarray = np.empty((batch_size, *image_shape), numpy_type)
        self.rows = memory.reshape(batch_size, -1)
        self.images = memory.transpose(0, 3, 1, 2)
        self.unused = sys.getrefcount(self.images)

    def is_free(self) -> bool:
        """True once no tensor is left: each storage made of `images` holds one reference to it until it ends."""
        return sys.getrefcount(self.images) == self.unused


class BufferPool:
    """Batches of up to `batch_size` images, each safe to keep: memory is used again only when its last view is gone.

    Fresh memory for each batch would cost a page fault per 4 KiB, more than the gather itself.

    Args:
        batch_size: images of a whole batch.
        image_shape: (H, W, C).
        dtype: of the tensors, one of NUMPY_TYPES.
        keep: buffers to keep at least, for a caller that takes many at a time.
        reuse: hand out one and the same memory each time.
    """

    def __init__(
        self,
        batch_size: int,
        image_shape: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        keep: int = 0,
        reuse: bool = False,
    ) -> None:
        self.batch_size, self.image_shape, self.dtype, self.reuse = batch_size, image_shape, dtype, reuse
        self._kept: deque[_Buffer] = deque(maxlen=max(keep, LEAST_KEPT))

    def __len__(self) -> int:
        """Buffers that are kept, free or not."""
        return len(self._kept)

    def take(self, count: int) -> tuple[np.ndarray, torch.Tensor]:
        """The same memory twice: (count, values) to be written by a kernel, and (count, C, H, W) channels_last."""
        buffer = self._free_buffer()
        images = torch.from_numpy(buffer.images)
        if images.dtype != self.dtype:
            images = images.view(self.dtype)
        if count == self.batch_size:
            return buffer.rows, images
        return buffer.rows[:count], images[:count]

    def _free_buffer(self) -> _Buffer:
        for _ in range(len(self._kept)):
            buffer = self._kept[0]
            self._kept.rotate(-1)  # the one that was used last comes last
            if self.reuse or buffer.is_free():
                return buffer
        buffer = _Buffer(self.batch_size, self.image_shape, NUMPY_TYPES[self.dtype])
        self._kept.append(buffer)
        return buffer
