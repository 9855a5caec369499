"""What torch.compile costs and gives for the training step of a preset, with empty and with filled caches.

    python benchmarks/step_compile.py --data-dir FOLDER --output benchmarks/results/step_compile.json

Each row is a process of its own: seconds until the first step can be timed (set_up), and milliseconds per step (median
of --steps). "cold" begins with empty caches, "warm" finds inductor's own cache on the disk, "mega-cache" gets one file
of what the cold process compiled (torch.compiler.save_cache_artifacts) and nothing else. The rows "off" before and
after the others tell how much the machine itself moved.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import arguments, report

from fastmnist.presets import preset_config
from fastmnist.system.machine import choose_device
from fastmnist.system.progress import Reporter
from fastmnist.training.session import Session

LEFT_OUT = 5  # first steps


def one(options: Any) -> dict[str, float]:
    """Of this process."""
    device = choose_device(options.device)
    config = preset_config(
        options.preset,
        dataset="mnist",
        data_dir=str(options.data_dir),
        cache_dir=str(options.cache),
        device=str(device),
        compile=options.mode,
    )
    with Session(config, Reporter(quiet=True)) as session:
        return timed(session, options)


def timed(session: Session, options: Any) -> dict[str, float]:
    trainer = session.trainer
    begun = time.perf_counter()
    if options.load:
        torch.compiler.load_cache_artifacts(options.load.read_bytes())
    session.set_up()
    set_up = time.perf_counter() - begun
    artifacts = torch.compiler.save_cache_artifacts() if options.save else None
    if artifacts is not None:
        options.save.write_bytes(artifacts[0])
    transforms, batches, milliseconds = trainer.transforms(0), iter(trainer.loader), []
    trainer.model.train()
    for _ in range(LEFT_OUT + options.steps):
        batch = next(batches)
        part = None if transforms is None else transforms[: len(batch[1])]
        begun = time.perf_counter()
        trainer.load(*batch, part, 0)
        trainer.train_step(0)
        trainer.synchronize()
        milliseconds.append(1e3 * (time.perf_counter() - begun))
    return {"set_up_seconds": set_up, "step_milliseconds": statistics.median(milliseconds[LEFT_OUT:])}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--mode", help="measure this one in this process")
    parser.add_argument("--cache", type=Path, help="folder for compiled data")
    parser.add_argument("--load", type=Path)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    if options.mode is not None:
        print(json.dumps(one(options)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        mega = folder / "mega-cache"

        def row(name: str, mode: str, cache: str, *more: str) -> None:
            command = [sys.executable, __file__, "--mode", mode, "--cache", str(folder / "data"), "--steps"]
            command += [str(options.steps), "--data-dir", str(options.data_dir), "--device", options.device]
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / cache)}
            done = subprocess.run(
                [*command, "--preset", options.preset, *more],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            rows.append({"name": name, **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)

        row("off", "off", "a")
        row("torch.compile, cold", "default", "a", "--save", str(mega))
        row("torch.compile, warm", "default", "a")
        row("torch.compile, mega-cache", "default", "b", "--load", str(mega))
        if choose_device(options.device).type == "cuda":
            row("CUDA graph", "graph", "a")
        row("off, again", "off", "a")
    report(
        {"preset": options.preset, "steps": options.steps, "rows": rows}, options.output, choose_device(options.device)
    )


if __name__ == "__main__":
    main()
