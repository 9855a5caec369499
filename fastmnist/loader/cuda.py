"""From host memory to a GPU: gathered into pinned memory, copied on a stream of its own, ahead of the consumer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch

from fastmnist.loader.epochs import Batch
from fastmnist.loader.gathering import Part


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """`array` there; a GPU gets it in the order of its work, and nothing waits for that."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class _PinnedSlot:
    """Page-locked host memory for one batch, and the event that tells when its copy is done."""

    def __init__(self, batch_size: int, image_size: int) -> None:
        self.images = torch.empty((batch_size, image_size), dtype=torch.uint8, device="cpu", pin_memory=True)
        self.labels = torch.empty(batch_size, dtype=torch.int64, device="cpu", pin_memory=True)
        self.copied = torch.cuda.Event()


def copied_batches(
    parts: Iterator[Part],
    fill: Callable[[Part, np.ndarray, np.ndarray], None],
    finish: Callable[[torch.Tensor, np.ndarray | None], torch.Tensor],
    size: tuple[int, int],
    device: torch.device,
    prefetch: int,
) -> Iterator[Batch]:
    """Batches on a CUDA device, `prefetch` of them on their way while the consumer works on one.

    No thread is needed: gathering a batch takes far less than a training step, which runs without the host.

    Args:
        parts: one for each batch.
        fill: (part, images (B, bytes) uint8, labels (B,) int64): gathers into pinned memory.
        finish: the copied bytes (B, bytes) uint8 and the part's draws to what is handed out, on the device.
        size: (B, bytes) of a whole batch.
    """
    copies = torch.cuda.Stream(device)
    slots = deque(_PinnedSlot(*size) for _ in range(prefetch + 2))
    ahead: deque[tuple[torch.Tensor, torch.Tensor, torch.cuda.Event]] = deque()
    for part in parts:
        slot = slots[0]
        slots.rotate(-1)
        slot.copied.synchronize()  # its previous copy, long since done
        count = len(part.rows)
        fill(part, slot.images.numpy()[:count], slot.labels.numpy()[:count])
        # Made now for a consumer to come: whether it is in inference mode by then is not known.
        with torch.inference_mode(False), torch.cuda.stream(copies):
            images = finish(slot.images[:count].to(device, non_blocking=True), part.draws)
            labels = slot.labels[:count].to(device, non_blocking=True)
            slot.copied.record(copies)
        ahead.append((images, labels, slot.copied))
        if len(ahead) > prefetch:
            yield _hand_over(*ahead.popleft(), device)
    while ahead:
        yield _hand_over(*ahead.popleft(), device)


def _hand_over(images: torch.Tensor, labels: torch.Tensor, copied: torch.cuda.Event, device: torch.device) -> Batch:
    consumer = torch.cuda.current_stream(device)
    consumer.wait_event(copied)
    images.record_stream(consumer)  # their memory is not used again before the consumer's work is done
    labels.record_stream(consumer)
    return images, labels
