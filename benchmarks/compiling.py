"""Compiling MNIST on this machine: what it takes beyond reading the source.

    python benchmarks/compiling.py --data-dir FOLDER --output benchmarks/results/compiling.json

Checksums and fsync included; reading alone and both together in turn.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import arguments, report, seconds, summarise

from fastmnist.beton.writer import write_beton
from fastmnist.sources.datasets import from_folder


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    def read() -> None:
        list(from_folder("mnist", "train", options.data_dir).images.blocks(4096))

    with tempfile.TemporaryDirectory() as folder:

        def read_and_write() -> None:
            source = from_folder("mnist", "train", options.data_dir)
            write_beton(Path(folder) / "train.beton", source.images, source.labels, source=source.fingerprint)

        reading, beyond = [], []
        for repeat in range(options.repeats + 1):
            alone, both = seconds(read), seconds(read_and_write)
            if repeat:  # the first one warms the caches
                reading.append(alone)
                beyond.append(both - alone)
    result = {"compile_seconds_beyond_reading": summarise(beyond), "reading_seconds": summarise(reading)}
    report(result, options.output)


if __name__ == "__main__":
    main()
