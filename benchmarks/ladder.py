"""The ladder for these pages: `fastmnist ladder`, its picture, and its table in a page between two marks.

    python benchmarks/ladder.py --data-dir FOLDER --output benchmarks/results/ladder.json --page docs/benchmarks.md

The picture lies beside the JSON.
"""

from __future__ import annotations

import json
from pathlib import Path

from common import arguments

from fastmnist.files import write_bytes
from fastmnist.report.ladder_chart import ladder_markdown, plot_ladder
from fastmnist.runs.ladder import ladder
from fastmnist.system.progress import Reporter

BEGIN, END = "<!-- ladder -->\n", "<!-- /ladder -->"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--page", type=Path, help=f"Markdown file with {BEGIN.strip()} and {END}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, help="training images per run; by default as fastmnist ladder has it")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    where = {"data_dir": str(options.data_dir), "dataset": "mnist", "device": options.device}
    found = ladder(seeds=options.seeds, images=options.images, reporter=Reporter(), **where).to_dict()
    table = ladder_markdown(found)
    print(table)
    if options.output is not None:
        write_bytes(options.output, (json.dumps(found, indent=2) + "\n").encode())
        plot_ladder(found, [options.output.with_suffix(".png")])
    if options.page is not None:
        head, begin, rest = options.page.read_text().partition(BEGIN)
        _, end, tail = rest.partition(END)
        if not (begin and end):
            raise SystemExit(f"{options.page}: has no {BEGIN.strip()} and {END} to put the table between")
        write_bytes(options.page, (head + begin + table + end + tail).encode())


if __name__ == "__main__":
    main()
