"""What all pictures share: one style, one way to be saved, and texts that can be drawn.

Only matplotlib's object API is used: no pyplot, no open figures, no settings that outlive a call. It is imported by
the functions that draw, so that nothing else waits for it. The same input gives the same bytes.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmnist.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, QUIET, RULE = "#1f2328", "#57606a", "#d8dee4"
# Blue and orange of the Okabe-Ito palette, which colour-blind readers can tell apart; the orange is darker
# than theirs to be read as text on white.
TRAIN, VALIDATION = "#0072b2", "#b8500a"
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
    "font.family": ["DejaVu Sans"],  # it comes with matplotlib, so text looks the same everywhere
    "font.size": 10,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "image.interpolation": "nearest",
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "savefig.dpi": 150,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called "$"
    "xtick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.color": QUIET,
    "ytick.labelcolor": INK,
}


@contextmanager
def styled() -> Iterator[None]:
    """STYLE on top of matplotlib's own defaults: the user's matplotlibrc changes nothing here."""
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


def save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # no version: same input, same bytes
    write_bytes(path, buffer.getvalue())


def share_text(share: float) -> str:
    """A probability as per cent; 100 % and 0 % are kept for the exact values."""
    if 0.9995 <= share < 1:
        return ">99.9 %"
    if 0 < share < 0.0005:
        return "<0.1 %"
    return f"{100 * share:.1f} %" if 0 < share < 1 else f"{100 * share:.0f} %"


def percent_text(part: int, whole: int, digits: int) -> str:
    """The share as per cent, never rounded up to 100."""
    if part == whole:
        return "100 %"
    return f"{min(100 * part / whole, 100 - 10.0**-digits):.{digits}f} %"


@cache
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(findfont(FontProperties(family=["DejaVu Sans"]))).get_charmap())


def drawable(name: str, longest: int = 24) -> str:
    """The name as one short line that the font can draw; a character that it lacks is given by its number."""
    line = " ".join(str(name).split())
    parts = []
    for character in line:
        if unicodedata.category(character)[0] == "C" or ord(character) not in _glyphs():
            parts.append(f"U+{ord(character):04X}")
        else:
            parts.append(character)
    text = "".join(parts)
    return text if len(text) <= longest else text[: longest - 1] + "…"
