"""The project's GPU figures in one call of under eight minutes, as JSON with hardware, versions, date and n.

    taskset -c 0,1 python benchmarks/gpu_suite.py --data-dir FOLDER --output benchmarks/results/gpu_suite.json

Without --data-dir MNIST is downloaded. Two cores stand for Colab's. Parts, in this order unless --parts names some;
each begins only while its time is left:

- presets: `speedrun` of fast99 and fast995, 20 seeds, compiled and recorded: accuracy, its test, and every clock.
- small CNN: the fastest published recipe for MNIST that we know, by the same clocks.
- graph: fast99 recorded without being compiled, as `train` runs it.
- steps: a step of 256 images eager, recorded, and compiled and recorded; benchmarks/step.py says what of it.
- loading: epochs of training against steps on batches that are loaded already, resident and streamed, in turn.
- cold: `fastmnist train --preset fast995` from process start to its end, with empty caches and with warm ones.
- accurate: `speedrun` of that preset.
- notebook: the common notebook recipe until 99 %, by the same clock, and how many times its seconds fast99 saves.
- bench: `fastmnist bench --quick`.

--dry runs all of it at toy size, on a CPU too: it shows that it works, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from recipes import notebook_recipe, small_cnn_recipe
from step import matrix_peak, step_rows, step_seconds

from fastmnist.beton.reader import Beton
from fastmnist.config import TrainConfig
from fastmnist.files import write_json
from fastmnist.measure.bench import QUICK, Plan, choose_contenders
from fastmnist.measure.bench import bench as compare_loaders
from fastmnist.measure.contenders import OURS
from fastmnist.prepare.prepare import prepare
from fastmnist.presets import TARGETS, preset_config
from fastmnist.report.tables import gpu_table
from fastmnist.runs.speedrun import speedrun
from fastmnist.system.environment import origin
from fastmnist.system.machine import choose_device
from fastmnist.system.progress import Reporter
from fastmnist.system.statistics import in_turns, ratios, row, summarise
from fastmnist.training.loop import Trainer
from fastmnist.training.session import Session

LIMIT_SECONDS = 460
SEEDS, TURNS, STEPS_OF_A_TURN = 20, 8, 60
SHOWN = ("presets", "graph", "small CNN")  # parts in README's table
TOY = {"dataset": "digits", "data_dir": None, "epochs": 0.05, "batch_size": 32}


@dataclass
class Suite:
    """Settings that the parts share, and their results."""

    data_dir: str | None
    cache: Path
    device: torch.device
    dry: bool
    output: str | None
    limit: float = LIMIT_SECONDS
    clock: Callable[[], float] = time.perf_counter
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.begun, self.origin = self.clock(), origin(self.device)

    @property
    def left(self) -> float:
        return self.limit - (self.clock() - self.begun)

    @property
    def mode(self) -> str:
        """`compile` of the fastest step."""
        return "default" if self.device.type == "cuda" else "off"

    def config(self, preset: str = "none", **settings: Any) -> TrainConfig:
        common = {"dataset": "mnist", "data_dir": self.data_dir, "val_size": 0, "quiet": True}
        common |= {"cache_dir": str(self.cache), "device": str(self.device)}
        return preset_config(preset, **{**common, **settings, **(TOY if self.dry else {})})

    def run(self, part: Part) -> None:
        """Measures a part; one that fails, or has no time left, gets an `error`."""
        begun = self.clock()
        if self.left < part.seconds:
            self.found[part.name] = {"error": f"not begun: {self.left:.0f} s were left, it needs {part.seconds:.0f}"}
        else:
            try:
                self.found[part.name] = part.measure(self)
            except Exception as error:
                traceback.print_exc()
                self.found[part.name] = {"error": f"{type(error).__name__}: {error}"}
        print(f"{part.name}: {self.clock() - begun:.0f} s", flush=True)
        write_json(self.output, self.found | self.origin | {"dry": self.dry})

    def speedrun(self, preset: str, seconds: float, mode: str | None = None) -> dict[str, Any]:
        """As many seeds as fit into `seconds` after the first, which pays what is paid once; all of them count."""
        ends: list[float] = []

        def enough(done: int) -> bool:
            ends.append(self.clock())
            return ends[-1] - ends[0] > seconds

        config, count = self.config(preset, compile=mode or self.mode), 1 if self.dry else SEEDS
        return speedrun(config, count, preset=preset, curve=False, target=TARGETS[preset], enough=enough).to_dict()

    @contextmanager
    def files(self) -> Iterator[tuple[Beton, Beton]]:
        config = self.config()
        prepared = prepare(config.dataset, config.data_dir, config.cache_dir)
        with Beton(prepared.train) as train, Beton(prepared.test) as test:
            yield train, test

    def row(self, group: str, name: str, values: Sequence[float], **more: Any) -> dict[str, Any]:
        return row(group, name, values, "seconds", self.origin, **more)


class Part(NamedTuple):
    """A part of the suite; seconds: the most that it takes."""

    name: str
    seconds: float
    measure: Callable[[Suite], Any]


def presets(suite: Suite) -> dict[str, Any]:
    return {name: suite.speedrun(name, 60) for name in ("fast99", "fast995")}


def graph(suite: Suite) -> dict[str, Any]:
    return suite.speedrun("fast99", 20, "graph" if suite.device.type == "cuda" else "off")


def accurate(suite: Suite) -> dict[str, Any]:
    return suite.speedrun("accurate", 60)


def small_cnn(suite: Suite) -> dict[str, Any]:
    with suite.files() as (train, test):
        small_cnn_recipe(train, test, suite.device, 0)  # what is paid once
        runs = [small_cnn_recipe(train, test, suite.device, seed) for seed in range(1 if suite.dry else SEEDS)]
    clocks = ("train_seconds", "mlperf_seconds")
    rows = [suite.row("small CNN", clock, [getattr(run, clock) for run in runs]) for clock in clocks]
    return {"runs": [run.to_dict() for run in runs], "rows": rows}


def notebook(suite: Suite) -> dict[str, Any]:
    """The recipe's runs; one that never gets to 99 % has no time to it, and is counted as missed."""
    sizes: dict[str, Any] = {"most": 1, "batches": 1} if suite.dry else {"most": 4}
    with suite.files() as (train, test):
        runs = [notebook_recipe(train, test, suite.device, seed, **sizes) for seed in range(1 if suite.dry else 2)]
    there = [run.train_seconds for run in runs if run.test_accuracy >= 0.99]
    ours = suite.found.get("presets", {}).get("fast99", {}).get("train_seconds_mean")
    over = summarise([value / ours for value in there]).to_dict() if there and ours else None
    return {
        "runs": [run.to_dict() for run in runs],
        "rows": [suite.row("notebook", "seconds to 99 %", there)] if there else [],
        "missed": len(runs) - len(there),
        "over_fast99": over,
    }


def cold(suite: Suite) -> dict[str, Any]:
    """Seconds of a whole process, from its start to its saved model."""
    found: dict[str, Any] = {}
    config = suite.config("fast995")
    settings = {name: getattr(config, name) for name in ("dataset", "data_dir", "device", "val_size", "batch_size")}
    if suite.dry:
        settings["epochs"] = config.epochs
    flags = [
        word
        for name, value in settings.items()
        if value is not None
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    with tempfile.TemporaryDirectory() as folder:
        names = ("NUMBA_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")
        caches = {name: f"{folder}/{name}" for name in names}
        for name in ("empty caches",) if suite.dry else ("empty caches", "warm caches"):
            out = Path(folder) / name.replace(" ", "-")
            command = [sys.executable, "-m", "fastmnist", "train", "--preset", "fast995", "--quiet", *flags]
            begun = time.perf_counter()
            subprocess.run([*command, "--out", str(out)], env={**os.environ, **caches}, check=True, timeout=120)
            seconds = time.perf_counter() - begun
            summary = json.loads((out / "summary.json").read_text())
            clocks = {key: summary[key] for key in summary if key.endswith("_seconds")}
            found[name] = {"seconds": seconds, "test_accuracy": summary["test_accuracy"], **clocks}
    return found


def steps(suite: Suite) -> dict[str, Any]:
    sides = {
        "eager": ("imagenet", "off"),
        "recorded": ("imagenet", "graph"),
        "compiled and recorded": ("imagenet", "default"),
        "stride-2 stem, compiled and recorded": ("stride2", "default"),
    }
    configs = {
        name: suite.config(stem=stem, batch_size=256, compile=mode)
        for name, (stem, mode) in sides.items()
        if suite.device.type == "cuda" or mode == "off"
    }
    peak = matrix_peak(suite.device, *((256, 2) if suite.dry else ()))
    turns, each = (1, 1) if suite.dry else (TURNS - 1, STEPS_OF_A_TURN)
    return {"bf16_matrix_flops": peak, "rows": step_rows(configs, turns, each, peak, suite.origin)}


def epoch_seconds(trainer: Trainer, later: bool) -> float:
    """Seconds per step of an epoch of training: the first, or a later one, which was prepared in the one before."""
    trainer.seek(0)
    for _ in range(1 + later):
        trainer.seconds = 0.0
        trainer.run_epoch()
    return trainer.seconds / (trainer.step / (1 + later))


def loading(suite: Suite) -> dict[str, Any]:
    """Epochs of training against steps on loaded batches: what loading, augmentation and the order cost."""
    rows = []
    for placement in ("resident", "stream"):
        config = suite.config("fast995", placement=placement, compile=suite.mode)
        with Session(config, Reporter(quiet=True)) as session:
            session.set_up()
            sides: dict[str, Callable[[], float]] = {
                "fixed": partial(step_seconds, session.trainer, 1 if suite.dry else STEPS_OF_A_TURN),
                "loader": partial(epoch_seconds, session.trainer, not suite.dry),
                "first epoch": partial(epoch_seconds, session.trainer, False),
            }
            values = in_turns(sides, 1 if suite.dry else 9)
        for name, seconds in values.items():
            more: dict[str, Any] = {"kind": "limit"} if name == "fixed" else {}
            more = more or {"kind": "ours", "of_limit": ratios(values["fixed"], seconds).to_dict()}
            rows.append(suite.row("loading", f"{placement}, {name}", seconds, **more))
    return {"rows": rows}


def bench(suite: Suite) -> dict[str, Any]:
    plan, only = (Plan(1.0, 1, 1), OURS) if suite.dry else (QUICK, None)
    prepared = prepare("mnist", suite.data_dir, str(suite.cache))
    contenders = choose_contenders(only, quick=True)
    return compare_loaders(prepared.train, device=str(suite.device), contenders=contenders, plan=plan).to_dict()


PARTS = (
    Part("presets", 120, presets),
    Part("small CNN", 15, small_cnn),
    Part("graph", 25, graph),
    Part("steps", 70, steps),
    Part("loading", 30, loading),
    Part("cold", 50, cold),
    Part("accurate", 70, accurate),
    Part("notebook", 40, notebook),
    Part("bench", 40, bench),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--data-dir", help="folder with MNIST's four IDX files; without it MNIST is downloaded")
    parser.add_argument("--output", help="JSON file for the result, written after each part")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds for all parts (%(default)s)")
    parser.add_argument("--dry", action="store_true", help="toy sizes, to see that it runs")
    options = parser.parse_args()
    device = choose_device(options.device)
    if device.type != "cuda" and not options.dry:
        parser.error("there is no CUDA GPU here; --dry shows that the suite runs")
    with tempfile.TemporaryDirectory() as cache:
        suite = Suite(options.data_dir, Path(cache), device, options.dry, options.output, options.limit)
        for part in PARTS:
            if part.name in options.parts:
                suite.run(part)
    found = suite.found
    print("\n".join(figures(found)))
    if not options.dry and all("error" not in found.get(name, {"error": ""}) for name in SHOWN):
        print(f"\nFor README:\n\n{gpu_table(found | suite.origin)}")
    if failed := [name for name, part in found.items() if "error" in part]:
        sys.exit(f"not measured: {', '.join(failed)}")


def figures(found: dict[str, Any]) -> Iterator[str]:
    """The figures that the project is judged by, a line each."""
    runs = {**found.get("presets", {}), "fast99, not compiled": found.get("graph"), "accurate": found.get("accurate")}
    for name, part in runs.items():
        if isinstance(part, dict) and "error" not in part:
            p = "" if part["p_value"] is None else f", p = {part['p_value']:.2g} above {part['target']:.2%}"
            yield (
                f"{name}: {part['test_accuracy_mean']:.3%} +- {part['test_accuracy_stdev']:.3%} (n={part['n']}{p}) "
                f"after {part['train_seconds_mean']:.3f} s of training, {part['mlperf_seconds_mean']:.3f} s by "
                f"MLPerf's clock; set-up {part['compile_seconds']:.1f} s ({part['compile']})"
            )
    for part in ("small CNN", "steps", "loading"):
        for line in found.get(part, {}).get("rows", ()):
            more = f", {line['profile']}" if line.get("profile") else ""
            more += f", {line['of_limit']['median']:.3f} of the limit" if "of_limit" in line else ""
            interval = f"{1e3 * line['low']:.3f} to {1e3 * line['high']:.3f}"
            yield f"{part}, {line['name']}: {1e3 * line['median']:.3f} ms ({interval}){more}"
    for name, part in found.get("cold", {}).items():
        if isinstance(part, dict):
            yield f"cold, {name}: {part['seconds']:.1f} s, {part['test_accuracy']:.2%}"
    if saved := found.get("notebook", {}).get("over_fast99"):
        yield f"notebook recipe over fast99: {saved['median']:.1f} times the seconds"


if __name__ == "__main__":
    main()
