"""Speed and memory of `fastmnist compile --expand`, against writing random bytes of the same size.

    python benchmarks/research/expand.py --data-dir FOLDER --output benchmarks/results/expand.json [--folder DISK]

Evidence for writing the large file in one go: 8.1 million images take 10 s. The command runs in a process of its own,
in a temporary folder where the two usual files are already; "seconds" is from start to exit, imports and the last fsync
included. Memory is the largest resident set of the process (VmHWM; ru_maxrss would count this script's own). Random
bytes of the same size are written to the same folder right after, with fsync: the disk's limit.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fastmnist.files import write_json
from fastmnist.system.environment import origin
from fastmnist.system.statistics import ratios, row

TRAINING_IMAGES = 60_000
COMMAND = """
import re, sys
from pathlib import Path
from fastmnist.cli.main import main

status = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
sys.exit(status)
"""


def compile_command(data: Path, folder: Path, factor: int) -> tuple[float, float]:
    """Seconds and bytes of memory of `fastmnist compile --expand`."""
    flags = ["--data-dir", str(data), "--output", str(folder), "--expand", str(factor)]
    begun = time.perf_counter()
    command = [sys.executable, "-c", COMMAND, "compile", *flags]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - begun, 1024 * float(done.stdout.splitlines()[-1])


def write_random(path: Path, size: int) -> float:
    """Seconds to write `size` random bytes, fsync included."""
    pieces = [os.urandom(1 << 21) for _ in range(4)]
    begun = time.perf_counter()
    with open(path, "wb") as file:
        for number in range(-(-size // len(pieces[0]))):
            file.write(pieces[number % 4])
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with MNIST's four IDX files")
    parser.add_argument("--output", required=True, help="JSON file for the rows")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made; by default the system's")
    parser.add_argument("--factors", type=int, nargs="+", default=[20] * 6 + [135], help="copies of each image, by run")
    options = parser.parse_args()
    runs: dict[int, list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        compile_command(options.data_dir, folder, 1)  # warms the caches, numba's too
        for factor in options.factors:
            path = folder / f"mnist-train-x{factor}.beton"
            seconds, memory = compile_command(options.data_dir, folder, factor)
            size = path.stat().st_size
            path.unlink()
            runs.setdefault(factor, []).append((seconds, memory, write_random(path, size)))
            path.unlink()
            print(factor, runs[factor][-1], flush=True)
    rows, where = [], origin(torch.device("cpu"))
    for factor, measured in runs.items():
        seconds, memory, written = zip(*measured, strict=True)
        rates = [factor * TRAINING_IMAGES / value for value in seconds]
        settings = {"expand": factor}
        rows.append(
            row("expand", "rate", rates, "images/s", where, settings, of_limit=ratios(written, seconds).to_dict())
        )
        rows.append(row("expand", "peak memory", memory, "bytes", where, settings))
    write_json(options.output, {"rows": rows})


if __name__ == "__main__":
    main()
