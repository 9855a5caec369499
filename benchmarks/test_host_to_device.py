"""An epoch streamed to a GPU, without a model, against copies of one pinned batch."""

from __future__ import annotations

import pytest
import torch

from fastmnist.loader.loader import Loader
from fastmnist.measure.step import fixed_batch_seconds
from fastmnist.system.machine import synchronize


@pytest.mark.gpu
@pytest.mark.benchmark(group="host to device")
@pytest.mark.parametrize("batch_size", [512, 2048, 8192], ids=lambda size: f"fastmnist.Loader, batch {size}")
def test_stream(batch_size, data, device, measure):
    with Loader(data.path, batch_size, device=device, placement="stream", drop_last=True) as loader:
        images = len(loader) * batch_size
        pinned = torch.empty((batch_size, loader.file.image_size), dtype=torch.uint8, pin_memory=device.type == "cuda")
        target = torch.empty_like(pinned, device=device)

        def copy(batch: torch.Tensor) -> None:
            target.copy_(batch, non_blocking=True)

        def copies(images: int) -> float:
            count = images // batch_size
            return count * fixed_batch_seconds(
                lambda batch: target.copy_(batch, non_blocking=True), pinned, count, device
            )

        def stream() -> None:
            for _ in loader:
                pass
            synchronize(device)

        settings = {"batch_size": batch_size, "placement": "stream"}
        measure(stream, images=images, limit=copies, warm_up=2, settings=settings)
