"""Seconds of training to 99 %: a preset against the published, plain and notebook recipes, seed by seed in turn.

    python benchmarks/time_to_accuracy.py --data-dir FOLDER --output benchmarks/results/time_to_accuracy.json

All sides train on all 60,000 images in one process; benchmarks/recipes.py describes them. The training clock stands
still during evaluation. The notebook recipe is evaluated after each epoch, to stop at 99 %; the others once, at their
end. `p_value`: one-sided t-test of the mean accuracy against 99 %.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from typing import Any

from recipes import notebook_recipe, plain_recipe, small_cnn_recipe
from scipy.stats import ttest_1samp

from fastmnist.beton.reader import Beton
from fastmnist.files import write_json
from fastmnist.prepare.prepare import prepare
from fastmnist.presets import preset_config
from fastmnist.runs.speedrun import speedrun
from fastmnist.system.environment import origin
from fastmnist.system.machine import choose_device
from fastmnist.system.statistics import ratios, row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with MNIST's four IDX files")
    parser.add_argument("--output", required=True, help="JSON file for the rows")
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--plain-seeds", type=int, default=5, help="the plain recipe takes a minute on a CPU")
    parser.add_argument("--notebook-seeds", type=int, default=2, help="the notebook recipe takes minutes on a CPU")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = choose_device(options.device)
    ours = f"{options.preset} preset"
    recipes = {
        "published small CNN": (small_cnn_recipe, options.seeds),
        "plain recipe": (plain_recipe, options.plain_seeds),
        "notebook recipe": (notebook_recipe, options.notebook_seeds),
    }
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in (ours, *recipes)}
    with tempfile.TemporaryDirectory() as cache:
        prepared = prepare("mnist", options.data_dir, cache)
        where = {"dataset": "mnist", "data_dir": options.data_dir, "cache_dir": cache, "device": str(device)}
        with Beton(prepared.train) as train, Beton(prepared.test) as test:
            for seed in range(options.seeds):
                config = preset_config(options.preset, **where, seed=seed)
                done = speedrun(config, 1, preset=options.preset, curve=False)
                runs[ours].append(dict(done.runs[0]))
                for side, (recipe, seeds) in recipes.items():
                    if seed < seeds:
                        runs[side].append(recipe(train, test, device, seed).to_dict())
                for side, found in runs.items():
                    if seed < len(found):
                        last = found[-1]
                        print(f"{side}: {last['test_accuracy']:.2%} after {last['train_seconds']:.2f} s", flush=True)
    where, rows = origin(device), []
    runs = {side: found for side, found in runs.items() if found}
    seconds = {side: [run["train_seconds"] for run in found] for side, found in runs.items()}
    for side, found in runs.items():
        accuracies = [run["test_accuracy"] for run in found]
        more = {
            "mean": statistics.fmean(seconds[side]),
            "test_accuracy_mean": statistics.fmean(accuracies),
            "test_accuracy_stdev": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
            "p_value": float(ttest_1samp(accuracies, 0.99, alternative="greater").pvalue) if len(found) > 1 else None,
            "over_preset": ratios(seconds[side], seconds[ours][: len(found)]).to_dict(),
            "runs": found,
        }
        settings = done.setup["config"] if side == ours else None
        rows.append(row("time to accuracy", side, seconds[side], "seconds", where, settings, **more))
    write_json(options.output, {"rows": rows})


if __name__ == "__main__":
    main()
