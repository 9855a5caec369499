"""Evidence that `fastmnist tune` searches by successive halving: against Optuna, on simulated machines.

    pip install optuna
    python benchmarks/research/search.py --output benchmarks/results/search.json

Each of 200 machines has a speed of its own for each combination of settings, of a DataLoader (13: workers, prefetch,
persistence) or of a streaming loader (48: placement, threads, prefetch), more than the budget allows to try. All speeds
drift together by 20 % within some 5 s, and each measurement has noise of 5 %. A measurement takes 0.25 s, opening a
loader 0.5 s; each search has 30 s. Optuna measures a trial twice and takes the median. The result is the true speed of
the chosen settings, as a share of the best.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import optuna

from fastmnist.measure import halving
from fastmnist.system import statistics as clock

MACHINES, BUDGET = 200, 30.0
VALUE_SECONDS, OPENING_SECONDS = 0.25, 0.5
DRIFT, DRIFT_SECONDS, NOISE = 0.2, 5.0, 0.05
Settings = dict[str, Any]
Spread = dict[str, tuple[list[Any], float]]  # the values of each setting, and the standard deviation of log(speed)
SPACES: dict[str, Spread] = {
    "DataLoader": {
        "workers": ([0, 1, 2, 4], 0.4),
        "prefetch_factor": ([2, 4], 0.05),
        "persistent_workers": ([False, True], 0.1),
    },
    "streaming loader": {
        "placement": (["auto", "resident", "stream"], 0.4),
        "threads": ([0, 1, 2, 4], 0.2),
        "prefetch": ([3, 1, 2, 8], 0.1),
    },
}


def without_effect(settings: Settings) -> Settings:
    """Without workers nothing is prefetched, and no worker persists."""
    return settings if settings.get("workers", 1) else settings | {"prefetch_factor": 2, "persistent_workers": False}


def values_of(spread: Spread) -> dict[str, list[Any]]:
    return {name: values for name, (values, _) in spread.items()}


class Machine:
    """A clock of its own, and true speeds that are seen through drift and noise."""

    def __init__(self, seed: int, spread: Spread) -> None:
        self.random, self.now, self.level = np.random.default_rng(seed), 0.0, 0.0
        self.space = values_of(spread)
        self.factors: dict[str, dict[Any, float]] = {}
        for name, (values, sigma) in spread.items():
            known = [1.0] if self.factors else []  # all but the first setting change the speed of their first value
            drawn = np.exp(self.random.normal(0, sigma, len(values) - len(known)))
            self.factors[name] = dict(zip(values, [*known, *drawn], strict=True))

    def speed(self, settings: Settings) -> float:
        same = without_effect(settings)
        return 1000 * float(np.prod([factors[same[name]] for name, factors in self.factors.items()]))

    def candidates(self) -> list[halving.Candidate]:
        return halving.combinations(self.space, without_effect)

    def best(self) -> float:
        return max(self.speed(candidate.settings) for candidate in self.candidates())

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        stays = np.exp(-seconds / DRIFT_SECONDS)
        self.level = stays * self.level + np.sqrt(1 - stays**2) * self.random.normal(0, DRIFT)

    def value(self, settings: Settings) -> float:
        self.pass_time(VALUE_SECONDS)
        return self.speed(settings) * float(np.exp(self.level + self.random.normal(0, NOISE)))


def by_halving(machine: Machine) -> Settings:
    class Simulated(halving.OpenLoader):
        """Rates told by the machine."""

        def __init__(self, loader: Any, step: Any, ahead: int) -> None:
            self.settings = loader

        def warm_up(self) -> None:
            machine.pass_time(OPENING_SECONDS)

        def turn(self) -> float:
            return machine.value(self.settings)

        def close(self) -> None:
            pass

    simulated = SimpleNamespace(perf_counter=lambda: machine.now)
    with (
        patch.object(halving, "time", simulated),
        patch.object(clock, "time", simulated),
        patch.object(halving, "memory_in_use", lambda: 0),
        patch.object(halving, "OpenLoader", Simulated),
    ):
        return halving.Halving(machine.candidates(), lambda settings: settings, None, BUDGET).run().chosen.settings


def by_optuna(sampler: Callable[[int], Any]) -> Callable[[Machine, int], Settings]:
    def search(machine: Machine, seed: int) -> Settings:
        study = optuna.create_study(direction="maximize", sampler=sampler(seed))
        while machine.now < BUDGET:
            trial = study.ask()
            settings = {name: trial.suggest_categorical(name, values) for name, values in machine.space.items()}
            machine.pass_time(OPENING_SECONDS)
            study.tell(trial, float(np.median([machine.value(settings) for _ in range(2)])))
        return study.best_params

    return search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    searches: dict[str, Callable[[Machine, int], Settings]] = {
        "halving": lambda machine, seed: by_halving(machine),
        "optuna, TPE": by_optuna(lambda seed: optuna.samplers.TPESampler(seed=seed)),
        "optuna, random": by_optuna(lambda seed: optuna.samplers.RandomSampler(seed=seed)),
    }
    result: dict[str, Any] = {"machines": MACHINES, "budget_seconds": BUDGET, "optuna": optuna.__version__}
    for what, spread in SPACES.items():
        result[what] = {"settings": len(Machine(0, spread).candidates())}
        for name, search in searches.items():
            shares = []
            for seed in range(MACHINES):
                machine = Machine(seed, spread)
                shares.append(machine.speed(search(machine, seed)) / machine.best())
            within = float(np.mean([share >= 0.9 for share in shares]))
            summary = clock.summarise(shares).to_dict() | {"mean": float(np.mean(shares)), "within_10_percent": within}
            result[what][name] = summary
    result["date"] = datetime.now().astimezone().isoformat(timespec="seconds")
    text = json.dumps(result, indent=2)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
