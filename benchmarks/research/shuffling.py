"""Distance of the quasi-random order from a uniform shuffle.

    python benchmarks/research/shuffling.py --output benchmarks/results/shuffling.json

Evidence for shuffling files larger than memory by windows of 32 pages of 2 MiB (loader/order.py). For files of 60,000
and of 8.1 million images of 784 bytes, over many epochs, both orders give:

- place: the Kolmogorov-Smirnov distance between a sample's place in an epoch (0 to 1) and the uniform distribution,
  averaged over some samples; chance alone gives about 0.87 / sqrt(epochs).
- neighbours: the mean distance in an epoch of two samples that are neighbours in the file, over the third of an epoch
  that separates them in a uniform shuffle.
- overlap: the share of an epoch's first half that is in the next epoch's first half too; 0.5 in a uniform shuffle. Its
  standard deviation over epochs tells how unevenly the halves are drawn.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import stats

from fastmnist.beton.writer import PAGE_SIZE
from fastmnist.files import write_json
from fastmnist.loader.order import WINDOW_PAGES, epoch_order, quasi_random_order
from fastmnist.system.environment import origin

IMAGE_SIZE, WATCHED = 784, 200


def measure(count: int, epochs: int, order: Callable[[int], np.ndarray]) -> dict[str, Any]:
    watched = np.linspace(0, count - 2, WATCHED).astype(np.int64)
    places, apart, overlaps, before = [], [], [], None
    for epoch in range(epochs):
        place = np.empty(count, np.int32)
        place[order(epoch)] = np.arange(count, dtype=np.int32)
        places.append(place[watched] / count)
        apart.append(np.abs(place[watched + 1] - place[watched]).mean() / (count / 3))
        first_half = place < count // 2
        if before is not None:
            overlaps.append(float((first_half & before).sum() / (count // 2)))
        before = first_half
    distances = [stats.kstest(column, "uniform").statistic for column in np.array(places).T]
    return {
        "epochs": epochs,
        "place_distance_from_uniform": float(np.mean(distances)),
        "by_chance": 0.8687 / epochs**0.5,
        "neighbours_apart_over_uniform": float(np.mean(apart)),
        "overlap_of_halves": float(np.mean(overlaps)),
        "overlap_standard_deviation": float(np.std(overlaps)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="JSON file for the result")
    parser.add_argument("--epochs", type=int, default=60)
    options = parser.parse_args()
    rows = []
    for count, epochs in ((60_000, 10 * options.epochs), (8_100_000, options.epochs)):
        pages = np.arange(count) // (PAGE_SIZE // IMAGE_SIZE)
        orders: dict[str, Callable[[int], np.ndarray]] = {
            "quasi_random": lambda epoch, pages=pages: quasi_random_order(pages, 0, epoch)[0],
            "random": lambda epoch, count=count: epoch_order(np.arange(count), 0, epoch),
        }
        for name, order in orders.items():
            row = {"order": name, "images": count, "pages": int(pages[-1]) + 1, "window_pages": WINDOW_PAGES}
            rows.append(row | measure(count, epochs, order))
            print(rows[-1], flush=True)
    write_json(options.output, {"rows": rows, **origin(torch.device("cpu"))})


if __name__ == "__main__":
    main()
