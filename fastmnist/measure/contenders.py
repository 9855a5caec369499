"""Contenders of the loader comparison: ours, baselines, peers, and the limit that memory sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
class Contender:
    """One way to load the same samples.

    name: in tables.
    kind: "limit" is a plain copy of memory, which no loader can beat.
    loader: a name of `LOADERS` or `PEERS`, or "copy".
    settings: its keyword arguments.
    limit: the name of the copy that moves as many bytes per image.
    whole_epochs: a turn is one epoch, not a fraction of a second, because starting an epoch costs (workers).
    quick: in `bench --quick` too.
    """

    name: str
    kind: Kind
    loader: str
    settings: dict[str, Any] = field(default_factory=dict)
    limit: str = "memory copy, bytes"
    whole_epochs: bool = False
    quick: bool = False


LIMITS = (
    Contender("memory copy, bytes", "limit", "copy", {"dtype": "uint8"}, quick=True),
    Contender("memory copy, float32", "limit", "copy", {"dtype": "float32"}, limit="memory copy, float32", quick=True),
)
OURS = "fastmnist.Loader"
PLAIN = "DataLoader, plain"
CONTENDERS: tuple[Contender, ...] = (
    *LIMITS,
    Contender(OURS, "ours", "ours", quick=True),
    Contender(f"{OURS}, float32", "ours", "ours", {"dtype": "float32"}, limit="memory copy, float32", quick=True),
    Contender("tensors, index_select", "baseline", "tensors", quick=True),
    Contender("FFCV", "baseline", "ffcv"),
    Contender("DataLoader, tuned", "baseline", "tuned", {"workers": 0}, quick=True),
    Contender("DataLoader, tuned, 2 workers", "baseline", "tuned", {"workers": 2}),
    Contender(PLAIN, "baseline", "dataloader", {"workers": 0}, limit="memory copy, float32", quick=True),
    Contender(
        "DataLoader, plain, 2 workers",
        "baseline",
        "dataloader",
        {"workers": 2},
        limit="memory copy, float32",
        whole_epochs=True,
    ),
    *(Contender(peer.title, "peer", name, {"workers": peer.workers_advised}) for name, peer in PEERS.items()),
)
BY_NAME = {contender.name: contender for contender in CONTENDERS}


def memory_copy(images: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A function that copies the images to the same place each time: the least that handing them out can cost."""
    target = torch.empty_like(images)
    return lambda: target.copy_(images)


class Source:
    """An open contender: its epochs, one after the other."""

    def __init__(
        self, contender: Contender, data: Path, batch_size: int, device: torch.device, folder: Path, seed: int = 0
    ) -> None:
        self.device, self._epoch, self._loader = device, 0, None
        settings = dict(contender.settings)
        self._make: Any
        if contender.kind == "limit":
            self._make = self._copies(data, getattr(torch, settings["dtype"]))
        elif contender.kind == "peer":
            peer = PEERS[contender.loader]()
            self._make = lambda epoch: peer.epoch(folder, batch_size, epoch, seed, settings["workers"])
        else:
            if "dtype" in settings:
                settings["dtype"] = getattr(torch, settings["dtype"])
            if "dtype" in settings or contender.loader == "dataloader":  # of floats
                settings["moments"] = data
            loader: EpochLoader = LOADERS[contender.loader](
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
        """Batches without an end."""
        while True:
            yield from self.epoch()

    def _copies(self, data: Path, dtype: torch.dtype) -> Any:
        """Epochs of one batch each, a copy of all images."""
        with Beton(data) as file:
            copy = memory_copy(torch.from_numpy(file.images(np.arange(len(file)))).to(self.device, dtype))
            labels = torch.from_numpy(file.labels.copy())
        return lambda epoch: ((copy(), labels) for _ in range(1))

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()
