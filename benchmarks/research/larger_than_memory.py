"""A quasi-random epoch over a file that does not fit into memory, against reading that file.

    python benchmarks/research/larger_than_memory.py --data-dir FOLDER --folder BIG_DISK \\
        --output benchmarks/results/larger_than_memory.json

Evidence for the windows of the quasi-random order and their reading ahead (loader/windows.py). The limits are reading
the file from end to end, and its pages of 2 MiB in random order. Each is a new process, in turn, with nothing of the
file in the page cache, in a control group that may use 1 GB, page cache included (Linux, as root). The file is that of
`fastmnist compile --expand 135`: 8.1 million images, 6.4 GB; it is made where it is missing, and stays.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastmnist.files import write_json
from fastmnist.system.environment import origin
from fastmnist.system.statistics import ratios, row

EPOCH = """
import json, sys, time
from fastmnist import Loader

with Loader(sys.argv[1], 2048, device="cpu") as loader:
    begun = time.perf_counter()
    images = sum(len(labels) for _, labels in loader)
    print(json.dumps({"seconds": time.perf_counter() - begun, "bytes": images * loader.file.image_size,
        "images": images, "order": loader.order}))
"""
READ = """
import json, sys, time

block, total = bytearray(2 << 20), 0
begun = time.perf_counter()
with open(sys.argv[1], "rb", buffering=0) as file:
    while count := file.readinto(block):
        total += count
print(json.dumps({"seconds": time.perf_counter() - begun, "bytes": total}))
"""
READ_PAGES = """
import json, os, random, sys, time

size = 2 << 20
block = bytearray(size)
begun = time.perf_counter()
with open(sys.argv[1], "rb", buffering=0) as file:
    starts = list(range(0, os.fstat(file.fileno()).st_size - size, size))
    random.Random(0).shuffle(starts)
    for at, start in enumerate(starts):
        for coming in starts[at : at + 3]:
            os.posix_fadvise(file.fileno(), coming, size, os.POSIX_FADV_WILLNEED)
        os.preadv(file.fileno(), [block], start)
print(json.dumps({"seconds": time.perf_counter() - begun, "bytes": size * len(starts)}))
"""
SCRIPTS = {"read": READ, "read pages": READ_PAGES, "epoch": EPOCH}


@contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A folder whose cgroup.procs takes processes that share `limit` bytes of memory."""
    v1 = Path("/sys/fs/cgroup/memory")
    group = (v1 if v1.is_dir() else Path("/sys/fs/cgroup")) / f"fastmnist-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if v1.is_dir() else "memory.max")).write_text(str(limit))
        yield group
    finally:
        group.rmdir()


def in_group(group: Path, script: str, path: Path) -> dict[str, Any]:
    """The script's output, parsed, and the peak memory of its control group."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    peak = group / "memory.max_usage_in_bytes"
    if peak.exists():
        peak.write_text("0")
    else:
        peak = group / "memory.peak"
    command = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$0" "$@"', sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout) | {"group_bytes": int(peak.read_text())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder with MNIST's four IDX files")
    parser.add_argument("--output", required=True, help="JSON file for the rows")
    parser.add_argument("--folder", type=Path, required=True, help="where the large file is, or is to be written")
    parser.add_argument("--factor", type=int, default=135)
    parser.add_argument("--limit", type=int, default=10**9, help="bytes of memory")
    parser.add_argument("--repeats", type=int, default=6)
    options = parser.parse_args()
    path = options.folder / f"mnist-train-x{options.factor}.beton"
    if not path.exists():
        command = ["fastmnist", "compile", "--expand", str(options.factor), "--output", str(options.folder)]
        subprocess.run([*command, "--data-dir", options.data_dir], check=True)
    os.sync()  # what is still to be written cannot leave the page cache
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SCRIPTS}
    with control_group(options.limit) as group:
        for _ in range(options.repeats):
            for name, script in SCRIPTS.items():
                runs[name].append(in_group(group, script, path))
                print(name, runs[name][-1], flush=True)
    rates = {name: [run["bytes"] / run["seconds"] for run in done] for name, done in runs.items()}
    epochs, where = runs["epoch"], origin(torch.device("cpu"))
    settings = {"file_bytes": path.stat().st_size, "limit_bytes": options.limit, "order": epochs[0]["order"]}
    group_name = "larger than memory"
    rows = [row(group_name, name, values, "bytes/s", where, settings) for name, values in rates.items()]
    images = [run["images"] / run["seconds"] for run in epochs]
    limits = {
        "of_limit": ratios(rates["epoch"], rates["read pages"]).to_dict(),
        "of_reading": ratios(rates["epoch"], rates["read"]).to_dict(),
    }
    rows.append(row(group_name, "quasi-random epoch", images, "images/s", where, settings, **limits))
    peaks = [run["group_bytes"] for run in epochs]
    rows.append(row(group_name, "peak memory of the epoch", peaks, "bytes", where, settings))
    write_json(options.output, {"rows": rows})


if __name__ == "__main__":
    main()
