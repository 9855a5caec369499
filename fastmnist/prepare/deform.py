"""Elastic and affine deformation of images, for `fastmnist compile --expand`.

A copy is resampled after a random affine map and a smooth random displacement of every pixel: the elastic distortion
of P. Simard, D. Steinkraus, J. Platt, "Best practices for convolutional neural networks applied to visual document
analysis", ICDAR 2003. As in O. Ronneberger, P. Fischer, T. Brox, "U-Net", MICCAI 2015, the displacements are random at
the points of a coarse grid, and cubic B-splines interpolate them.

The kernels only add, multiply and divide, in an order that the compiler keeps. They use no cosine, which each machine
rounds in its own way: a copy is the same everywhere.
"""

from __future__ import annotations

import numpy as np

from fastmnist.loader.kernels import jit, mend_array_types
from fastmnist.loader.warp import blend, interleave, locate, pixel_grid, scratch, transform

VERSION = 1  # of the deformation; each makes its own images of a seed
EXPAND_STREAM = 16  # of random bits; other streams are in `fastmnist.loader.order`

# Largest values; each draw is uniform from -value to value.
HALF_ANGLE = np.float32(0.13)  # tangent of half the rotation: 15 degrees
SCALE = np.float32(0.15)  # of each axis, independently
SHEAR = np.float32(0.15)
SHIFT = np.float32(2 / 28)  # of the longer side
ELASTIC = np.float32(3 / 28)  # of the longer side, at the grid's points; at most pixels a third of it or less

CELLS = 4  # of the grid, along each axis
POINTS = CELLS + 3  # of the grid, along each axis: a cubic B-spline needs one cell beyond the image
FIELD = POINTS * POINTS  # points of the grid
BITS = 16  # of a draw
WORDS = 28  # 64-bit random words for an image: its draws, rounded up to whole Philox blocks
DRAWS = WORDS * 64 // BITS  # the first 2 * FIELD displace the grid's points, the next 6 are the affine map's
PHILOX_WORDS = 4  # in a block, the step of Philox.advance
BATCH = 256  # images whose random bits are drawn together: they stay in the cache
VECTOR = 32  # padded rows are multiples of it, so that their loops vectorise


@jit
def _signed(draw):  # type: ignore[no-untyped-def]
    """A draw of 0 to 2^16 - 1 as -1 to 1, float32."""
    return (np.float32(draw) - np.float32(32767.5)) * np.float32(1 / 32767.5)


@jit
def _affine(draws, height, width, side, matrix):  # type: ignore[no-untyped-def]
    """matrix (2, 3) float32 = shift after rotation after shear and scale, about the image's centre."""
    one = np.float32(1)
    half = _signed(draws[0]) * HALF_ANGLE
    cosine, sine = (one - half * half) / (one + half * half), (half + half) / (one + half * half)
    along, across = one + _signed(draws[1]) * SCALE, one + _signed(draws[2]) * SCALE
    shear = _signed(draws[3]) * SHEAR
    matrix[0, 0], matrix[0, 1] = cosine * along, cosine * shear - sine * across
    matrix[1, 0], matrix[1, 1] = sine * along, sine * shear + cosine * across
    x, y = np.float32(width - 1) / np.float32(2), np.float32(height - 1) / np.float32(2)
    matrix[0, 2] = x + _signed(draws[4]) * SHIFT * side - (matrix[0, 0] * x + matrix[0, 1] * y)
    matrix[1, 2] = y + _signed(draws[5]) * SHIFT * side - (matrix[1, 0] * x + matrix[1, 1] * y)


@jit
def _displace(draws, strength, basis_x, basis_y, first, rows, field, to):  # type: ignore[no-untyped-def]
    """to (H * W,) += the spline with the coefficients `draws` (FIELD,) at the grid's points.

    basis_x: (POINTS, wide) float32, zero beyond the width. basis_y: (4, H) float32, weights of the points first[y] to
    first[y] + 3. rows (POINTS, wide) and field (H * W + wide,) float32 are scratch.
    """
    b0, b1, b2, b3 = basis_x[0], basis_x[1], basis_x[2], basis_x[3]
    b4, b5, b6 = basis_x[4], basis_x[5], basis_x[6]
    for r in range(POINTS):
        p0, p1 = _signed(draws[r * POINTS]) * strength, _signed(draws[r * POINTS + 1]) * strength
        p2, p3 = _signed(draws[r * POINTS + 2]) * strength, _signed(draws[r * POINTS + 3]) * strength
        p4, p5 = _signed(draws[r * POINTS + 4]) * strength, _signed(draws[r * POINTS + 5]) * strength
        p6 = _signed(draws[r * POINTS + 6]) * strength
        row = rows[r]
        for x in range(len(row)):
            row[x] = p0 * b0[x] + p1 * b1[x] + p2 * b2[x] + p3 * b3[x] + p4 * b4[x] + p5 * b5[x] + p6 * b6[x]
    width, wide = len(to) // len(first), rows.shape[1]
    for y in range(len(first)):
        w0, w1, w2, w3 = basis_y[0, y], basis_y[1, y], basis_y[2, y], basis_y[3, y]
        r0, r1, r2, r3 = rows[first[y]], rows[first[y] + 1], rows[first[y] + 2], rows[first[y] + 3]
        line = field[y * width : y * width + wide]  # the next line overwrites the surplus
        for x in range(wide):
            line[x] = w0 * r0[x] + w1 * r1[x] + w2 * r2[x] + w3 * r3[x]
    for j in range(len(to)):
        to[j] += field[j]


@jit
def _deform(data, offsets, start, draws, height, width, basis_x, basis_y, first, out):  # type: ignore[no-untyped-def]
    """out[i] = image (start + i) mod N, deformed by draws[i]; draws (n, DRAWS) uint16, out (n, H * W * C) uint8."""
    pixels, wide, size = height * width, basis_x.shape[1], out.shape[1]
    channels = size // pixels
    side = np.float32(max(height, width))
    x, y = pixel_grid(height, width)
    padded, words = scratch(height, width)
    places, found = np.empty(pixels, np.int32), np.empty(pixels, np.uint32)
    in_x, in_y, values = np.empty(pixels, np.float32), np.empty(pixels, np.float32), np.empty(pixels, np.float32)
    rows, field = np.empty((POINTS, wide), np.float32), np.empty(pixels + wide, np.float32)
    matrix, half = np.empty((2, 3), np.float32), np.float32(0.5)
    for i in range(len(out)):
        at = offsets[(start + i) % len(offsets)]
        drawn = draws[i]
        _affine(drawn[2 * FIELD :], height, width, side, matrix)
        transform(matrix, x, y, in_x, in_y)
        _displace(drawn, ELASTIC * side, basis_x, basis_y, first, rows, field, in_x)
        _displace(drawn[FIELD:], ELASTIC * side, basis_x, basis_y, first, rows, field, in_y)
        locate(in_x, in_y, height, width, places)
        for channel in range(channels):
            interleave(data[at : at + size], height, width, channels, channel, padded, words)
            blend(words, places, in_x, in_y, found, values)
            row = out[i]
            if channels == 1:  # a constant step of 1 vectorises
                for j in range(pixels):
                    row[j] = np.int32(values[j] + half)
            else:
                for j in range(pixels):
                    row[j * channels + channel] = np.int32(values[j] + half)


def spline_basis(length: int) -> np.ndarray:
    """Uniform cubic B-spline basis (I. Schoenberg, 1946): weight of each grid point at each of `length` pixels.

    The pixels' centres span CELLS cells from the second point on; the weights at a pixel add up to 1.

    >>> spline_basis(28).shape  # (POINTS, length) float64
    (7, 28)
    """
    position = np.arange(length) * (CELLS / max(length - 1, 1)) + 1
    distance = np.abs(position - np.arange(POINTS)[:, None])
    near, far = 2 / 3 - distance**2 + distance**3 / 2, np.maximum(2 - distance, 0) ** 3 / 6
    return np.where(distance < 1, near, far)


class Deformer:
    """Deformed images: sample i is image i mod N, deformed by a pure function of (seed, i).

    >>> images = np.full((2, 28, 28), 255, np.uint8)  # (N, H, W)
    >>> deformer = Deformer(images.reshape(-1), np.array([0, 784]), (28, 28, 1), seed=0)
    >>> copies = np.zeros((5, 784), np.uint8)
    >>> deformer(1000, copies)  # samples 1000 to 1004
    >>> bool((copies.mean(1) > 100).all())
    True

    Args:
        data, offsets, image_shape: a Beton's attributes: its bytes, (N,) int64 where each image starts, (H, W, C).
        seed: 0 or more.
    """

    def __init__(self, data: np.ndarray, offsets: np.ndarray, image_shape: tuple[int, int, int], seed: int) -> None:
        mend_array_types()
        self.data, self.offsets, self.seed = data, offsets, seed
        self.height, self.width, _ = image_shape
        along, down = spline_basis(self.width), spline_basis(self.height)
        self._basis_x = np.zeros((POINTS, -(-self.width // VECTOR) * VECTOR), np.float32)
        self._basis_x[:, : self.width] = along
        line = np.arange(self.height)
        self._first = np.minimum(line * CELLS // max(self.height - 1, 1), CELLS - 1)
        self._basis_y = np.stack([down[self._first + tap, line] for tap in range(4)]).astype(np.float32)

    def __call__(self, start: int, out: np.ndarray) -> None:
        """Fills `out` (n, H * W * C) uint8 with samples from `start` on; thread-safe."""
        sequence = np.random.SeedSequence([self.seed, 0, EXPAND_STREAM])
        philox = np.random.Philox(sequence).advance(start * (WORDS // PHILOX_WORDS))
        for at in range(0, len(out), BATCH):
            part = out[at : at + BATCH]
            words = philox.random_raw(len(part) * WORDS).astype("<u8", copy=False)
            draws = words.view("<u2").astype(np.uint16, copy=False).reshape(len(part), DRAWS)
            _deform(
                self.data,
                self.offsets,
                start + at,
                draws,
                self.height,
                self.width,
                self._basis_x,
                self._basis_y,
                self._first,
                part,
            )


@jit
def add_up(values, channels, total, squares):  # type: ignore[no-untyped-def]
    """Adds the sums of `values` (n,) uint8 and of their squares, by channel, to total and squares, (C,) int64."""
    part = channels << 14  # values, whose squares sum to less than 2^31
    for start in range(0, len(values), part):
        some = values[start : start + part]
        for channel in range(channels):
            one, two = np.int32(0), np.int32(0)
            if channels == 1:
                for value in some:
                    one += np.int32(value)
                    two += np.int32(value) * np.int32(value)
            else:
                for j in range(channel, len(some), channels):
                    one += np.int32(some[j])
                    two += np.int32(some[j]) * np.int32(some[j])
            total[channel] += one
            squares[channel] += two
