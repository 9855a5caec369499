"""Device memory: batches copied there ahead of the consumer, or gathered from images that are resident there."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch

from fastmnist.loader.augment import Augmentation
from fastmnist.loader.host import Batch, HostGatherer, Part, SampleCopy
from fastmnist.loader.normalise import Moments, Normaliser


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """`array` as a tensor on `device`; a GPU receives it in the order of its stream, and the host does not wait."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Finish:
    """The last steps, on the device: stored bytes to images of `dtype`, augmented and normalised.

    Args:
        shape: (H, W, C) of an image.
        moments: to normalise with; needed for a float dtype.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        augment: Augmentation | None,
        device: torch.device,
        moments: Moments | None = None,
    ) -> None:
        self._shape, self._dtype, self._augment, self._device = shape, dtype, augment, device
        if moments is not None:
            self._normalise = Normaliser(*moments, device)

    def __call__(self, pixels: torch.Tensor, draws: np.ndarray | None) -> torch.Tensor:
        """(B, H * W * C) uint8 and draws (B, 4 or 5) float32 to (B, C, H, W) channels_last."""
        images = pixels.view(-1, *self._shape).permute(0, 3, 1, 2)
        if self._dtype == torch.uint8:
            return images
        if self._augment is not None and draws is not None:
            matrices = on_device(self._augment.matrices(draws, self._shape[:2]), self._device)
            images = self._augment.on_device(images.to(torch.float32), matrices)
            images = images.contiguous(memory_format=torch.channels_last)
        return self._normalise(images, self._dtype)


class DeviceGatherer:
    """Batches gathered on the device, where copies of all images and labels are resident."""

    lag = 0  # nothing is gathered later

    def __init__(self, copy: SampleCopy, finish: Finish, device: torch.device, batch_size: int) -> None:
        self._images, self._labels = torch.from_numpy(copy.images).to(device), torch.from_numpy(copy.labels).to(device)
        self._places, self._finish, self._device, self._batch_size = copy.places, finish, device, batch_size

    def batches(self, parts: Iterator[Part], size: int = 0) -> Iterator[Batch]:
        """Batches of `size` images, or of batch_size."""
        size = size or self._batch_size
        for part in parts:
            places = on_device(self._places[part.rows], self._device)
            for start in range(0, len(places), size):
                chosen = slice(start, start + size)
                images = self._images.index_select(0, places[chosen])
                draws = None if part.draws is None else part.draws[chosen]
                yield self._finish(images, draws), self._labels.index_select(0, places[chosen])

    def close(self) -> None:
        """Releases the resident copies."""
        self._images = self._labels = torch.empty(0, device="cpu")


class PinnedCopier:
    """Batches gathered into page-locked memory and copied to a CUDA device on a stream of their own.

    No thread is needed: to gather a batch takes far less than a training step, which runs without the host.

    Attributes:
        lag: as of `HostGatherer`.

    Args:
        host: gathers bytes.
        finish: what is left to do on the device.
        image_size: bytes of an image.
        prefetch: batches under way while the consumer works on one.
    """

    def __init__(
        self,
        host: HostGatherer,
        finish: Finish,
        device: torch.device,
        *,
        batch_size: int,
        image_size: int,
        prefetch: int,
    ) -> None:
        self._host, self._finish, self._device = host, finish, device
        self._batch_size, self._image_size, self._prefetch = batch_size, image_size, prefetch
        self.lag = host.lag

    def batches(self, parts: Iterator[Part]) -> Iterator[Batch]:
        copies = torch.cuda.Stream(self._device)
        slots = deque(_PinnedSlot(self._batch_size, self._image_size) for _ in range(self._prefetch + 2))
        under_way: deque[tuple[torch.Tensor, torch.Tensor, torch.cuda.Event]] = deque()
        for batch in (batch for part in parts for batch in part.split(self._batch_size)):
            slot = slots[0]
            slots.rotate(-1)
            slot.copied.synchronize()  # its previous copy, long since done
            count = len(batch.rows)
            self._host.gather_into(batch, slot.images.numpy()[:count], slot.labels.numpy()[:count])
            # The consumer of these batches comes later, and may not be in inference mode then.
            with torch.inference_mode(False), torch.cuda.stream(copies):
                images = self._finish(slot.images[:count].to(self._device, non_blocking=True), batch.draws)
                labels = slot.labels[:count].to(self._device, non_blocking=True)
                slot.copied.record(copies)
            under_way.append((images, labels, slot.copied))
            if len(under_way) > self._prefetch:
                yield self._hand_over(*under_way.popleft())
        while under_way:
            yield self._hand_over(*under_way.popleft())

    def _hand_over(self, images: torch.Tensor, labels: torch.Tensor, copied: torch.cuda.Event) -> Batch:
        consumer = torch.cuda.current_stream(self._device)
        consumer.wait_event(copied)
        images.record_stream(consumer)  # keeps their memory from reuse until the consumer's work is done
        labels.record_stream(consumer)
        return images, labels

    def close(self) -> None:
        self._host.close()


class _PinnedSlot:
    """Page-locked host memory for one batch, and the event after its copy."""

    def __init__(self, batch_size: int, image_size: int) -> None:
        self.images = torch.empty((batch_size, image_size), dtype=torch.uint8, device="cpu", pin_memory=True)
        self.labels = torch.empty(batch_size, dtype=torch.int64, device="cpu", pin_memory=True)
        self.copied = torch.cuda.Event()


class PlainCopier:
    """Batches gathered on the host and copied to a device other than CPU and CUDA."""

    def __init__(self, host: HostGatherer, finish: Finish, device: torch.device) -> None:
        self._host, self._finish, self._device = host, finish, device
        self.lag = host.lag

    def batches(self, parts: Iterator[Part]) -> Iterator[Batch]:
        for part in parts:
            start = 0
            for images, labels in self._host.batches(iter([part])):
                draws = None if part.draws is None else part.draws[start : start + len(labels)]
                pixels = images.permute(0, 2, 3, 1).reshape(len(labels), -1).to(self._device)
                yield self._finish(pixels, draws), labels.to(self._device)
                start += len(labels)

    def close(self) -> None:
        self._host.close()
