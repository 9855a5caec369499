"""Picture of a `.beton` file's parts and their sizes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from fastmnist.beton.format import ALLOCATION, FIELD, HEADER
from fastmnist.beton.reader import Beton
from fastmnist.report.style import INK, QUIET, RULE, TRAIN, VALIDATION, page, save, styled
from fastmnist.system.numbers import megabytes

LEFT, RIGHT, HEIGHT, BELOW = 0.3, 0.3, 2.6, 0.2
COLOURS = (QUIET, "#8a6d00", "#56b4e9", VALIDATION, RULE, TRAIN, "#009e73")


class Part(NamedTuple):
    """start, size: in bytes."""

    name: str
    start: int
    size: int
    content: str


def parts(file: Beton) -> list[Part]:
    """The file's parts from its first to its last byte."""
    count = len(file)
    head = HEADER.itemsize
    fields = head + 2 * FIELD.itemsize
    metadata = file.head_size - fields
    pages = file.table_start - file.data_start
    sections = [
        Part("header", 0, head, "version, number of fields and samples, page size"),
        Part("fields", head, fields - head, "names and types: image, label"),
        Part("metadata", fields, metadata, f"address and label of {count:,} samples"),
    ]
    if file.integrity is not None:
        sections.append(
            Part("integrity", file.head_size, file.integrity_size, "class names, mean, std, a checksum for each page")
        )
    end = sections[-1].start + sections[-1].size
    sections += [
        Part("zeros", end, file.data_start - end, "up to a page's boundary"),
        Part("pages", file.data_start, pages, f"{pages // file.page_size} of {file.page_size >> 20} MiB, whole images"),
        Part("table", file.table_start, count * ALLOCATION.itemsize, "address and size of each image"),
    ]
    return [part for part in sections if part.size]


def plot_layout(file: Beton, path: Path) -> None:
    """Draws the parts in order as a PNG; widths are logarithms of sizes, so that small parts are seen."""
    sections = parts(file)
    heading = f"{file.path.name}: {len(file):,} images in {megabytes(file.file_size)}, read where they lie"
    with styled():
        figure, axes = page(
            heading,
            "From the first byte to the last. Widths are logarithms of sizes.",
            [],
            left=LEFT,
            right=RIGHT,
            height=HEIGHT,
            below=BELOW,
        )
        at, widths = 0.0, [math.log2(part.size + 1) for part in sections]
        whole = sum(widths)
        for number, (part, width) in enumerate(zip(sections, widths, strict=True)):
            axes.barh(0, width, left=at, height=0.5, color=COLOURS[number % len(COLOURS)], edgecolor="white")
            low = -0.42 - 0.19 * number
            axes.plot([at + width / 2] * 2, [-0.25, low], color=RULE, linewidth=1, zorder=0)
            right = at + width / 2 > whole * 0.5
            axes.text(
                at + width / 2,
                low,
                f"{part.name}, {megabytes(part.size)}: {part.content}",
                ha="right" if right else "left",
                va="top",
                fontsize=9,
                color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},  # lines to other parts end behind it
            )
            at += width
        axes.set_xlim(0, whole)
        axes.set_ylim(-0.42 - 0.19 * len(sections), 0.3)
        axes.axis("off")
        save(figure, path, heading)
