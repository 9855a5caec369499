"""Seconds of a training step by stem, precision and mode, over batches that are loaded already.

    python benchmarks/step.py --data-dir FOLDER --output step.json [--stems imagenet] [--amp off bf16] [--compile off]

All combinations take turns. A row has the step's seconds, the set-up's (recording, compiling), operations per image,
their share of the bfloat16 matrix peak (a product of two large matrices, measured in the same run), how many times the
first row's speed it is, and on a GPU its kernels and the share of the time in which one of them runs. For compiling
with empty caches, name an empty folder in TORCHINDUCTOR_CACHE_DIR. benchmarks/gpu_suite.py measures four of them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, get_args

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fastmnist.config import Amp, Compile, Stem, TrainConfig
from fastmnist.files import write_json
from fastmnist.system.environment import origin
from fastmnist.system.machine import choose_device, synchronize
from fastmnist.system.progress import Reporter
from fastmnist.system.statistics import in_turns, ratios, row, summarise
from fastmnist.training.loop import Trainer
from fastmnist.training.session import Session

PROFILED = 5  # steps


def matrix_peak(device: torch.device, size: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of a product of two bfloat16 matrices of size x size."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for at in range(repeats + 3):
        if at == 3:
            synchronize(device)
            begun = time.perf_counter()
        torch.mm(a, b)
    synchronize(device)
    return 2 * size**3 * repeats / (time.perf_counter() - begun)


def flops(config: TrainConfig) -> float:
    """Floating-point operations of a forward and backward pass per image, as it is trained (live taps alone)."""
    on_cpu = replace(config, device="cpu", compile="off", amp="off")
    with Session(on_cpu, Reporter(quiet=True)) as session:
        model = session.make_model(0)
        height, width, channels = session.files.train.image_shape
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, channels, height, width)).sum().backward()
    return counter.get_total_flops() / 2


def step_seconds(trainer: Trainer, steps: int) -> float:
    """Seconds per step over batches that are loaded already; loading more of them stops the clock."""
    seconds = 0.0
    for done in range(0, steps, trainer.chunk):
        trainer.seek(0)
        trainer.load_example()
        trainer.synchronize()
        begun = time.perf_counter()
        for at in range(min(trainer.chunk, steps - done)):
            trainer.train_step(at)
        trainer.synchronize()
        seconds += time.perf_counter() - begun
    return seconds / steps


def kernels(trainer: Trainer) -> dict[str, float] | None:
    """Kernels per step, and the share of the time in which one of them runs; None on a CPU."""
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


def step_rows(
    configs: Mapping[str, TrainConfig], turns: int, steps: int, peak: float, where: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A row per configuration, measured in turn after one turn of warm-up.

    Args:
        configs: by the row's name. steps: of a turn. peak: FLOP/s, see `matrix_peak`. where: `origin`.
    """
    with ExitStack() as opened:
        sessions, set_up = {}, {}
        for name, config in configs.items():
            sessions[name] = session = opened.enter_context(Session(config, Reporter(quiet=True)))
            begun = time.perf_counter()
            session.set_up()
            session.trainer.synchronize()
            set_up[name] = time.perf_counter() - begun
        sides = {name: partial(step_seconds, session.trainer, steps) for name, session in sessions.items()}
        seconds = {name: values[1:] for name, values in in_turns(sides, turns + 1).items()}
        profiles = {name: kernels(session.trainer) for name, session in sessions.items()}
    rows, first = [], seconds[next(iter(seconds))]
    for name, values in seconds.items():
        config, each = configs[name], flops(configs[name])
        settings = {key: getattr(config, key) for key in ("model", "stem", "compile", "batch_size")}
        more = {
            "set_up_seconds": set_up[name],
            "flops_per_image": each,
            "of_bf16_peak": summarise([each * config.batch_size / value / peak for value in values]).to_dict(),
            "times_the_first": ratios(first, values).to_dict(),
            "profile": profiles[name],
        }
        settings["amp"] = sessions[name].precision.name
        rows.append(row("step", name, values, "seconds", where, settings, **more))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with MNIST's four IDX files")
    parser.add_argument("--output", required=True, help="JSON file for the rows")
    parser.add_argument("--stems", nargs="+", choices=get_args(Stem), default=get_args(Stem))
    parser.add_argument("--amp", nargs="+", choices=get_args(Amp), default=["off", "bf16"])
    parser.add_argument("--compile", nargs="+", choices=get_args(Compile), default=["off"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="in a turn (%(default)s; on a GPU take 60)")
    options = parser.parse_args()
    device = choose_device(options.device)
    rows, where, peak = [], origin(device), matrix_peak(device, *((8192, 20) if device.type == "cuda" else (1024, 5)))
    with tempfile.TemporaryDirectory() as cache:
        common = {"data_dir": options.data_dir, "cache_dir": cache, "device": str(device)}
        for stem in options.stems:
            configs = {
                f"{stem}, {amp}, {mode}": TrainConfig(
                    dataset="mnist", stem=stem, amp=amp, compile=mode, batch_size=options.batch_size, **common
                )
                for amp, mode in product(options.amp, options.compile)
            }
            rows += step_rows(configs, options.turns, options.steps, peak, where)
            for found in rows[-len(configs) :]:
                times = found["times_the_first"]["median"]
                print(f"{found['name']}: {1e3 * found['median']:.3f} ms, {times:.2f} times the first", flush=True)
    write_json(options.output, {"bf16_matrix_flops": peak, "rows": rows})


if __name__ == "__main__":
    main()
