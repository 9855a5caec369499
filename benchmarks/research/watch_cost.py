"""Evidence for `fastmnist.watch`: what it takes of a step of about a millisecond, watched or not, in turn.

    python benchmarks/research/watch_cost.py --output benchmarks/results/watch_cost.json

A turn is 100 steps of a small network on batches of 32 digits. Its value is the user and system CPU seconds of this
process, which other work on the machine changes little. Ratios are of neighbouring turns. The watch looks at the system
now and then by the clock, which stands still for it while the other side has its turn.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn

import fastmnist
from fastmnist.system.environment import origin
from fastmnist.system.statistics import in_turns, ratios, summarise

TURNS, STEPS, BATCH = 251, 100, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    pairs = list(zip(images.split(BATCH), torch.tensor(digits.target).split(BATCH), strict=True))
    batches = [pairs[number % (len(pairs) - 1)] for number in range(STEPS)]  # without the partial one
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)
    )
    model(batches[0][0])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def epoch(loader: Iterable[Any]) -> Callable[[], float]:
        left = time.perf_counter()

        def turn() -> float:
            nonlocal left
            if isinstance(loader, fastmnist.watch):
                away = time.perf_counter() - left
                loader._looked += away
                loader._next_look += away
            begun = time.process_time()
            for inputs, labels in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
            used = time.process_time() - begun
            left = time.perf_counter()
            return used / STEPS

        return turn

    watch = fastmnist.watch(batches)
    plain, watched = epoch(batches), epoch(watch)
    plain(), watched()
    values = in_turns({"plain": plain, "watched": watched}, TURNS)
    ratio, again = ratios(values["watched"], values["plain"]), ratios(values["plain"][1:], values["plain"][:-1])
    result = {
        "step_cpu_seconds": summarise(values["plain"]).to_dict(),
        "watched_over_plain": ratio.to_dict(),
        "watching": watch.report().watching,  # its own account: the share of the time between a step and the next one
        "plain_over_plain": again.to_dict(),  # of one turn to the one before: the noise
        **origin(torch.device("cpu")),
    }
    print(json.dumps(result, indent=2))
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
