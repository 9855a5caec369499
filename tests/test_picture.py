"""Pictures of any kind come out as MNIST has them."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from fastmnist.data.picture import mnist_like, read_picture
from fastmnist.errors import FastmnistError

UP = Image.Resampling.BICUBIC


def digit(index: int) -> Image.Image:
    """A digit of scikit-learn's set, light on black, 96x96, with a margin of 8."""
    values = load_digits().images[index]
    big = Image.fromarray((values * (255 / 16)).astype(np.uint8)).resize((80, 80), UP)
    field = Image.new("L", (96, 96), 0)
    field.paste(big, (8, 8))
    return field


DIGITS = [digit(index) for index in range(10)]
REFERENCES = [mnist_like(picture) for picture in DIGITS]


def scene(mask, *, paper=(255, 255, 255), ink=(0, 0, 0), size=(230, 300), at=(40, 90), shade=0.0):
    """The mask drawn in `ink` on a canvas of colour `paper`, off its centre; `shade` darkens to the right."""
    canvas = np.empty((*size, 3))
    canvas[:] = paper
    canvas *= 1 - shade * np.linspace(0, 1, size[1])[None, :, None]
    cover = np.asarray(mask, dtype=np.float64)[..., None] / 255
    part = canvas[at[0] : at[0] + mask.height, at[1] : at[1] + mask.width]
    part += (np.array(ink, dtype=np.float64) - part) * cover
    return Image.fromarray(canvas.round().astype(np.uint8))


def jpeg(picture, **options):
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", **options)
    buffer.seek(0)
    return Image.open(buffer)


def correlation(a, b):
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def near(a, b):
    """The correlation after the best move by one pixel at most.

    A centre of mass close to the edge of a pixel may be rounded either way; that it is in the centre at all
    is a test of its own.
    """
    moves = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    return max(correlation(np.roll(a, move, axis=(0, 1)), b) for move in moves)


@pytest.mark.parametrize("index", range(10))
def test_character_fills_the_box_and_its_mass_is_in_the_centre(index):
    result = REFERENCES[index]
    assert result.shape == (28, 28)
    assert result.dtype == np.uint8
    assert result.max() >= 200
    rows, columns = np.flatnonzero(result.any(axis=1)), np.flatnonzero(result.any(axis=0))
    assert max(np.ptp(rows), np.ptp(columns)) + 1 == 20
    weights = result / result.sum()
    middle = np.arange(28) + 0.5
    for centre in (weights.sum(axis=1) @ middle, weights.sum(axis=0) @ middle):
        assert abs(centre - 14.5) <= 0.51


def test_aspect_ratio_is_kept():
    bar = np.zeros((100, 100), dtype=np.uint8)
    bar[10:90, 40:60] = 255
    result = mnist_like(Image.fromarray(bar))
    rows, columns = np.flatnonzero(result.any(axis=1)), np.flatnonzero(result.any(axis=0))
    assert (len(rows), len(columns)) == (20, 5)


@pytest.mark.parametrize(
    ("paper", "ink", "shade"),
    [
        ((255, 255, 255), (0, 0, 0), 0.0),
        ((0, 0, 0), (255, 255, 255), 0.0),
        ((240, 220, 130), (20, 20, 90), 0.0),
        ((30, 60, 40), (250, 240, 90), 0.0),
        ((200, 0, 0), (0, 102, 0), 0.0),  # of equal lightness
        ((242, 238, 228), (40, 40, 60), 0.3),
    ],
)
def test_colours_and_jpeg_do_not_matter(paper, ink, shade):
    matches = [
        near(mnist_like(jpeg(scene(mask, paper=paper, ink=ink, shade=shade), quality=80)), reference)
        for mask, reference in zip(DIGITS, REFERENCES, strict=True)
    ]
    assert min(matches) > 0.95


def test_background_noise_is_cut_off():
    picture = np.asarray(scene(DIGITS[3], paper=(235, 232, 225)), dtype=np.float64)
    noisy = picture + np.random.default_rng(0).normal(0, 4, picture.shape)
    result = mnist_like(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    assert near(result, REFERENCES[3]) > 0.95
    assert result[0].max() == result[-1].max() == result[:, 0].max() == 0


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I", "F", "CMYK", "I;16"])
@pytest.mark.parametrize("dark_on_light", [False, True])
def test_modes_agree(mode, dark_on_light):
    picture = Image.eval(DIGITS[5], lambda value: 255 - value) if dark_on_light else DIGITS[5]
    if mode == "I;16":
        converted = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
        assert converted.mode == "I;16"
    elif mode == "CMYK":
        converted = picture.convert("RGB").convert("CMYK")
    else:
        converted = picture.convert(mode)
    assert near(mnist_like(converted), REFERENCES[5]) > 0.95


@pytest.mark.parametrize("tone", [0, 128, 255])
def test_strokes_on_transparent_ground(tone):
    glass = Image.merge("LA", (Image.new("L", (96, 96), tone), DIGITS[2]))
    assert correlation(mnist_like(glass), REFERENCES[2]) > 0.99


def test_single_stroke_on_transparent_ground():
    glass = Image.new("RGBA", (60, 80), (0, 0, 0, 0))
    glass.paste((0, 0, 200, 255), (30, 20, 36, 60))
    result = mnist_like(glass)
    assert np.count_nonzero(result.any(axis=1)) == 20
    assert np.count_nonzero(result.any(axis=0)) == 3


@pytest.mark.parametrize("dark_on_light", [False, True])
def test_opaque_card_on_transparent_ground(dark_on_light):
    card = Image.eval(DIGITS[2], lambda value: 255 - value) if dark_on_light else DIGITS[2]
    field = Image.new("RGBA", (200, 260), (255, 255, 255, 0) if not dark_on_light else (0, 0, 0, 0))
    field.paste(card.convert("RGBA"), (120, 40))
    assert correlation(mnist_like(field), REFERENCES[2]) > 0.99


def test_exif_orientation_is_followed():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    turned = scene(DIGITS[4]).transpose(Image.Transpose.ROTATE_90)
    assert correlation(mnist_like(jpeg(turned, exif=exif)), REFERENCES[4]) > 0.95
    assert correlation(mnist_like(jpeg(turned)), REFERENCES[4]) < 0.8


def test_small_character_on_a_large_page():
    page = scene(DIGITS[6], size=(3000, 2000), at=(2500, 1500))
    assert correlation(mnist_like(page), REFERENCES[6]) > 0.85


@pytest.mark.parametrize("size", [1, 8, 28, 32, 64])
def test_size(size):
    result = mnist_like(DIGITS[0], size)
    assert result.shape == (size, size)
    if size >= 8:
        assert np.count_nonzero(result.any(axis=1)) == round(size * 20 / 28)


def test_size_below_one_is_refused():
    with pytest.raises(ValueError, match="size"):
        mnist_like(DIGITS[0], 0)


def noise(level):
    values = np.random.default_rng(0).normal(level, 3, (80, 90))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    "picture",
    [
        Image.new("L", (40, 30), 255),
        Image.new("RGB", (40, 30), (9, 90, 200)),
        Image.new("RGBA", (40, 30), (0, 0, 0, 0)),
        Image.new("L", (1, 1), 0),
        Image.new("F", (5, 5), float("nan")),
        noise(240),
        noise(10),
        Image.fromarray(np.tile(np.linspace(180, 240, 90), (80, 1)).astype(np.uint8)),
    ],
)
def test_blank_picture_is_refused(picture):
    with pytest.raises(FastmnistError, match="blank"):
        mnist_like(picture)


@settings(max_examples=40, deadline=None)
@given(
    mode=st.sampled_from(["1", "L", "RGB", "RGBA", "LA", "P", "I", "F"]),
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    share=st.floats(0, 1),
    size=st.integers(1, 40),
)
def test_any_picture_gives_a_field_or_is_blank(mode, width, height, seed, share, size):
    random = np.random.default_rng(seed)
    values = random.integers(0, 256, (height, width, 4)) * (random.random((height, width, 1)) < share)
    picture = Image.fromarray(values.astype(np.uint8)).convert(mode)
    try:
        result = mnist_like(picture, size)
    except FastmnistError as error:
        assert "blank" in str(error)  # noqa: PT017 (either outcome is right)
        return
    assert result.shape == (size, size)
    assert result.dtype == np.uint8
    assert result.max() > 0


@pytest.mark.parametrize("extension", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_read_picture(tmp_path, extension):
    path = tmp_path / f"digit.{extension}"
    scene(DIGITS[7]).save(path)
    assert correlation(read_picture(path), REFERENCES[7]) > 0.95
    assert read_picture(str(path), 14).shape == (14, 14)


def test_read_picture_says_what_is_wrong(tmp_path, monkeypatch):
    text = tmp_path / "text.png"
    text.write_text("no image")
    empty = tmp_path / "empty.png"
    empty.touch()
    blank = tmp_path / "blank.png"
    Image.new("L", (20, 20), 255).save(blank)
    large = tmp_path / "large.png"
    Image.new("L", (100, 100), 255).save(large)
    for path, reason in (
        (tmp_path / "none.png", "no file"),
        (tmp_path, "folder"),
        (text, "not an image"),
        (empty, "not an image"),
        (blank, "blank"),
    ):
        with pytest.raises(FastmnistError, match=reason) as caught:
            read_picture(path)
        assert str(path) in str(caught.value)
    for limit in (1000, 6000):  # Pillow raises beyond twice the limit and only warns before
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(FastmnistError, match="too many pixels"):
            read_picture(large)


@pytest.mark.parametrize("extension", ["png", "jpg", "gif", "bmp", "tiff"])
def test_file_that_was_cut_short(tmp_path, extension):
    whole = tmp_path / f"whole.{extension}"
    scene(DIGITS[7]).save(whole)
    content = whole.read_bytes()
    cut = tmp_path / f"cut.{extension}"
    cut.write_bytes(content[: len(content) // 2])
    with pytest.raises(FastmnistError, match=r"damaged|not an image"):
        read_picture(cut)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damaged_file_never_gives_another_error(tmp_path_factory, data):
    extension = data.draw(st.sampled_from(["png", "jpg", "gif", "bmp", "tiff"]))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    options = {"exif": exif} if extension in ("png", "jpg", "tiff") else {}
    formats = {"jpg": "JPEG"}
    DIGITS[1].save(buffer, formats.get(extension, extension.upper()), **options)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 400) - 1))] = data.draw(st.integers(0, 255))
    path = Path(tmp_path_factory.getbasetemp()) / f"damaged.{extension}"
    path.write_bytes(content)
    try:
        assert read_picture(path).shape == (28, 28)
    except FastmnistError as error:
        assert str(path) in str(error)  # noqa: PT017 (either outcome is right)
