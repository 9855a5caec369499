"""What is held against what: every way to load the same samples that the benchmarks compare, and how each is set up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fastmnist.baselines.loaders import LOADERS
from fastmnist.baselines.peers import PEERS
from fastmnist.beton.reader import Beton
from fastmnist.loader.epochs import Batch, EpochLoader

Kind = Literal["ours", "limit", "baseline", "peer"]


@dataclass(frozen=True)
class Side:
    """One way to load.

    name: in tables. kind: "limit" is a plain copy of memory, which no loader can beat. loader: a name of `LOADERS`
    or `PEERS`, or "copy". settings: its keyword arguments. limit: the side whose copy moves as many bytes per image.
    whole_epochs: a turn is one epoch, because beginning it costs (workers), rather than a fraction of a second.
    quick: measured by `bench --quick` too.
    """

    name: str
    kind: Kind
    loader: str
    settings: dict[str, Any] = field(default_factory=dict)
    limit: str = "memory copy, bytes"
    whole_epochs: bool = False
    quick: bool = False


LIMITS = (
    Side("memory copy, bytes", "limit", "copy", {"dtype": "uint8"}, quick=True),
    Side("memory copy, float32", "limit", "copy", {"dtype": "float32"}, limit="memory copy, float32", quick=True),
)
OURS = "fastmnist.Loader"
PLAIN = "DataLoader, plain"
SIDES: tuple[Side, ...] = (
    *LIMITS,
    Side(OURS, "ours", "ours", quick=True),
    Side(f"{OURS}, float32", "ours", "ours", {"dtype": "float32"}, limit="memory copy, float32", quick=True),
    Side("tensors, index_select", "baseline", "tensors", quick=True),
    Side("FFCV", "baseline", "ffcv"),
    Side("DataLoader, tuned", "baseline", "tuned", {"workers": 0}, quick=True),
    Side("DataLoader, tuned, 2 workers", "baseline", "tuned", {"workers": 2}),
    Side(PLAIN, "baseline", "dataloader", {"workers": 0}, limit="memory copy, float32", quick=True),
    Side(
        "DataLoader, plain, 2 workers",
        "baseline",
        "dataloader",
        {"workers": 2},
        limit="memory copy, float32",
        whole_epochs=True,
    ),
    *(Side(peer.title, "peer", name, {"workers": peer.workers_advised}) for name, peer in PEERS.items()),
)
BY_NAME = {side.name: side for side in SIDES}


class Source:
    """A side that is open: its epochs, one after the other."""

    def __init__(
        self, side: Side, data: Path, batch_size: int, device: torch.device, folder: Path, seed: int = 0
    ) -> None:
        self.device, self._epoch, self._loader = device, 0, None
        settings = dict(side.settings)
        self._make: Any
        if side.kind == "limit":
            self._make = self._copies(data, getattr(torch, settings["dtype"]))
        elif side.kind == "peer":
            peer = PEERS[side.loader]()
            self._make = lambda epoch: peer.epoch(folder, batch_size, epoch, seed, settings["workers"])
        else:
            if "dtype" in settings:
                settings["dtype"] = getattr(torch, settings["dtype"])
            loader: EpochLoader = LOADERS[side.loader](
                data, batch_size, seed=seed, device=device, rank=0, world_size=1, **settings
            )
            self._loader = loader
            self._make = lambda epoch: iter(loader)

    def epoch(self) -> Iterator[Batch]:
        """The next epoch's batches, on the device."""
        batches: Iterator[Batch] = self._make(self._epoch)
        self._epoch += 1
        if self.device.type == "cpu" or self._loader is not None:
            return batches
        return ((images.to(self.device), labels.to(self.device)) for images, labels in batches)

    def stream(self) -> Iterator[Batch]:
        """Epoch after epoch, for ever."""
        while True:
            yield from self.epoch()

    def _copies(self, data: Path, dtype: torch.dtype) -> Any:
        """An epoch is one `copy_` of all images, as one batch: the least that handing them out can cost."""
        with Beton(data) as file:
            images = torch.from_numpy(file.images(np.arange(len(file)))).to(self.device, dtype)
            labels = torch.from_numpy(file.labels.copy())
        target = torch.empty_like(images)

        def epoch(number: int) -> Iterator[Batch]:
            target.copy_(images)
            yield target, labels

        return epoch

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()


def write_for_peer(side: Side, data: Path, folder: Path) -> None:
    """The samples of a compiled file in the peer's own format, in an empty folder."""
    with Beton(data) as file:
        images, labels = file.images(np.arange(len(file))), file.labels.copy()
    PEERS[side.loader]().write(images, labels, folder)
