"""One of several processes under torchrun: what test_parallel.py compares with a single process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fastmnist.config import TrainConfig
from fastmnist.errors import ConfigError, FastmnistError
from fastmnist.loader.loader import Loader
from fastmnist.system import processes
from fastmnist.system.processes import process_group, rank, world_size
from fastmnist.system.progress import Reporter
from fastmnist.training.parallel import SharedBatchNorm, distribute, share_batch_norm
from fastmnist.training.session import Session

BATCH = 24
Found = dict[str, Any]


def learned(path: Path) -> Found:
    """Weights of a float64 network with shared batch normalisation, after two epochs of a plain loop over it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(144, 16),
        nn.BatchNorm1d(16),
        nn.Linear(16, 10),
    ).double()
    share_batch_norm(model)
    assert [at for at, layer in enumerate(model) if isinstance(layer, SharedBatchNorm)] == [1, 5]
    network = distribute(model, torch.device("cpu"), compress=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with Loader(path, BATCH // world_size(), device="cpu", drop_last=True, seed=5) as loader:
        for _ in range(2):
            for images, labels in loader:
                optimizer.zero_grad()
                functional.cross_entropy(network(images.double() / 255), labels).backward()
                optimizer.step()
    return {name: value.double().flatten().tolist() for name, value in model.state_dict().items()}


def digits(cache: Path, **settings: Any) -> TrainConfig:
    """A quick run in float32."""
    return TrainConfig(dataset="digits", model="small-cnn", amp="off", cache_dir=str(cache), device="cpu", **settings)


def trained(cache: Path, **settings: Any) -> Found:
    """Losses, evaluation and position of a run of one epoch."""
    with Session(digits(cache, epochs=1, **settings), Reporter(quiet=True)) as session:
        losses: list[float] = []
        record = session.trainer.run_epoch(on_log=lambda record: losses.append(record["loss"]))
        assert record is not None
        evaluation = session.evaluate(session.loaders.test)
        return {
            "steps": session.trainer.steps,
            "losses": losses,
            "accuracy": record["train_accuracy"],
            "logits": evaluation.probabilities.astype(float).round(12).tolist(),
            "labels": evaluation.labels.tolist(),
            "test": [evaluation.accuracy, evaluation.loss],
            "position": session.trainer.state_dict()["loader"]["position"],
        }


def stopped(cache: Path) -> Found:
    """The step after which an epoch ends that process 1 alone asks to stop."""
    with Session(digits(cache), Reporter(quiet=True)) as session:
        trainer = session.trainer
        assert trainer.run_epoch(stop=lambda: rank() == world_size() - 1 and trainer.step == 2) is None
        return {"step": trainer.step}


def diverged(cache: Path) -> Found:
    """The step at which training ends whose loss is no longer finite; process 1 alone asks for ticks."""
    with Session(digits(cache, learning_rate=1e30, warmup=0.01), Reporter(quiet=True)) as session:
        try:
            session.trainer.run_epoch(tick_seconds=0.0 if rank() else 1e9)
        except FastmnistError:
            return {"step": session.trainer.step}
    return {"step": None}


def refused(cache: Path) -> Found:
    """Errors of settings with which several processes cannot train."""

    def error(**settings: Any) -> str:
        try:
            with Session(digits(cache, **settings), Reporter(quiet=True)):
                return ""
        except FastmnistError as error:
            return f"{type(error).__name__} {error}"

    return {
        "batch_size": error(batch_size=BATCH + 1),
        "seed": error(seed=rank()),
        "compile": error(compile="default"),
        "one_image_each": error(batch_size=2),
    }


def exchanged() -> Found:
    mean = torch.tensor([float(rank()), 3.0])
    processes.average(mean)
    try:
        processes.check_agreement({"number": 7, "setting": {"a": 1, "b": rank()}})
        differs = ""
    except ConfigError as error:
        differs = str(error)
    return {
        "gathered": processes.gather({"rank": rank()}),
        "broadcast": processes.broadcast(f"from {rank()}"),
        "mean": mean.tolist(),
        "differs": differs,
        "threads": torch.get_num_threads(),
        "backend": processes.backend(),
    }


def everything(path: Path, cache: Path) -> Found:
    return {
        "learned": learned(path),
        "plain": trained(cache),
        "shared": trained(cache, sync_batchnorm=True),
        "compressed": trained(cache, compress_gradients=True),
        "stopped": stopped(cache),
        "diverged": diverged(cache),
        "refused": refused(cache),
        "exchanged": exchanged(),
    }


if __name__ == "__main__":
    beton, folder, output = map(Path, sys.argv[1:])
    with process_group("cpu", minutes=2):
        (output / f"{rank()}.json").write_text(json.dumps(everything(beton, folder)))
