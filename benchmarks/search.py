"""The race of `fastmnist tune` against Optuna, on simulated machines where the truth is known.

    pip install optuna
    python benchmarks/search.py --output benchmarks/results/search.json

Each of 200 machines has its own speed for each of 16 settings of a DataLoader (workers, prefetch, persistence), which
all drift together by 20 % within some 5 s, and each value has noise of 5 % of its own. A value takes 0.25 s, opening a
loader 0.5 s, and all searches have 30 s of that. Optuna measures a trial twice and takes the median. What counts is the
true speed of the settings that are chosen, as a share of the best.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna

from fastmnist.measure import race
from fastmnist.system.statistics import summarise

MACHINES, BUDGET = 200, 30.0
VALUE_SECONDS, OPENING_SECONDS = 0.25, 0.5
DRIFT, DRIFT_SECONDS, NOISE = 0.2, 5.0, 0.05
SPACE: dict[str, list[Any]] = {"workers": [0, 1, 2, 4], "prefetch_factor": [2, 4], "persistent_workers": [False, True]}
Settings = dict[str, Any]


def without_effect(settings: Settings) -> Settings:
    return settings if settings["workers"] else settings | {"prefetch_factor": 2, "persistent_workers": False}


class Machine:
    """A clock of its own, and true speeds that are seen through drift and noise."""

    def __init__(self, seed: int) -> None:
        self.random, self.now, self.level = np.random.default_rng(seed), 0.0, 0.0
        self.of_workers = dict(zip(SPACE["workers"], 1000 * np.exp(self.random.normal(0, 0.4, 4)), strict=True))
        self.of_prefetch, self.of_persistence = np.exp(self.random.normal(0, (0.05, 0.1)))

    def speed(self, settings: Settings) -> float:
        found = without_effect(settings)
        more = self.of_prefetch if found["prefetch_factor"] == 4 else 1.0
        kept = self.of_persistence if found["persistent_workers"] else 1.0
        return float(self.of_workers[found["workers"]] * more * kept)

    def best(self) -> float:
        return max(self.speed(candidate.settings) for candidate in race.combinations(SPACE, without_effect))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        stays = np.exp(-seconds / DRIFT_SECONDS)
        self.level = stays * self.level + np.sqrt(1 - stays**2) * self.random.normal(0, DRIFT)

    def value(self, settings: Settings) -> float:
        self.pass_time(VALUE_SECONDS)
        return self.speed(settings) * float(np.exp(self.level + self.random.normal(0, NOISE)))


def by_race(machine: Machine) -> Settings:
    class Simulated(race.Running):
        """What would be measured, told by the machine."""

        def __init__(self, loader: Any, step: Any, ahead: int) -> None:
            self.settings = loader

        def begin_again(self) -> None:
            machine.pass_time(OPENING_SECONDS)

        def turn(self) -> float:
            return machine.value(self.settings)

        def close(self) -> None:
            pass

    kept = race.time, race.memory_in_use, race.Running
    race.time = SimpleNamespace(perf_counter=lambda: machine.now)
    race.memory_in_use, race.Running = (lambda: 0), Simulated
    try:
        candidates = race.combinations(SPACE, without_effect)
        return race.Racing(candidates, lambda settings: settings, None, BUDGET).race().chosen.settings
    finally:
        race.time, race.memory_in_use, race.Running = kept


def by_optuna(sampler: Callable[[int], Any]) -> Callable[[Machine, int], Settings]:
    def search(machine: Machine, seed: int) -> Settings:
        study = optuna.create_study(direction="maximize", sampler=sampler(seed))
        while machine.now < BUDGET:
            trial = study.ask()
            settings = {name: trial.suggest_categorical(name, values) for name, values in SPACE.items()}
            machine.pass_time(OPENING_SECONDS)
            study.tell(trial, statistics.median(machine.value(settings) for _ in range(2)))
        return study.best_params

    return search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    searches: dict[str, Callable[[Machine, int], Settings]] = {
        "race": lambda machine, seed: by_race(machine),
        "optuna, TPE": by_optuna(lambda seed: optuna.samplers.TPESampler(seed=seed)),
        "optuna, random": by_optuna(lambda seed: optuna.samplers.RandomSampler(seed=seed)),
    }
    result: dict[str, Any] = {"machines": MACHINES, "budget_seconds": BUDGET, "optuna": optuna.__version__}
    for name, search in searches.items():
        shares = []
        for seed in range(MACHINES):
            machine = Machine(seed)
            shares.append(machine.speed(search(machine, seed)) / machine.best())
        within = float(np.mean([share >= 0.9 for share in shares]))
        result[name] = summarise(shares).to_dict() | {"mean": statistics.mean(shares), "within_10_percent": within}
    result["date"] = datetime.now().astimezone().isoformat(timespec="seconds")
    text = json.dumps(result, indent=2)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
