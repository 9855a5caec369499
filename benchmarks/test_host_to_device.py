"""What the Loader moves to a GPU in "stream", an epoch without a model, against copies from one pinned buffer."""

from __future__ import annotations

import time

import pytest
import torch

from fastmnist.loader.loader import Loader


@pytest.mark.gpu
@pytest.mark.benchmark(group="host to device")
@pytest.mark.parametrize("batch_size", [512, 2048, 8192], ids=lambda size: f"fastmnist.Loader, batch {size}")
def test_stream(batch_size, data, device, measure):
    with Loader(data.path, batch_size, device=device, placement="stream", drop_last=True) as loader:
        images = len(loader) * batch_size
        pinned = torch.empty((batch_size, loader.file.image_size), dtype=torch.uint8, pin_memory=device.type == "cuda")
        target = torch.empty_like(pinned, device=device)

        def synchronised() -> float:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter()

        def copies(number: int) -> float:
            begun = synchronised()
            for _ in range(number // batch_size):
                target.copy_(pinned, non_blocking=True)
            return synchronised() - begun

        def stream() -> None:
            for _ in loader:
                pass
            synchronised()

        settings = {"batch_size": batch_size, "placement": "stream"}
        measure(stream, images=images, limit=copies, warm_up=2, settings=settings)
