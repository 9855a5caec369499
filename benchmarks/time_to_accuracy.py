"""Seconds of training to 99 %: a preset against the plain recipe and the common notebook recipe, in one run.

    python benchmarks/time_to_accuracy.py --data-dir FOLDER --output benchmarks/results/time_to_accuracy.json

All sides train on all 60,000 images, seed by seed in turn, in one process; benchmarks/recipes.py says what they do.
The training clock stands still while the test set is looked at. A preset and the plain recipe look at it once, at
their end; the notebook recipe after each epoch, to stop when it is there.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import arguments
from recipes import notebook_recipe, plain_recipe

from fastmnist.beton.reader import Beton
from fastmnist.files import write_bytes
from fastmnist.prepare.prepare import prepare
from fastmnist.presets import preset_config
from fastmnist.runs.speedrun import speedrun
from fastmnist.system.environment import origin
from fastmnist.system.machine import choose_device
from fastmnist.system.statistics import ratios, row


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--notebook-seeds", type=int, default=2, help="the notebook recipe takes minutes on a CPU")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = choose_device(options.device)
    sides = ("preset", "plain recipe", "notebook recipe")
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as cache:
        prepared = prepare("mnist", str(options.data_dir), cache)
        with Beton(prepared.train) as train, Beton(prepared.test) as test:
            for seed in range(options.seeds):
                config = preset_config(
                    options.preset,
                    dataset="mnist",
                    data_dir=str(options.data_dir),
                    cache_dir=cache,
                    device=str(device),
                    seed=seed,
                )
                ours = speedrun(config, 1, preset=options.preset, curve=False)
                runs["preset"].append(dict(ours.runs[0]))
                runs["plain recipe"].append(plain_recipe(train, test, device, seed).to_dict())
                if seed < options.notebook_seeds:
                    runs["notebook recipe"].append(notebook_recipe(train, test, device, seed).to_dict())
                for side in sides:
                    last = runs[side][-1]
                    print(f"{side}: {last['test_accuracy']:.2%} after {last['train_seconds']:.1f} s", flush=True)
    write_bytes(Path(options.output or "time_to_accuracy.json"), to_json(options.preset, runs, ours.setup, device))


def to_json(preset: str, runs: dict[str, list[dict[str, Any]]], setup: dict[str, Any], device: Any) -> bytes:
    where, rows = origin(device), []
    seconds = {side: [run["train_seconds"] for run in found] for side, found in runs.items()}
    for side, found in runs.items():
        accuracies = [run["test_accuracy"] for run in found]
        rows.append(
            row(
                "time to accuracy",
                f"{preset} preset" if side == "preset" else side,
                seconds[side],
                "seconds",
                where,
                setup["config"] if side == "preset" else None,
                mean=statistics.fmean(seconds[side]),
                test_accuracy_mean=statistics.fmean(accuracies),
                test_accuracy_stdev=statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
                over_preset=ratios(seconds[side], seconds["preset"][: len(found)]).to_dict(),
                runs=found,
            )
        )
    return (json.dumps({"rows": rows, **where}, indent=2) + "\n").encode()


if __name__ == "__main__":
    main()
