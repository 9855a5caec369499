"""Every GPU figure of the project in one call of under eight minutes, as JSON with hardware, versions, date and n.

    taskset -c 0,1 python benchmarks/gpu_suite.py --data-dir FOLDER --output benchmarks/results/gpu_suite.json

Two cores stand for Colab's. Parts, each begun only while its time is left, the most important first:

- presets: `speedrun` of fast99, fast995 and accurate, each with its clocks and every seed.
- notebook: the common notebook recipe until 99 %, by the same clock, and how many times its seconds fast99 saves.
- cold: `fastmnist train --preset fast995` from process start to its end, with empty caches and with warm ones.
- steps: the training step per stem, eager, as a CUDA graph and compiled: milliseconds, set-up seconds, and the share of
  the bfloat16 matrix peak (a product of 8,192 x 8,192 matrices, measured in the same run).
- live taps: the step with and without them, in turn.
- loading: the step with the Loader over the step on one fixed batch, and how busy the GPU is (torch's profiler).
- augmentation: what `train` draws per epoch, on the host.
- loader: benchmarks/loader_gpu.py: the Loader's share of a step per placement, and copies to the device.
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import arguments, summarise
from recipes import notebook_recipe
from torch.utils.flop_counter import FlopCounterMode

from fastmnist.config import TrainConfig
from fastmnist.data.beton import Beton
from fastmnist.data.prepare import prepare
from fastmnist.measure.bench import QUICK, Plan, choose_sides
from fastmnist.measure.bench import bench as compare
from fastmnist.measure.clock import in_turns, ratios
from fastmnist.measure.doctor import diagnose_training
from fastmnist.measure.environment import origin
from fastmnist.measure.sides import OURS
from fastmnist.presets import preset_config
from fastmnist.report.progress import Reporter
from fastmnist.session import make_loaders, make_model, open_files
from fastmnist.speedrun import speedrun
from fastmnist.training.compiling import set_up_compile
from fastmnist.training.loop import Trainer
from fastmnist.training.model import build_model
from fastmnist.training.precision import choose_device, choose_precision

LIMIT_SECONDS = 460
WARM_UP = 3  # steps
STEMS = ("imagenet", "stride2", "cifar")
MODES = ("off", "graph", "default")


@dataclass
class Suite:
    """What the parts share, and what they found."""

    data_dir: str
    cache: Path
    device: torch.device
    dry: bool
    output: Path | None
    begun: float = field(default_factory=time.perf_counter)
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return LIMIT_SECONDS - (time.perf_counter() - self.begun)

    def config(self, preset: str = "none", **settings: Any) -> TrainConfig:
        common = {"dataset": "mnist", "data_dir": self.data_dir, "cache_dir": str(self.cache), "quiet": True}
        if self.dry:
            common |= {"dataset": "digits", "data_dir": None, "epochs": 0.2, "batch_size": 64}
        return preset_config(preset, **{**common, "device": str(self.device), **settings})

    def part(self, name: str, least: float, measure: Callable[[Suite], Any]) -> None:
        """Runs one part; what fails or has no time left is said, and the rest goes on."""
        begun = time.perf_counter()
        if self.left < least:
            self.found[name] = {"error": f"not begun: {self.left:.0f} s were left, it needs {least:.0f}"}
        else:
            try:
                self.found[name] = measure(self)
            except Exception as error:
                traceback.print_exc()
                self.found[name] = {"error": f"{type(error).__name__}: {error}"}
        print(f"{name}: {time.perf_counter() - begun:.0f} s", flush=True)
        self.write()

    def write(self) -> None:
        if self.output is not None:
            self.output.write_text(json.dumps(self.found | origin(self.device) | {"dry": self.dry}, indent=2) + "\n")


def presets(suite: Suite) -> dict[str, Any]:
    found = {}
    for name, seeds, seconds in (("fast99", 20, 30), ("fast995", 20, 40), ("accurate", 20, 110)):
        config = suite.config(name)
        result = speedrun(config, 1, preset=name, curve=False).to_dict()  # also says how long a seed takes
        each = sum(result["runs"][0][f"{clock}_seconds"] for clock in ("data", "train", "evaluate"))
        count = 1 if suite.dry else max(1, min(seeds, int(seconds / max(each, 0.01))))
        found[name] = speedrun(config, count, preset=name, curve=not suite.dry, shifted=True).to_dict()
    return found


def notebook(suite: Suite) -> dict[str, Any]:
    prepared = prepare(suite.config().dataset, suite.config().data_dir, str(suite.cache))
    with Beton(prepared.train) as train, Beton(prepared.test) as test:
        runs = [
            notebook_recipe(train, test, suite.device, seed, most=1 if suite.dry else 4)
            for seed in range(1 if suite.dry else 3)
        ]
    ours = suite.found.get("presets", {}).get("fast99", {}).get("train_seconds_mean")
    seconds = [run.train_seconds for run in runs]
    saved = None if ours is None else summarise([value / ours for value in seconds])
    return {"runs": [run.to_dict() for run in runs], "seconds": summarise(seconds), "over_fast99": saved}


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
                command += ["--dataset", "mnist", "--data-dir", suite.data_dir]
            begun = time.perf_counter()
            subprocess.run(command, env={**os.environ, **caches}, check=True, timeout=120)
            summary = json.loads((out / "summary.json").read_text())
            clocks = {key: summary[key] for key in summary if key.endswith("_seconds")}
            found[name] = {"seconds": time.perf_counter() - begun, "test_accuracy": summary["test_accuracy"], **clocks}
    return found


def milliseconds(trainer: Trainer, steps: int) -> float:
    """Per step of whole training, with the Loader."""
    trainer.step = 0
    steps = min(steps, trainer.steps - WARM_UP, len(trainer.loader) - WARM_UP)
    batches = iter(trainer.loader)
    transforms = trainer.transforms(0)
    size = trainer.loader.batch_size
    for at in range(steps + WARM_UP):
        if at == WARM_UP:
            trainer.synchronize()
            begun = time.perf_counter()
        images, labels = next(batches)
        trainer.train_step((images, labels), None if transforms is None else transforms[at * size :][:size], at)
    trainer.synchronize()
    return (time.perf_counter() - begun) / steps * 1e3


def peak(device: torch.device, dry: bool) -> float:
    """FLOP/s of a product of two bfloat16 matrices."""
    size, repeats = (256, 2) if dry else (8192, 20)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for at in range(repeats + WARM_UP):
        if at == WARM_UP:
            if device.type == "cuda":
                torch.cuda.synchronize()
            begun = time.perf_counter()
        torch.mm(a, b)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - begun)


@contextmanager
def training(config: TrainConfig, device: torch.device) -> Iterator[Trainer]:
    """A trainer before its first step."""
    files, config = open_files(config, lambda *_: None)
    loaders = make_loaders(files, config, device)
    try:
        model = make_model(files, config, device)
        yield Trainer(model, loaders.train, config, choose_precision(config.amp, device))
    finally:
        loaders.close()
        files.close()


def steps(suite: Suite) -> dict[str, Any]:
    most = peak(suite.device, suite.dry)
    found: dict[str, Any] = {"bf16_matrix_flops": most}
    for stem in STEMS:
        model = build_model(stem=stem)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(2, 1, 28, 28)).sum().backward()
        flops = counter.get_total_flops() / 2  # per image, forward and backward, of the whole network
        for batch_size in (64,) if suite.dry else (128, 512, 1024):
            some = ("off",) if suite.dry else MODES if batch_size == 512 else MODES[:2]  # compiling takes half a minute
            for mode in some:
                with training(suite.config(stem=stem, batch_size=batch_size, compile=mode), suite.device) as trainer:
                    begun = time.perf_counter()
                    set_up_compile(trainer, mode)
                    set_up = time.perf_counter() - begun
                    value = milliseconds(trainer, 2 if suite.dry else 40)
                rate = batch_size / value * 1e3
                found[f"{stem}, batch {batch_size}, {mode}"] = {
                    "milliseconds": value,
                    "images_per_second": rate,
                    "set_up_seconds": set_up,
                    "flops_per_image": flops,
                    "of_bf16_peak": rate * flops / most,
                }
    return found


def live(suite: Suite) -> dict[str, Any]:
    mode = "graph" if suite.device.type == "cuda" else "off"
    with ExitStack() as leaving:
        sides: dict[str, Callable[[], float]] = {}
        for name, wanted in (("live", True), ("whole", False)):
            config = suite.config(live_taps=wanted)
            trainer = leaving.enter_context(training(config, suite.device))
            set_up_compile(trainer, mode)
            sides[name] = partial(milliseconds, trainer, 1 if suite.dry else 50)
        values = in_turns(sides, 2 if suite.dry else 7)
    return {
        **{f"{name}_milliseconds": summarise(found) for name, found in values.items()},
        "whole_over_live": ratios(values["whole"], values["live"]).to_dict(),
    }


def loading(suite: Suite) -> dict[str, Any]:
    found = {}
    for preset in ("fast99", "fast995"):
        config = suite.config(preset, compile="graph" if suite.device.type == "cuda" else "off")
        diagnosis = diagnose_training(config, 1.0 if suite.dry else 6.0, Reporter(quiet=True))
        found[preset] = diagnosis.to_dict() | {"gpu_busy": busy(suite, config)}
    return found


def busy(suite: Suite, config: TrainConfig) -> float | None:
    """The share of an epoch's time in which some kernel runs; None on a CPU."""
    if suite.device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with training(config, suite.device) as trainer:
        set_up_compile(trainer, config.compile)
        milliseconds(trainer, 10)
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            milliseconds(trainer, 60)
    kernels = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    covered, until = 0.0, kernels[0][0]
    for start, end in kernels:
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return float(covered / (until - kernels[0][0]))


def augmentation(suite: Suite) -> dict[str, Any]:
    with training(suite.config(), suite.device) as trainer:
        values = []
        for epoch in range(5):
            begun = time.perf_counter()
            trainer.transforms(epoch)
            trainer.synchronize()
            values.append(time.perf_counter() - begun)
        return {"seconds_per_epoch": summarise(values), "images": len(trainer.loader.indices)}


def loader(suite: Suite) -> Any:
    toy = ["--steps", "1", "--repeats", "1", "--batch-sizes", "64"] if suite.dry else []
    script = Path(__file__).with_name("loader_gpu.py")
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        where = ["--data-dir", suite.data_dir, "--device", str(suite.device), "--output", file.name]
        subprocess.run([sys.executable, str(script), *toy, *where], check=True, timeout=180, stdout=subprocess.DEVNULL)
        return json.loads(Path(file.name).read_text())


def bench(suite: Suite) -> dict[str, Any]:
    plan, only = (Plan(1.0, 1, 1), OURS) if suite.dry else (QUICK, None)
    prepared = prepare("mnist", suite.data_dir, str(suite.cache))
    sides = choose_sides(only, quick=True)
    return compare(prepared.train, device=str(suite.device), sides=sides, plan=plan).to_dict()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dry", action="store_true", help="toy sizes, to see that it runs")
    options = parser.parse_args()
    device = choose_device(options.device)
    if device.type != "cuda" and not options.dry:
        parser.error("there is no CUDA GPU here; --dry shows that the suite runs")
    with tempfile.TemporaryDirectory() as cache:
        suite = Suite(str(options.data_dir), Path(cache), device, options.dry, options.output)
        suite.part("presets", 120, presets)
        suite.part("notebook", 60, notebook)
        suite.part("cold", 60, cold)
        suite.part("loading", 30, loading)
        suite.part("live taps", 15, live)
        suite.part("augmentation", 5, augmentation)
        suite.part("loader", 40, loader)
        suite.part("bench", 40, bench)
        suite.part("steps", 60, steps)
        print(table(suite.found))
        failed = [name for name, part in suite.found.items() if "error" in part]
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


def table(found: dict[str, Any]) -> str:
    """The figures that the project is judged by, a line each."""
    lines = []
    for name, part in found.get("presets", {}).items():
        if isinstance(part, dict):
            lines.append(
                f"{name}: {part['test_accuracy_mean']:.3%} +- {part['test_accuracy_stdev']:.3%} after "
                f"{part['train_seconds_mean']:.3f} s (n={part['n']}), compile {part['compile']}"
            )
    for name, part in found.get("cold", {}).items():
        if isinstance(part, dict):
            lines.append(f"cold, {name}: {part['seconds']:.1f} s, {part['test_accuracy']:.2%}")
    if saved := found.get("notebook", {}).get("over_fast99"):
        lines.append(f"notebook recipe over fast99: {saved['median']:.1f} times the seconds")
    for name, part in found.get("loading", {}).items():
        if isinstance(part, dict):
            lines.append(f"{name}: waiting {part['evidence']['waiting']:.1%}, GPU busy {part['gpu_busy']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
