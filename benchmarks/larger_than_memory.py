"""A quasi-random epoch over a file that does not fit into memory, against reading that file: from end to end, and
its pages of 2 MiB in random order.

    python benchmarks/larger_than_memory.py --data-dir FOLDER --folder BIG_DISK \\
        --output benchmarks/results/larger_than_memory.json

All in new processes, in turn, with nothing of the file in the page cache, in a control group of its own that may use
1 GB, page cache included (Linux, and the right to make control groups: root). The file is the one that
`fastmnist compile --expand 135` writes: 8.1 million images, 6.4 GB; it is made where it is missing, and stays.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import arguments, report, summarise

EPOCH = """
import json, resource, sys, time
from fastmnist import Loader

begun = time.perf_counter()
with Loader(sys.argv[1], 2048, device="cpu") as loader:
    opened = time.perf_counter()
    images = sum(len(labels) for _, labels in loader)
    ended = time.perf_counter()
    bytes_read = images * loader.file.image_size
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print(json.dumps({"opening_seconds": opened - begun, "seconds": ended - opened, "bytes": bytes_read,
        "images": images, "order": loader.order, "resident_megabytes": int(status["VmHWM"].split()[0]) / 1e3}))
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
SIDES = {"read": READ, "read_pages": READ_PAGES, "epoch": EPOCH}


@contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A folder whose cgroup.procs takes processes that share `limit` bytes of memory."""
    old = Path("/sys/fs/cgroup/memory")
    group = (old if old.is_dir() else Path("/sys/fs/cgroup")) / f"fastmnist-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if old.is_dir() else "memory.max")).write_text(str(limit))
        yield group
    finally:
        group.rmdir()


def in_group(group: Path, script: str, path: Path) -> dict[str, Any]:
    """What the script prints, with the most memory that its group held and how often it met the limit."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    old = group / "memory.max_usage_in_bytes"
    if old.exists():
        old.write_text("0")
    command = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$0" "$@"', sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the process in the group ended with {done.returncode}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    peak = old if old.exists() else group / "memory.peak"
    found["peak_megabytes_of_group"] = int(peak.read_text()) / 1e6 if peak.exists() else None
    found["megabytes_per_second"] = found["bytes"] / found["seconds"] / 1e6
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the large file is, or is to be written")
    parser.add_argument("--factor", type=int, default=135)
    parser.add_argument("--limit", type=int, default=10**9, help="bytes of memory")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    path = options.folder / f"mnist-train-x{options.factor}.beton"
    if not path.exists():
        command = ["fastmnist", "compile", "--expand", str(options.factor), "--output", str(options.folder)]
        subprocess.run([*command, "--data-dir", str(options.data_dir)], check=True)
    os.sync()  # what is still to be written cannot leave the page cache
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    with control_group(options.limit) as group:
        for _ in range(options.repeats):
            for name, script in SIDES.items():
                rows[name].append(in_group(group, script, path))
                print(name, rows[name][-1], flush=True)
    speeds = {name: [row["megabytes_per_second"] for row in found] for name, found in rows.items()}
    result = {
        "file_megabytes": path.stat().st_size / 1e6,
        "limit_megabytes": options.limit / 1e6,
        "order": rows["epoch"][0]["order"],
        **{f"{name}_megabytes_per_second": summarise(values) for name, values in speeds.items()},
        **{
            f"epoch_over_{name}": summarise([a / b for a, b in zip(speeds["epoch"], speeds[name], strict=True)])
            for name in ("read", "read_pages")
        },
        "epoch_images_per_second": summarise([row["images"] / row["seconds"] for row in rows["epoch"]]),
        "opening_seconds": summarise([row["opening_seconds"] for row in rows["epoch"]]),
        "peak_resident_megabytes": summarise([row["resident_megabytes"] for row in rows["epoch"]]),
        "peak_megabytes_of_group": summarise([row["peak_megabytes_of_group"] for row in rows["epoch"]]),
    }
    report(result, options.output)


if __name__ == "__main__":
    main()
