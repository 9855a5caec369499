"""All loaders behind the interface of `Loader`, so that whole runs can be compared."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch

from fastmnist.baselines.dataloaders import Baseline, Data, PlainDataLoader, TunedDataLoader
from fastmnist.baselines.ffcv_loader import FFCVLoader
from fastmnist.loader.epochs import Batch, EpochLoader
from fastmnist.loader.host import SampleCopy
from fastmnist.loader.loader import Loader
from fastmnist.loader.order import EpochPlan

__all__ = ["LOADERS", "FFCVLoader", "PlainDataLoader", "TensorLoader", "TunedDataLoader"]


class TensorLoader(Baseline):
    """All images as one tensor on the device, indexed with slices of the epoch's permutation.

    Args:
        data, batch_size, common: as for `Loader`, without `dtype` and `augment`.

    Yields:
        images uint8: the batches of `Loader`, in the same order.
    """

    def __init__(self, data: Data, batch_size: int = 512, **common: Any) -> None:
        super().__init__(data, batch_size, **common)
        copy = SampleCopy(self.file, self.indices)
        self._images = torch.from_numpy(copy.images).view(-1, *self.file.image_shape).to(self.device)
        self._labels, self._places = torch.from_numpy(copy.labels).to(self.device), copy.places

    def _run(self, plan: EpochPlan, first: int) -> Generator[Batch]:
        places = torch.from_numpy(self._places[plan.rows[: self._taken(plan)]]).to(self.device)
        for at in range(first * self.batch_size, len(places), self.batch_size):
            chosen = places[at : at + self.batch_size]
            yield self._images.index_select(0, chosen).permute(0, 3, 1, 2), self._labels.index_select(0, chosen)

    def close(self) -> None:
        super().close()
        self._images = self._labels = torch.empty(0, device="cpu")


LOADERS: dict[str, type[EpochLoader]] = {
    "ours": Loader,
    "ffcv": FFCVLoader,
    "dataloader": PlainDataLoader,
    "tuned": TunedDataLoader,
    "tensors": TensorLoader,
}
