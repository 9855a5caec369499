"""Pictures of any kind, normalised as MNIST's images are."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits

from fastmnist.errors import FastmnistError
from fastmnist.inference.picture import mnist_like, read_picture
from fastmnist.sources import pictures
from fastmnist.sources.pictures import MAX_PIXELS, open_picture

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

    A centre of mass near a pixel's edge may be rounded either way; that it is in the centre has a test of its own.
    """
    moves = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    return max(correlation(np.roll(a, move, axis=(0, 1)), b) for move in moves)


def extent(result):
    """(rows, columns) that hold a stroke."""
    return np.count_nonzero(result.any(axis=1)), np.count_nonzero(result.any(axis=0))


@pytest.mark.parametrize("index", range(10))
def test_character_fills_the_box_and_its_mass_is_in_the_centre(index):
    result = REFERENCES[index]
    assert (result.shape, result.dtype) == ((28, 28), np.uint8)
    assert result.max() >= 200
    assert max(extent(result)) == 20
    weights = result / result.sum()
    middle = np.arange(28) + 0.5
    for centre in (weights.sum(axis=1) @ middle, weights.sum(axis=0) @ middle):
        assert abs(centre - 14.5) <= 0.51


def test_aspect_ratio_is_kept():
    bar = np.zeros((100, 100), dtype=np.uint8)
    bar[10:90, 40:60] = 255
    assert extent(mnist_like(Image.fromarray(bar))) == (20, 5)


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
    assert extent(mnist_like(glass)) == (20, 3)


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


def test_damaged_exif_counts_as_none():
    picture = scene(DIGITS[4])
    picture.info["exif"] = b"Exif\0\0MM\0\x39\0\0\0\x08"
    assert correlation(mnist_like(picture), REFERENCES[4]) > 0.95


def test_small_character_on_a_large_page():
    page = scene(DIGITS[6], size=(3000, 2000), at=(2500, 1500))
    assert correlation(mnist_like(page), REFERENCES[6]) > 0.85


# Each digit as lines through points of a square of side 1.
LINES = {
    1: [[(0.35, 0.25), (0.5, 0.1), (0.5, 0.9)]],
    4: [[(0.6, 0.9), (0.6, 0.1), (0.2, 0.65), (0.8, 0.65)]],
    5: [[(0.75, 0.1), (0.3, 0.1), (0.25, 0.45), (0.6, 0.42), (0.75, 0.65), (0.6, 0.85), (0.25, 0.85)]],
    7: [[(0.2, 0.1), (0.8, 0.1), (0.4, 0.9)]],
}


def drawn(digit, side, width):
    """The digit in lines of `width` pixels, black on white."""
    field = Image.new("L", (side, side), 255)
    for points in LINES[digit]:
        ImageDraw.Draw(field).line([(x * side, y * side) for x, y in points], fill=0, width=width)
    return field


@settings(max_examples=20)
@given(digit=st.sampled_from(sorted(LINES)), side=st.integers(40, 1024), width=st.integers(1, 2))
def test_thin_strokes_give_the_same_view_at_any_size(digit, side, width):
    result = mnist_like(drawn(digit, side, width))
    assert result.max() > 150
    thick = mnist_like(drawn(digit, 280, 20))
    assert near(result, thick) > 0.8
    assert 0.5 < result.sum() / thick.sum() < 1.3
    assert near(result, mnist_like(drawn(digit, 400, 2))) > 0.9


@pytest.mark.parametrize(("side", "least"), [(28, 0.7), (60, 0.8), (61, 0.8), (1500, 0.95)])
def test_thin_strokes_in_the_smallest_and_largest_pictures(side, least):
    for digit in LINES:
        assert near(mnist_like(drawn(digit, side, 1)), mnist_like(drawn(digit, 400, 2))) > least


def test_two_far_dots_are_both_seen():
    dots = Image.new("L", (400, 400), 255)
    for at in ((40, 60), (350, 360)):
        dots.putpixel(at, 0)
    result = mnist_like(dots)
    assert result[:14, :14].max() > 150
    assert result[14:, 14:].max() > 150


def test_dust_does_not_widen_the_box_and_a_dot_of_a_letter_does():
    field = Image.new("L", (400, 400), 255)
    pen = ImageDraw.Draw(field)
    pen.line([(200, 150), (200, 300)], fill=0, width=20)
    stem = mnist_like(field)
    dusty = field.copy()
    for x, y in ((3, 5), (390, 12), (8, 380)):
        ImageDraw.Draw(dusty).rectangle((x, y, x + 3, y + 3), fill=0)
    assert np.array_equal(mnist_like(dusty), stem)
    pen.ellipse((192, 90, 207, 105), fill=0)
    assert extent(mnist_like(field))[0] < 20, "a gap is left between dot and stem"


@pytest.mark.parametrize("size", [1, 8, 28, 32, 64])
def test_size(size):
    result = mnist_like(DIGITS[0], size)
    assert result.shape == (size, size)
    if size >= 8:
        assert extent(result)[0] == round(size * 20 / 28)


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


@pytest.mark.parametrize(("width", "height"), [(13_000, 13_000), (MAX_PIXELS + 1, 1), (8000, 6251)])
def test_pixels_are_counted_before_they_are_decoded(tmp_path, monkeypatch, width, height):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # the limit does not lean on Pillow's
    path = tmp_path / "large.pgm"
    path.write_bytes(f"P5 {width} {height} 65535\n".encode())
    with pytest.raises(FastmnistError, match=f"too many pixels.*{MAX_PIXELS:,}") as caught:
        read_picture(path)
    assert str(path) in str(caught.value)


def test_the_largest_picture_is_still_read(monkeypatch):
    content = io.BytesIO()
    DIGITS[1].save(content, "PNG")
    monkeypatch.setattr(pictures, "MAX_PIXELS", 96 * 96)
    assert open_picture(content, "it").size == (96, 96)


def written():
    """(format, content) of the digit, small, in every format that Pillow writes here and every mode that it takes."""
    Image.init()
    exif = Image.Exif()
    exif[0x0112] = 6
    files = []
    for kind in sorted(Image.SAVE):
        for mode in ("L", "P", "RGBA", "1", "I;16", "F"):
            small = DIGITS[1].resize((32, 32))
            if mode == "I;16":
                small = Image.fromarray(np.asarray(small).astype(np.uint16) * 257)
            content = io.BytesIO()
            try:
                small.convert(mode).save(content, kind, exif=exif)
            except Exception:  # each plugin has errors of its own for what it does not take
                continue
            files.append((kind, content.getvalue()))
    return files


def damaged(random, content):
    """Cut short, or with one to six bytes changed, most often near the start."""
    if random.random() < 0.3:
        return content[: random.integers(len(content))]
    changed = bytearray(content)
    for _ in range(random.integers(1, 7)):
        end = min(len(changed), int(random.choice([64, 400, len(changed)])))
        changed[random.integers(end)] = random.choice([0, 255, random.integers(256)])
    return bytes(changed)


def test_damage_in_any_format_raises_nothing_but_our_error():
    random = np.random.default_rng(0)
    tried, refused = set(), set()
    for kind, content in written():
        tried.add(kind)
        for _ in range(1 if kind == "ICNS" else 20):  # an icon of 1,024 x 1,024 takes longer
            try:
                result = mnist_like(open_picture(io.BytesIO(damaged(random, content)), kind))
            except FastmnistError as error:
                assert "\n" not in str(error)  # noqa: PT017 (either outcome is right)
                refused.add(kind)
            else:
                assert result.shape == (28, 28)
    assert tried == refused


@pytest.mark.parametrize("error", [RuntimeError("a codec's own"), KeyError("tag"), MemoryError(), AssertionError()])
def test_any_error_of_a_decoder_is_a_damaged_file(monkeypatch, error):
    content = io.BytesIO()
    DIGITS[1].save(content, "PNG")

    def fail(picture):
        raise error

    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(FastmnistError, match=r"it is damaged or cut short \(.+\)"):
        open_picture(content, "it")
