"""Bilinear resampling on the host, for the loader's augmentation and `fastmnist compile --expand`.

An output pixel needs four neighbouring bytes of the input. They are first packed into one 32-bit word per place, with a
margin of background around the image: one load then fetches a pixel's input, no border is tested, and the arithmetic
vectorises. Arrays are flat, because a row of 28 pixels fills no vectors.

A matrix (2, 3) maps output pixels to input pixels: x_in = m[0] . (x, y, 1), y_in = m[1] . (x, y, 1), the centre of the
first pixel at 0. Outside of the image is background, 0.
"""

from __future__ import annotations

import math

import numpy as np

from fastmnist.loader.kernels import LINE, jit, lines_of, prefetch, rows_ahead

MARGIN = 3  # columns around the image: one on its left, two on its right


@jit
def pixel_grid(height, width):  # type: ignore[no-untyped-def]
    """(x, y) of every pixel, each (H * W,) float32."""
    x, y = np.empty(height * width, np.float32), np.empty(height * width, np.float32)
    for j in range(height * width):
        x[j], y[j] = j % width, j // width
    return x, y


@jit
def scratch(height, width):  # type: ignore[no-untyped-def]
    """(padded, words) for `interleave`: uint8 and uint32, zero, a margin wide around the image."""
    stride = width + MARGIN
    return np.zeros((height + MARGIN + 1) * stride, np.uint8), np.zeros((height + 2) * stride, np.uint32)


@jit
def interleave(image, height, width, channels, channel, padded, words):  # type: ignore[no-untyped-def]
    """words[y * (W + MARGIN) + x] = the bytes of rows y - 1 and y, columns x - 1 and x, of one channel of `image`."""
    stride = width + MARGIN
    for y in range(height):
        row = padded[(y + 1) * stride + 1 : (y + 1) * stride + 1 + width]
        if channels == 1:
            line = image[y * width : (y + 1) * width]
            for x in range(width):
                row[x] = line[x]
        else:
            for x in range(width):
                row[x] = image[(y * width + x) * channels + channel]
    right, lower, lower_right = padded[1:], padded[stride:], padded[stride + 1 :]
    for k in range(len(words)):
        words[k] = (
            np.uint32(padded[k])
            | np.uint32(right[k]) << np.uint32(8)
            | np.uint32(lower[k]) << np.uint32(16)
            | np.uint32(lower_right[k]) << np.uint32(24)
        )


@jit
def transform(matrix, x, y, in_x, in_y):  # type: ignore[no-untyped-def]
    """in_x, in_y = `matrix` (2, 3) float32 applied to each pixel (x, y); all (H * W,) float32."""
    a, b, c = matrix[0, 0], matrix[0, 1], matrix[0, 2]
    d, e, f = matrix[1, 0], matrix[1, 1], matrix[1, 2]
    for j in range(len(x)):
        in_x[j] = a * x[j] + b * y[j] + c
        in_y[j] = d * x[j] + e * y[j] + f


@jit
def locate(in_x, in_y, height, width, places):  # type: ignore[no-untyped-def]
    """places (H * W,) int32 = the word of each pixel; in_x, in_y become the weights of its right and lower bytes."""
    stride, one, nought = np.int32(width + MARGIN), np.float32(1), np.float32(0)
    last_x, last_y = np.float32(width + 1), np.float32(height + 1)
    for j in range(len(places)):
        x = min(max(in_x[j] + one, nought), last_x)  # beyond the margin is background too
        y = min(max(in_y[j] + one, nought), last_y)
        column, row = np.int32(x), np.int32(y)
        in_x[j] = x - np.float32(column)
        in_y[j] = y - np.float32(row)
        places[j] = row * stride + column


@jit
def blend(words, places, right, lower, gathered, values):  # type: ignore[no-untyped-def]
    """values (H * W,) float32, 0 to 255, from the results of `locate`; gathered (H * W,) uint32 is scratch."""
    byte = np.uint32(255)
    for j in range(len(values)):  # a loop of its own, so that the arithmetic vectorises
        gathered[j] = words[places[j]]
    for j in range(len(values)):
        word = gathered[j]
        # Through int32: vectors convert it to float, uint32 they do not.
        upper_left = np.float32(np.int32(word & byte))
        upper_right = np.float32(np.int32(word >> np.uint32(8) & byte))
        lower_left = np.float32(np.int32(word >> np.uint32(16) & byte))
        lower_right = np.float32(np.int32(word >> np.uint32(24)))
        above = upper_left + right[j] * (upper_right - upper_left)
        below = lower_left + right[j] * (lower_right - lower_left)
        values[j] = above + lower[j] * (below - above)


@jit
def similarity(draw, strengths, height, width, matrix):  # type: ignore[no-untyped-def]
    """matrix (2, 3) float32: p_in = R(-angle) / size * (p_out - centre - shift) + centre.

    draw (4,) float32 in [-1, 1): right, down, rotation and size, in parts of `strengths` (shift in pixels, rotation in
    radians, change of size).
    """
    shift, rotation, scale = strengths
    right, down, angle = draw[0] * shift, draw[1] * shift, draw[2] * rotation
    size = 1 + draw[3] * scale
    cos, sin = math.cos(angle) / size, math.sin(angle) / size
    middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
    from_x, from_y = middle_x + right, middle_y + down
    matrix[0, 0], matrix[0, 1], matrix[0, 2] = cos, sin, middle_x - cos * from_x - sin * from_y
    matrix[1, 0], matrix[1, 1], matrix[1, 2] = -sin, cos, middle_y + sin * from_x - cos * from_y


@jit
def similarities(draws, strengths, height, width, matrices):  # type: ignore[no-untyped-def]
    """`similarity` of draws (n, 4) into matrices (n, 2, 3)."""
    for i in range(len(draws)):
        similarity(draws[i], strengths, height, width, matrices[i])


@jit
def gather_warped(data, offsets, order, start, matrices, height, width, scale, bias, out):  # type: ignore[no-untyped-def]
    """out[i] = image i resampled by matrices[start + i], times `scale` plus `bias` of its channel.

    data, offsets, order, start: as for `kernels.gather`. matrices (len(order), 2, 3), scale, bias (C,) and out
    (n, H * W * C) float32.
    """
    channels, size, pixels = len(scale), out.shape[1], height * width
    ahead, lines, last = rows_ahead(size), lines_of(size), len(order) - 1
    x, y = pixel_grid(height, width)
    padded, words = scratch(height, width)
    places, gathered = np.empty(pixels, np.int32), np.empty(pixels, np.uint32)
    in_x, in_y, values = np.empty(pixels, np.float32), np.empty(pixels, np.float32), np.empty(pixels, np.float32)
    for i in range(len(out)):
        coming = offsets[order[min(start + i + ahead, last)]]
        for line in range(lines):
            prefetch(data, coming + line * LINE)
        at = offsets[order[start + i]]
        transform(matrices[start + i], x, y, in_x, in_y)
        locate(in_x, in_y, height, width, places)
        for channel in range(channels):
            interleave(data[at : at + size], height, width, channels, channel, padded, words)
            blend(words, places, in_x, in_y, gathered, values)
            times, plus, row = scale[channel], bias[channel], out[i]
            if channels == 1:
                for j in range(pixels):
                    row[j] = values[j] * times + plus
            else:
                for j in range(pixels):
                    row[j * channels + channel] = values[j] * times + plus
