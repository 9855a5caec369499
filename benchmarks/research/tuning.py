"""The choice of `fastmnist tune` against an exhaustive search.

    python benchmarks/research/tuning.py --data-dir FOLDER --output benchmarks/results/tuning.json

Evidence for the tuner's search: with a budget of 30 s it must choose settings within 10 % of the best. Two planted
cases: the tuned DataLoader over MNIST in memory, where worker processes only cost; and a DataLoader over a slow source
(2 ms of sleep per sample), where each worker helps. After tuning, all combinations are open side by side and measured
in turn, eight times: `of_best` is the chosen settings' rate over that of the fastest.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from fastmnist.baselines.workers import worker_settings
from fastmnist.config import TrainConfig
from fastmnist.files import write_json
from fastmnist.measure.halving import Candidate, OpenLoader, Settings, combinations
from fastmnist.measure.step import training_setup
from fastmnist.measure.tune import Tuning, make_loader, simplest, space_of, tune, tune_loader
from fastmnist.system.environment import origin
from fastmnist.system.progress import Reporter
from fastmnist.system.statistics import in_turns, ratios, row, summarise

TURNS, BUDGET = 8, 30.0
SLOW: dict[str, list[Any]] = {"num_workers": [0, 1, 2, 4, 8], "prefetch_factor": [2, 4]}


class SlowSource(Dataset[Any]):
    """Samples that take 2 ms of waiting each, as from a network or a cold disk."""

    def __len__(self) -> int:
        return 6400

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        time.sleep(0.002)
        return torch.full((1, 28, 28), index % 256, dtype=torch.uint8), index % 10


def slow_loader(num_workers: int, prefetch_factor: int) -> DataLoader[Any]:
    ahead = {"prefetch_factor": prefetch_factor, "persistent_workers": True} if num_workers else {}
    return DataLoader(SlowSource(), 64, **worker_settings(num_workers), **ahead)


def without_effect(settings: Settings) -> Settings:
    return settings if settings["num_workers"] else settings | {"prefetch_factor": 2}


def exhaustive(candidates: list[Candidate], make: Callable[[Settings], Iterable[Any]]) -> dict[str, list[float]]:
    """Images/s of all, in turn."""
    open_ones = {}
    for candidate in candidates:
        workers = candidate.settings.get("num_workers", candidate.settings.get("workers")) or 0
        running = OpenLoader(make(candidate.settings), None, workers * candidate.settings["prefetch_factor"])
        running.warm_up()
        open_ones[candidate.name] = running
    try:
        return in_turns({name: running.turn for name, running in open_ones.items()}, TURNS)
    finally:
        for running in open_ones.values():
            running.close()


def judged(
    name: str, found: Tuning, candidates: list[Candidate], make: Callable[[Settings], Iterable[Any]]
) -> list[dict[str, Any]]:
    """A row per candidate; that of the chosen one has `of_best`."""
    rates, where, chosen = exhaustive(candidates, make), origin(torch.device("cpu")), found.search.chosen.name
    best = max(rates, key=lambda candidate: summarise(rates[candidate]).median)
    of_best = ratios(rates[chosen], rates[best]).to_dict()
    print(f"{name}: {chosen} is {of_best['median']:.3f} of {best}", flush=True)
    more = {chosen: {"of_best": of_best, "tuned_in_seconds": found.search.seconds}}
    return [
        row(f"tuning, {name}", candidate, values, "images/s", where, {"budget": BUDGET}, **more.get(candidate, {}))
        for candidate, values in rates.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with MNIST's four IDX files")
    parser.add_argument("--output", required=True, help="JSON file for the rows")
    options = parser.parse_args()
    config = TrainConfig(dataset="mnist", data_dir=options.data_dir, device="cpu", batch_size=512, quiet=True)
    found = tune(config, loader="tuned", budget=BUDGET, loader_only=True)
    with training_setup(config, Reporter(quiet=True)) as setup:
        space = space_of("tuned", setup.device, [config.batch_size], [config.order])
        candidates = combinations(space, lambda settings: simplest(settings, "stream", setup.device))
        rows = judged("tuned DataLoader", found, candidates, lambda settings: make_loader(setup, settings))
    found = tune_loader(slow_loader, SLOW, budget=BUDGET, same_as=without_effect)
    rows += judged("slow source", found, combinations(SLOW, without_effect), lambda settings: slow_loader(**settings))
    write_json(options.output, {"rows": rows})


if __name__ == "__main__":
    main()
