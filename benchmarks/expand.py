"""`fastmnist compile --expand` on this machine: how fast, in how much memory, and what the disk alone would take.

    python benchmarks/expand.py --data-dir FOLDER --output benchmarks/results/expand.json

The command line itself runs in a process of its own, in a temporary folder (in --folder) where the two usual files are
already. "seconds" is from start to exit, with Python's start, the imports and the last fsync; "writing" is the large
file alone, fsync included; "processor" is the time of all cores, which others on the machine change least. Memory is
the process's largest resident set (VmHWM; ru_maxrss would count this script's own). For the disk's part, random bytes
of the same size are written to the same folder right after, with fsync: plainly, and as the command does it, letting
go of what is on the disk.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

from common import arguments, report, summarise

from fastmnist.prepare.expand import Streamed

TRAINING_IMAGES = 60_000
PIECE = 1 << 21  # bytes of one write

COMMAND = """
import re, sys, time
from pathlib import Path
from fastmnist.cli.main import main
from fastmnist.prepare import expand

write, writing = expand.write_expanded, []

def timed(*arguments, **options):
    begun = time.perf_counter()
    write(*arguments, **options)
    writing.append(time.perf_counter() - begun)

expand.write_expanded = timed
status = main(sys.argv[1:])
print(*writing, time.process_time(), re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
sys.exit(status)
"""


def compile_command(data: Path, folder: Path, factor: int) -> dict[str, float]:
    """`fastmnist compile`: what it took in seconds and memory."""
    flags = ["--data-dir", str(data), "--output", str(folder), "--expand", str(factor)]
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "compile", *flags], check=True, capture_output=True, text=True
    )
    seconds = time.perf_counter() - begun
    writing, processor, memory = map(float, done.stdout.splitlines()[-1].split())
    return {
        "seconds": seconds,
        "writing_seconds": writing,
        "processor_seconds": processor,
        "peak_memory_megabytes": memory * 1024 / 1e6,
    }


def write_random(file: BinaryIO, size: int) -> float:
    """Seconds to write `size` random bytes, fsync included."""
    pieces = [os.urandom(PIECE) for _ in range(4)]
    begun = time.perf_counter()
    for number in range(-(-size // PIECE)):
        file.write(pieces[number % 4])
    file.flush()
    os.fsync(file.fileno())
    return time.perf_counter() - begun


def measure(data: Path, folder: Path, factor: int) -> dict[str, float]:
    """One run of each side; the files are deleted again."""
    path, spare = folder / f"mnist-train-x{factor}.beton", folder / "random"
    taken = compile_command(data, folder, factor)
    size = path.stat().st_size
    path.unlink()
    with open(spare, "wb") as file:
        plain = write_random(file, size)
    spare.unlink()
    with Streamed(spare) as file:
        streamed = write_random(file, size)
    spare.unlink()
    images, writing = factor * TRAINING_IMAGES, taken["writing_seconds"]
    return taken | {
        "images_per_second": images / taken["seconds"],
        "writing_images_per_second": images / writing,
        "writing_megabytes_per_second": size / writing / 1e6,
        "plain_write_megabytes_per_second": size / plain / 1e6,
        "streamed_write_megabytes_per_second": size / streamed / 1e6,
        "streamed_write_over_writing_seconds": streamed / writing,
        "file_megabytes": size / 1e6,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--factor", type=int, default=135, help="copies of each image in the large run, made once")
    parser.add_argument("--small-factor", type=int, default=20, help="in the runs that are repeated")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made; by default the system's")
    options = parser.parse_args()
    result: dict[str, Any] = {"factor": options.factor, "small_factor": options.small_factor}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        compile_command(options.data_dir, folder, 1)  # warms the caches, numba's too
        (folder / "mnist-train-x1.beton").unlink()
        small = [measure(options.data_dir, folder, options.small_factor) for _ in range(options.repeats)]
        result["small"] = {key: summarise([run[key] for run in small]) for key in small[0]}
        result["large"] = measure(options.data_dir, folder, options.factor)
    report(result, options.output)


if __name__ == "__main__":
    main()
