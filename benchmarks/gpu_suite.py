"""The project's GPU figures in one call of under eight minutes, as JSON with hardware, versions, date and n.

    taskset -c 0,1 python benchmarks/gpu_suite.py --data-dir FOLDER --output benchmarks/results/gpu_suite.json

Without --data-dir MNIST is downloaded. Two cores stand for Colab's. Parts, in this order unless --parts names some;
each begins only while its time is left:

- presets: `speedrun` of fast99 and fast995, 20 seeds, compiled and recorded: accuracy, its test, and every clock.
- small CNN: the fastest published recipe for MNIST that we know, by the same clocks.
- graph: fast99 recorded without being compiled, as `train` runs it.
- steps: a step of 256 images eager, recorded, and compiled and recorded: milliseconds, kernels, set-up seconds, and the
  share of the bfloat16 matrix peak (a product of 8,192 x 8,192 matrices, measured in the same run).
- loading: steps with the Loader's batches over steps on what is loaded already, resident and streamed, in turn.
- cold: `fastmnist train --preset fast995` from process start to its end, with empty caches and with warm ones.
- accurate: `speedrun` of that preset.
- notebook: the common notebook recipe until 99 %, by the same clock, and how many times its seconds fast99 saves.
- bench: `fastmnist bench --quick`.

--dry runs all of it at toy size, on a CPU too: it shows that it works, and its figures mean nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import arguments, summarise
from recipes import notebook_recipe, small_cnn_recipe, synchronize
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fastmnist.beton.reader import Beton
from fastmnist.config import TrainConfig
from fastmnist.measure.bench import QUICK, Plan, choose_contenders
from fastmnist.measure.bench import bench as compare
from fastmnist.measure.contenders import OURS
from fastmnist.prepare.prepare import prepare
from fastmnist.presets import TARGETS, preset_config
from fastmnist.report.tables import gpu_table
from fastmnist.runs.speedrun import speedrun
from fastmnist.system.environment import origin
from fastmnist.system.machine import choose_device
from fastmnist.system.progress import Reporter
from fastmnist.system.statistics import in_turns, ratios
from fastmnist.training.loop import Trainer
from fastmnist.training.session import Session

LIMIT_SECONDS = 460
SEEDS = 20
STEPS_OF_A_TURN = 60
PROFILED = 5  # steps


@dataclass
class Suite:
    """What the parts share, and what they found."""

    data_dir: str | None
    cache: Path
    device: torch.device
    dry: bool
    output: Path | None
    limit: float = LIMIT_SECONDS
    clock: Callable[[], float] = time.perf_counter
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.begun = self.clock()

    @property
    def left(self) -> float:
        return self.limit - (self.clock() - self.begun)

    @property
    def mode(self) -> str:
        """How the fastest step runs."""
        return "default" if self.device.type == "cuda" else "off"

    def config(self, preset: str = "none", **settings: Any) -> TrainConfig:
        common = {"dataset": "mnist", "data_dir": self.data_dir, "cache_dir": str(self.cache), "quiet": True}
        if self.dry:
            common |= {"dataset": "digits", "data_dir": None, "epochs": 0.2, "batch_size": 64}
        return preset_config(preset, **{**common, "val_size": 0, "device": str(self.device), **settings})

    def run(self, part: Part) -> None:
        """What fails or has no time left is said, and the rest goes on."""
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
        self.write()

    def write(self) -> None:
        if self.output is not None:
            self.output.write_text(json.dumps(self.found | origin(self.device) | {"dry": self.dry}, indent=2) + "\n")

    def speedrun(self, preset: str, most: int, seconds: float, **settings: Any) -> dict[str, Any]:
        """As many seeds as fit into `seconds` after the first, which pays what is paid once; all of them count."""
        config = self.config(preset, **settings)
        ends: list[float] = []

        def enough(done: int) -> bool:
            ends.append(self.clock())
            return ends[-1] - ends[0] > seconds

        count = 1 if self.dry else most
        return speedrun(config, count, preset=preset, curve=False, target=TARGETS[preset], enough=enough).to_dict()


class Part(NamedTuple):
    """A part of the suite; seconds: what it takes at most."""

    name: str
    seconds: float
    measure: Callable[[Suite], Any]


def presets(suite: Suite) -> dict[str, Any]:
    return {name: suite.speedrun(name, SEEDS, 60, compile=suite.mode) for name in ("fast99", "fast995")}


def graph(suite: Suite) -> dict[str, Any]:
    return suite.speedrun("fast99", SEEDS, 20, compile="graph" if suite.device.type == "cuda" else "off")


def accurate(suite: Suite) -> dict[str, Any]:
    return suite.speedrun("accurate", SEEDS, 60, compile=suite.mode)


@contextmanager
def files_of(suite: Suite) -> Iterator[tuple[Beton, Beton]]:
    prepared = prepare(suite.config().dataset, suite.config().data_dir, str(suite.cache))
    with Beton(prepared.train) as train, Beton(prepared.test) as test:
        yield train, test


def small_cnn(suite: Suite) -> dict[str, Any]:
    with files_of(suite) as (train, test):
        small_cnn_recipe(train, test, suite.device, 0)  # what is paid once
        runs = [small_cnn_recipe(train, test, suite.device, seed) for seed in range(1 if suite.dry else SEEDS)]
    clocks = {clock: summarise([getattr(run, clock) for run in runs]) for clock in ("train_seconds", "mlperf_seconds")}
    return {"runs": [run.to_dict() for run in runs], **clocks}


def notebook(suite: Suite) -> dict[str, Any]:
    with files_of(suite) as (train, test):
        most, count = (1, 1) if suite.dry else (4, 2)
        runs = [notebook_recipe(train, test, suite.device, seed, most=most) for seed in range(count)]
    # A run that never gets there has no time to 99 %: it is counted apart.
    there = [run.train_seconds for run in runs if run.test_accuracy >= 0.99]
    ours = suite.found.get("presets", {}).get("fast99", {}).get("train_seconds_mean")
    return {
        "runs": [run.to_dict() for run in runs],
        "seconds_to_99": summarise(there) if there else None,
        "missed": len(runs) - len(there),
        "over_fast99": summarise([value / ours for value in there]) if there and ours else None,
    }


def cold(suite: Suite) -> dict[str, Any]:
    """Seconds of a whole process, from its start to its saved model."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        caches = {
            "NUMBA_CACHE_DIR": f"{folder}/numba",
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TRITON_CACHE_DIR": f"{folder}/triton",
            "XDG_CACHE_HOME": f"{folder}/cache",
        }
        for name in ("empty caches", "warm caches"):
            out = Path(folder) / name.replace(" ", "-")
            command = [sys.executable, "-m", "fastmnist", "train", "--preset", "fast995", "--val-size", "0"]
            command += ["--device", str(suite.device), "--out", str(out), "--quiet"]
            if suite.dry:
                command += ["--dataset", "digits", "--epochs", "0.2", "--batch-size", "64"]
            else:
                command += ["--dataset", "mnist", *(["--data-dir", suite.data_dir] if suite.data_dir else [])]
            begun = time.perf_counter()
            subprocess.run(command, env={**os.environ, **caches}, check=True, timeout=120)
            summary = json.loads((out / "summary.json").read_text())
            clocks = {key: summary[key] for key in summary if key.endswith("_seconds")}
            found[name] = {"seconds": time.perf_counter() - begun, "test_accuracy": summary["test_accuracy"], **clocks}
    return found


def peak(device: torch.device, dry: bool) -> float:
    """FLOP/s of a product of two bfloat16 matrices."""
    size, repeats = (256, 2) if dry else (8192, 20)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for at in range(repeats + 3):
        if at == 3:
            synchronize(device)
            begun = time.perf_counter()
        torch.mm(a, b)
    synchronize(device)
    return 2 * size**3 * repeats / (time.perf_counter() - begun)


@contextmanager
def training(config: TrainConfig) -> Iterator[tuple[Trainer, float]]:
    """A trainer that is set up as config.compile says, before its first step; and the seconds that this took."""
    with Session(config, Reporter(quiet=True)) as session:
        begun = time.perf_counter()
        session.set_up()
        session.trainer.synchronize()
        yield session.trainer, time.perf_counter() - begun


def flops(config: TrainConfig) -> float:
    """Floating-point operations of a forward and backward pass per image, of what is trained (live taps alone)."""
    with Session(replace(config, device="cpu", compile="off"), Reporter(quiet=True)) as session:
        model = session.make_model(0)
        height, width, channels = session.files.train.image_shape
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, channels, height, width)).sum().backward()
    return counter.get_total_flops() / 2


def fixed(trainer: Trainer, steps: int) -> float:
    """Seconds per step over batches that are loaded already."""
    many = min(trainer.chunk, steps)
    trainer.seek(0)
    trainer.load_example()
    trainer.synchronize()
    begun = time.perf_counter()
    for at in range(many):
        trainer.train_step(at)
    trainer.synchronize()
    return (time.perf_counter() - begun) / many


def loaded(trainer: Trainer, later: bool) -> float:
    """Seconds per step of an epoch of training: the first, or a later one, which was prepared in the one before."""
    trainer.seek(0)
    for _ in range(1 + later):
        trainer.seconds = 0.0
        trainer.run_epoch()
    return trainer.seconds / (trainer.step / (1 + later))


def kernels(trainer: Trainer) -> dict[str, Any] | None:
    """How many a step has, and the seconds in which one of them runs; None on a CPU."""
    if trainer.device.type != "cuda":
        return None
    trainer.seek(0)
    trainer.load_example()
    trainer.train_step(0)
    trainer.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        for at in range(1, PROFILED + 1):
            trainer.train_step(at)
        trainer.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    covered, until = 0.0, spans[0][0]
    for start, end in spans:
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return {"kernels": len(spans) / PROFILED, "busy": covered / (until - spans[0][0])}


def steps(suite: Suite) -> dict[str, Any]:
    most = peak(suite.device, suite.dry)
    found: dict[str, Any] = {"bf16_matrix_flops": most}
    for name, stem, mode in (
        ("eager", "imagenet", "off"),
        ("recorded", "imagenet", "graph"),
        ("compiled and recorded", "imagenet", "default"),
        ("stride-2 stem, compiled and recorded", "stride2", "default"),
    ):
        if suite.device.type != "cuda" and mode != "off":
            continue
        size = 64 if suite.dry else 256
        config = suite.config(stem=stem, batch_size=size, compile=mode)
        with training(config) as (trainer, set_up):
            seconds = [fixed(trainer, 2 if suite.dry else STEPS_OF_A_TURN) for _ in range(2 if suite.dry else 8)][1:]
            rate = [size / value for value in seconds]
            each = flops(config)
            found[name] = {
                "batch_size": size,
                "milliseconds": summarise([value * 1e3 for value in seconds]),
                "images_per_second": summarise(rate),
                "set_up_seconds": set_up,
                "flops_per_image": each,
                "of_bf16_peak": summarise([value * each / most for value in rate]),
                "profile": kernels(trainer),
            }
    return found


def loading(suite: Suite) -> dict[str, Any]:
    """Epochs of training against steps on loaded batches: what loading, augmentation and the order cost."""
    found = {}
    for placement in ("resident", "stream"):
        config = suite.config("fast995", placement=placement, compile=suite.mode)
        with training(config) as (trainer, _):
            sides: dict[str, Callable[[], float]] = {
                "loader": partial(loaded, trainer, not suite.dry),
                "first epoch": partial(loaded, trainer, False),
                "fixed": partial(fixed, trainer, STEPS_OF_A_TURN),
            }
            values = in_turns(sides, 2 if suite.dry else 9)
        found[placement] = {
            **{f"{name} milliseconds": summarise([value * 1e3 for value in side]) for name, side in values.items()},
            **{
                f"fixed over {name}": ratios(values["fixed"], values[name]).to_dict()
                for name in ("loader", "first epoch")
            },
        }
    return found


def bench(suite: Suite) -> dict[str, Any]:
    plan, only = (Plan(1.0, 1, 1), OURS) if suite.dry else (QUICK, None)
    prepared = prepare("mnist", suite.data_dir, str(suite.cache))
    contenders = choose_contenders(only, quick=True)
    return compare(prepared.train, device=str(suite.device), contenders=contenders, plan=plan).to_dict()


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


def measure(suite: Suite, parts: Sequence[Part]) -> dict[str, Any]:
    """Runs the parts one after the other; those that failed or were not begun have `error`."""
    for part in parts:
        suite.run(part)
    return suite.found


def main() -> None:
    parser = arguments(__doc__, downloads=True)
    names = [part.name for part in PARTS]
    parser.add_argument("--device", default="auto")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds for all parts (%(default)s)")
    parser.add_argument("--dry", action="store_true", help="toy sizes, to see that it runs")
    options = parser.parse_args()
    device = choose_device(options.device)
    if device.type != "cuda" and not options.dry:
        parser.error("there is no CUDA GPU here; --dry shows that the suite runs")
    with tempfile.TemporaryDirectory() as cache:
        suite = Suite(
            options.data_dir and str(options.data_dir), Path(cache), device, options.dry, options.output, options.limit
        )
        found = measure(suite, [part for part in PARTS if part.name in options.parts])
    print(table(found))
    if not options.dry and all(
        "error" not in found.get(name, {"error": ""}) for name in ("presets", "graph", "small CNN")
    ):
        print(f"\nFor README:\n\n{gpu_table(found | origin(device))}")
    failed = [name for name, part in found.items() if "error" in part]
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


def table(found: dict[str, Any]) -> str:
    """The figures that the project is judged by, a line each."""
    lines = []
    runs = {**found.get("presets", {}), "fast99, not compiled": found.get("graph"), "accurate": found.get("accurate")}
    for name, part in runs.items():
        if isinstance(part, dict) and "error" not in part:
            p = "" if part["p_value"] is None else f", p = {part['p_value']:.2g} above {part['target']:.2%}"
            lines.append(
                f"{name}: {part['test_accuracy_mean']:.3%} +- {part['test_accuracy_stdev']:.3%} (n={part['n']}{p}) "
                f"after {part['train_seconds_mean']:.3f} s of training, {part['mlperf_seconds_mean']:.3f} s by "
                f"MLPerf's clock; set-up {part['compile_seconds']:.1f} s ({part['compile']})"
            )
    for name, part in found.get("small CNN", {}).items():
        if name.endswith("_seconds"):
            lines.append(f"small CNN, {name}: {part['median']:.3f} ({part['min']:.3f} to {part['max']:.3f})")
    for name, part in found.get("steps", {}).items():
        if isinstance(part, dict):
            lines.append(f"step, {name}: {part['milliseconds']['median']:.3f} ms, {part['profile']}")
    for name, part in found.get("loading", {}).items():
        if isinstance(part, dict):
            lines.append(f"fixed batch over loader, {name}: {part['fixed over loader']}")
    for name, part in found.get("cold", {}).items():
        if isinstance(part, dict):
            lines.append(f"cold, {name}: {part['seconds']:.1f} s, {part['test_accuracy']:.2%}")
    if saved := found.get("notebook", {}).get("over_fast99"):
        lines.append(f"notebook recipe over fast99: {saved['median']:.1f} times the seconds")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
