"""Style of all pictures: colours, page layout, reproducible files, and text that the font can draw.

Only matplotlib's object API is used: no pyplot, no open figures, no settings that outlive a call. The functions that
draw import it, so that nothing else waits for it. The same input gives the same bytes.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmnist.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, RULE = "#1f2328", "#57606a", "#d8dee4"
# Blue and orange of the Okabe-Ito palette, which colour-blind readers can tell apart; the orange is darkened to be
# legible as text on white.
TRAIN, VALIDATION = "#0072b2", "#b8500a"
PAGE, MARGIN = 10.0, 0.2  # inches: width of a page and of its margins
STYLE: dict[Any, Any] = {
    "axes.edgecolor": QUIET,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "font.family": ["DejaVu Sans"],  # matplotlib brings it along, so text looks the same everywhere
    "font.size": 10,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "image.interpolation": "nearest",
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "savefig.dpi": 150,
    "svg.fonttype": "path",  # letters as outlines: a reader's machine may lack the font
    "svg.hashsalt": "fastmnist",  # identifiers that stay the same
    "text.color": INK,
    "text.parse_math": False,  # a class may be called "$"
    "xtick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.color": QUIET,
    "ytick.labelcolor": INK,
}


@contextmanager
def styled() -> Iterator[None]:
    """Applies STYLE to matplotlib's own defaults, whatever the user's matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def new_figure(width: float, height: float, engine: str = "constrained") -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=engine)  # type: ignore[arg-type]
    FigureCanvasAgg(figure)
    return figure


def page(
    heading: str, origin: str, notes: Sequence[str], *, left: float, right: float, height: float, below: float
) -> tuple[Figure, Axes]:
    """A figure with a heading, a line on its origin, axes, and notes at the bottom.

    Args:
        notes: one line each.
        left, right: inches from the page's edges to the axes.
        height, below: inches of the axes, and of the space for labels below them.
    """
    across = PAGE - 2 * MARGIN
    blocks = [
        (wrapped(heading, across, 14, "bold"), 14, "bold", INK, 0.16),
        (wrapped(origin, across, 9), 9, "normal", QUIET, 0.07),
        (notes, 9, "normal", QUIET, 0.1 + height + below),
    ]
    line = 1.3 / 72  # inches per point
    whole = sum(above + line * size * len(lines) for lines, size, _, _, above in blocks) + 0.12
    figure = new_figure(PAGE, whole, engine="none")
    top = 0.0
    for lines, size, weight, colour, above in blocks:
        top += above
        for text in lines:
            figure.text(
                MARGIN / PAGE, 1 - top / whole, text, fontsize=size, fontweight=weight, color=colour, va="top"
            )  # fmt: skip
            top += line * size
    bottom = below + line * 9 * len(notes) + 0.12
    place = (left / PAGE, bottom / whole, (PAGE - left - right) / PAGE, height / whole)
    return figure, figure.add_axes(place)


def save(figure: Figure, path: Path, title: str | None = None) -> None:
    """Writes the picture in the format that the path's suffix names: same input, same bytes.

    Args:
        title: of an SVG, for readers who cannot see it.

    Raises:
        ValueError: the suffix is neither .png nor .svg.
        FastmnistError: the file cannot be written.
    """
    kind = path.suffix.lower().removeprefix(".")
    # No versions and no dates, which would change the bytes.
    metadata: dict[str, str | None]
    if kind == "png":
        metadata = {"Software": None}
    elif kind == "svg":
        metadata = {"Creator": None, "Date": None} | ({} if title is None else {"Title": title})
    else:
        raise ValueError(f"{path}: pictures are written as .png or .svg")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=metadata)
    write_bytes(path, buffer.getvalue())


@cache
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont
    from matplotlib.ft2font import FT2Font

    fonts = (findfont(FontProperties(family=["DejaVu Sans"], weight=weight)) for weight in ("normal", "bold"))
    return frozenset.intersection(*(frozenset(FT2Font(font).get_charmap()) for font in fonts))


def drawable(name: str, longest: int = 24) -> str:
    """The name as one short line; a character that the font lacks becomes its code point, U+0000."""
    line = " ".join(str(name).split())
    parts = []
    for character in line:
        if unicodedata.category(character)[0] == "C" or ord(character) not in _glyphs():
            parts.append(f"U+{ord(character):04X}")
        else:
            parts.append(character)
    text = "".join(parts)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Width in inches of one line of text at `size` points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=["DejaVu Sans"], size=size, weight=weight)
    width: float = text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]
    return width / 72


def wrapped(text: str, width: float, size: float, weight: str = "normal", most: int | None = None) -> list[str]:
    """Breaks text into lines of at most `width` inches; after `most` lines it ends in "…"."""

    def fits(line: str) -> bool:
        return text_width(line, size, weight) <= width

    lines, line = [], ""
    for word in text.split():
        if fits(f"{line} {word}".strip()):
            line = f"{line} {word}".strip()
            continue
        if line:
            lines.append(line)
        while len(word) > 1 and not fits(word):  # longer than a line
            cut = next(cut for cut in range(len(word) - 1, 0, -1) if cut == 1 or fits(word[:cut]))
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    lines.append(line)
    if most is not None and len(lines) > most:
        last = " ".join(lines[most - 1 :])
        while last and not fits(f"{last}…"):
            last = last[:-1]
        lines = [*lines[: most - 1], f"{last}…"]
    return lines
