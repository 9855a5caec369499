"""Normalisation of a picture of one character to the form of MNIST's images.

The recipe is that of the MNIST database (Y. LeCun, C. Cortes, C. Burges): keep the aspect ratio, fit the character
into a 20x20 box with anti-aliasing, then put its centre of mass in the centre of the 28x28 field.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from fastmnist.errors import FastmnistError
from fastmnist.sources.pictures import open_picture, upright

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

WORKING_SIDE = 1024  # pixels; a larger picture is shrunk to it first, for speed
MIN_CONTRAST = 20.0  # of 255; weaker marks are paper grain or JPEG artefacts
EDGE = 0.25  # of full ink; the character's box ends here, so that soft edges do not widen it
CUT = 0.08  # of full ink; weaker values are background
SPECK = 0.01  # of the largest mark's area; a smaller mark is dust and does not widen the box
MIN_STROKE = 1.5 / 20  # width over the character's longer side; thinner strokes would fade at 28 pixels
WHITES = (255.0, 1023.0, 4095.0, 65535.0)  # the top of 8, 10, 12 and 16 bits
BOX_SHARE = 20 / 28  # side of the box that holds the character over the side of the field


def mnist_like(picture: Image.Image, size: int = 28) -> npt.NDArray[np.uint8]:
    """Normalises a picture of one character as MNIST's images were made.

    >>> picture = Image.new("RGB", (200, 300), "white")
    >>> picture.paste("navy", (90, 50, 110, 250))  # a stroke of 20x200
    >>> image = mnist_like(picture)  # (28, 28) uint8
    >>> np.argwhere(image).min(0), np.argwhere(image).max(0)
    (array([ 4, 14]), array([23, 15]))

    Args:
        picture: of any size and mode, dark on light or light on dark; transparent areas count as background. It is not
            changed.
        size: side of the result in pixels, at least 1. The character's box is 20/28 of it.

    Returns:
        (size, size) uint8, light strokes (at most 255) on black (0).

    Raises:
        FastmnistError: the picture is blank, or its mode cannot be turned into grey or RGB.
        ValueError: `size` is less than 1.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, not {size}")
    if 0 in picture.size:
        raise FastmnistError(f"The picture has no pixels ({picture.width}x{picture.height}). Use another one.")
    ink = _ink(upright(picture))
    return _centred(_fitted(ink, max(1, round(size * BOX_SHARE))), size)


def read_picture(path: str | os.PathLike[str], size: int = 28) -> npt.NDArray[np.uint8]:
    """Opens an image file and normalises it with `mnist_like`.

    Args:
        path: a file in any format that Pillow reads; of several frames the first is used.
        size: side of the result in pixels.

    Returns:
        (size, size) uint8, light strokes on black.

    Raises:
        FastmnistError: the file is missing, a folder, no image, damaged, far too large, or blank.
    """
    file = Path(path)
    if file.is_dir():
        raise FastmnistError(f"{file} is a folder. Name one image file in it.")
    picture = open_picture(file, str(file))
    try:
        return mnist_like(picture, size)
    except FastmnistError as error:
        raise FastmnistError(f"{file}: {error}") from error


def _ink(picture: Image.Image) -> Floats:
    """Ink on each pixel: (H, W) float64, 0 for background to 1 for a full stroke."""
    colours, alpha = _planes(picture)
    if alpha is not None and not (alpha >= 0.5).any():
        raise _blank()
    if alpha is not None:
        if _strokes_only(colours, alpha):
            return np.where(alpha < CUT, 0.0, alpha)
        # The opaque part brings its own paper: its median colour continues under the transparent part.
        paper = np.median(colours[alpha >= 0.5], axis=0)
        colours = paper + (colours - paper) * alpha[..., None]

    difference = colours - _background(colours)
    distance = np.sqrt(np.mean(difference**2, axis=2))
    contrast = float(distance.max())
    if contrast < MIN_CONTRAST:
        raise _blank()
    # The projection on the direction from paper to ink undoes the mixing at soft edges, whatever the two colours, and
    # drops noise across that direction.
    strokes = distance > contrast / 2
    direction = difference[strokes].mean(axis=0)
    along = difference @ direction
    full = float(np.percentile(along[strokes], 75))
    if full <= 0:  # strokes of opposite colours cancel out: the plain distance must do
        along, full = distance, contrast
    ink = np.clip(along / full, 0.0, 1.0)
    return np.where(ink < CUT, 0.0, ink)


def _planes(picture: Image.Image) -> tuple[Floats, Floats | None]:
    """Colours (H, W, 1 or 3) in 0..255 and alpha (H, W) in 0..1, or None where nothing is transparent."""
    if picture.mode.startswith(("I", "F")):
        grey = np.nan_to_num(np.array(picture, dtype=np.float32), copy=False, posinf=0.0, neginf=0.0)
        # These modes do not define white: the smallest usual range that holds the values.
        top = float(max(grey.max(), -grey.min()))
        whites = (1.0, *WHITES) if picture.mode.startswith("F") else WHITES
        white = next((usual for usual in whites if top <= usual), top)
        grey *= 255.0 / white
        picture = Image.fromarray(grey)
        return np.asarray(_shrunk(picture), dtype=np.float64)[..., None], None
    try:
        if picture.has_transparency_data:
            # Pillow weights colours by alpha when it resizes RGBA, so that hidden colours do not leak out.
            planes = np.asarray(_shrunk(picture.convert("RGBA")), dtype=np.float64)
            alpha = planes[..., 3] / 255
            return planes[..., :3], alpha if alpha.min() < 1 else None
        grey_mode = picture.mode in ("1", "L")
        planes = np.asarray(_shrunk(picture.convert("L" if grey_mode else "RGB")), dtype=np.float64)
    except ValueError as error:
        raise FastmnistError(f"A picture of mode {picture.mode} cannot be used. Save it as RGB.") from error
    return planes if planes.ndim == 3 else planes[..., None], None


def _shrunk(picture: Image.Image) -> Image.Image:
    """The picture with no side over WORKING_SIDE, aspect ratio kept."""
    scale = WORKING_SIDE / max(picture.size)
    if scale >= 1:
        return picture
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BOX)


def _strokes_only(colours: Floats, alpha: Floats) -> bool:
    """Whether the opaque part is strokes alone (a drawing on glass), not a piece of paper with strokes.

    Paper fills most of its bounding box and has two tones; strokes leave gaps or have one tone.
    """
    opaque = alpha >= 0.5
    low, high = np.percentile(colours[opaque].mean(axis=1), (1, 99))
    return bool(opaque[_bounding_box(opaque)].mean() < 0.6 or high - low < 2 * MIN_CONTRAST)


def _background(colours: Floats) -> Floats:
    """The paper's colour at every pixel, (H, W, channels): a level and its slope across the picture.

    Pixels split into two tones along the first principal component of their colours. The paper is the tone with the
    larger share of the border and of the area, added: strokes cover little of either, and a tightly cropped bold
    character that covers much of one seldom covers much of the other.
    """
    height, width, channels = colours.shape
    flat = colours.reshape(-1, channels)
    _, directions = np.linalg.eigh(np.atleast_2d(np.cov(flat.T, bias=True)))
    tone = (flat @ directions[:, -1]).reshape(height, width)
    upper = tone > _split(tone)
    margin = max(1, min(height, width) // 20)
    inside = np.zeros((height, width), dtype=bool)
    inside[margin:-margin, margin:-margin] = True
    border_share = upper[~inside].mean()
    paper = upper if border_share + upper.mean() > 1 else ~upper
    if not paper.any():
        paper = ~paper
    level = np.median(colours[paper], axis=0)

    # A mild shadow is a plane through the pixels near the level, which leaves out the soft edges of strokes.
    distance = np.abs(colours - level).max(axis=2)
    near = distance <= max(2.0, float(distance.max()) / 4)
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    terms = np.stack([np.ones_like(rows), rows, columns], axis=2)
    plane, *_ = np.linalg.lstsq(terms[near], colours[near] - level, rcond=None)
    fitted: Floats = level + terms @ plane
    return fitted


def _split(tone: Floats) -> float:
    """Otsu's threshold: the level with the most variance between the two groups (N. Otsu, 1979)."""
    counts, edges = np.histogram(tone, bins=256)
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * middles)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = sums / below - (sums[-1] - sums) / above
        between = np.nan_to_num(below.astype(np.float64) * above * gap**2, posinf=0.0, neginf=0.0)
    return float(edges[int(between.argmax()) + 1])


def _fitted(ink: Floats, box: int) -> Floats:
    """The character cut out and scaled so that its longer side is `box` pixels, aspect ratio kept."""
    strokes = _without_specks(ink > EDGE)
    window = _bounding_box(strokes)
    cut, strokes = ink[window], strokes[window]
    growth = (MIN_STROKE * max(cut.shape) - _width(strokes)) / 2
    if growth > 0:  # shrunk as they are, thin strokes would fade or vanish
        room = math.ceil(growth)
        distance = ndimage.distance_transform_edt(~np.pad(strokes, room))
        cut = np.maximum(np.pad(cut, room), np.clip(growth + 1 - distance, 0.0, 1.0))
    scale = box / max(cut.shape)
    height, width = (max(1, round(side * scale)) for side in cut.shape)
    small = Image.fromarray(cut.astype(np.float32)).resize((width, height), Image.Resampling.HAMMING)
    return np.clip(np.asarray(small, dtype=np.float64), 0.0, 1.0)


def _bounding_box(marked: Mask) -> tuple[slice, slice]:
    box: tuple[slice, slice] = ndimage.find_objects(marked.astype(np.uint8))[0]
    return box


def _without_specks(marked: Mask) -> Mask:
    """Drops marks below SPECK of the largest one's area; pieces at most two pixels apart are one mark."""
    around = np.ones((3, 3))
    marks, _ = ndimage.label(ndimage.binary_dilation(marked, around), around)
    areas = np.bincount(marks[marked])
    kept: Mask = marked & (areas >= SPECK * areas.max())[marks]
    return kept


def _width(strokes: Mask) -> float:
    """Width of the strokes in pixels, from the depth of their pixels: robust to rough edges and small holes."""
    depths = ndimage.distance_transform_edt(np.pad(strokes, 1))
    return 2 * float(np.percentile(depths[depths > 0], 90, method="lower")) - 1


def _centred(character: Floats, size: int) -> npt.NDArray[np.uint8]:
    """The character on a black field, moved by whole pixels so that its centre of mass is in the centre.

    The centre is the middle of pixel 14 (from 0), half a pixel below and to the right of the field's geometric centre:
    there MNIST's own files have it, to within half a pixel.
    """
    field = np.zeros((size, size), dtype=np.uint8)
    height, width = character.shape
    row, column = ndimage.center_of_mass(character)
    # No stroke is pushed over the field's edge.
    top = min(max(round(size // 2 - row), 0), size - height)
    left = min(max(round(size // 2 - column), 0), size - width)
    field[top : top + height, left : left + width] = np.rint(character * 255)
    return field


def _blank() -> FastmnistError:
    return FastmnistError("The picture is blank: nothing stands out from its background. Use one with a character.")
