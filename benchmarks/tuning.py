"""What `tune` chooses against an exhaustive search: is it within 10 % of the best?

    python benchmarks/tuning.py --data-dir FOLDER --output benchmarks/results/tuning.json

Two cases: the tuned DataLoader over MNIST, in memory, where worker processes only cost; and a DataLoader over a slow
source (2 ms of sleep for each sample), where each worker helps. Each is tuned with a budget of 30 s; then all
combinations are open side by side and measured in turn, eight times. The figure is the rate there of the settings that
were chosen, over that of the fastest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from common import arguments, report
from torch.utils.data import DataLoader, Dataset

from fastmnist.baselines.workers import of_workers
from fastmnist.config import TrainConfig
from fastmnist.measure.loops import training_setup
from fastmnist.measure.race import Candidate, Running, Settings, combinations
from fastmnist.measure.tune import Tuning, make_loader, simplest, space_of, tune, tune_loader
from fastmnist.system.progress import Reporter
from fastmnist.system.statistics import in_turns, ratios, summarise

TURNS, BUDGET = 8, 30.0
SLOW: dict[str, list[Any]] = {"num_workers": [0, 1, 2, 4, 8], "prefetch_factor": [2, 4]}


class SlowSource(Dataset[Any]):
    """Each sample takes two milliseconds of waiting, as a network or a cold disk makes one wait."""

    def __len__(self) -> int:
        return 6400

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        time.sleep(0.002)
        return torch.full((1, 28, 28), index % 256, dtype=torch.uint8), index % 10


def slow_loader(num_workers: int, prefetch_factor: int) -> DataLoader[Any]:
    ahead = {"prefetch_factor": prefetch_factor, "persistent_workers": True} if num_workers else {}
    return DataLoader(SlowSource(), 64, **of_workers(num_workers), **ahead)


def without_effect(settings: Settings) -> Settings:
    return settings if settings["num_workers"] else settings | {"prefetch_factor": 2}


def exhaustive(candidates: list[Candidate], make: Callable[[Settings], Iterable[Any]]) -> dict[str, list[float]]:
    """Images/s of all, in turn."""
    open_ones = {}
    for candidate in candidates:
        workers = candidate.settings.get("num_workers", candidate.settings.get("workers")) or 0
        running = Running(make(candidate.settings), None, workers * candidate.settings["prefetch_factor"])
        running.begin_again()
        open_ones[candidate.name] = running
    try:
        return in_turns({name: running.turn for name, running in open_ones.items()}, TURNS)
    finally:
        for running in open_ones.values():
            running.close()


def judged(found: Tuning, candidates: list[Candidate], make: Callable[[Settings], Iterable[Any]]) -> dict[str, Any]:
    rates = exhaustive(candidates, make)
    best = max(rates, key=lambda name: summarise(rates[name]).median)
    chosen = found.race.chosen.name
    result = {
        "chosen": chosen,
        "settings": found.settings,
        "best_of_exhaustive_search": best,
        "chosen_over_best": ratios(rates[chosen], rates[best]).to_dict(),
        "images_per_second": {name: summarise(values).to_dict() for name, values in rates.items()},
        "seconds": found.race.seconds,
    }
    print(f"{chosen}: {result['chosen_over_best']['median']:.3f} of {best}", flush=True)
    return result


def main() -> None:
    options = arguments(__doc__).parse_args()
    folder: Path = options.data_dir
    config = TrainConfig(dataset="mnist", data_dir=str(folder), device="cpu", batch_size=512, quiet=True)
    result = {}
    found = tune(config, loader="tuned", budget=BUDGET, loader_only=True)
    with training_setup(config, Reporter(quiet=True)) as setup:
        space = space_of("tuned", setup.device, [config.batch_size], [config.order])
        candidates = combinations(space, lambda settings: simplest(settings, "stream"))
        result["tuned DataLoader"] = judged(found, candidates, lambda settings: make_loader(setup, settings))
    found = tune_loader(slow_loader, SLOW, budget=BUDGET, same_as=without_effect)
    candidates = combinations(SLOW, without_effect)
    result["slow source"] = judged(found, candidates, lambda settings: slow_loader(**settings))
    report(result, options.output)


if __name__ == "__main__":
    main()
