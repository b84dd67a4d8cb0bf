"""decode: one image of every kind that people have."""

import io
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nin.data import decode
from nin.data.decoder import DecodeError, read_header
from nin.errors import UserError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners() -> Image.Image:
    """16 x 16, each quarter of another colour: no turn or mirror of it equals it."""
    picture = Image.new("RGB", (16, 16), RED)
    picture.paste(GREEN, (8, 0, 16, 8))
    picture.paste(BLUE, (0, 8, 8, 16))
    picture.paste(WHITE, (8, 8, 16, 16))
    return picture


def pixel(image: torch.Tensor, row: int, column: int) -> tuple[int, ...]:
    return tuple(image[:, row, column].tolist())


# What a camera held otherwise writes for the upright picture, by EXIF orientation.
STORED = {
    1: [],
    2: [Image.Transpose.FLIP_LEFT_RIGHT],
    3: [Image.Transpose.ROTATE_180],
    4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_90],
    6: [Image.Transpose.ROTATE_90],
    7: [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_270],
    8: [Image.Transpose.ROTATE_270],
}


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    stored = corners()
    for turn in STORED[orientation]:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    options |= {"lossless": True} if suffix == "webp" else {}
    stored.save(path, exif=exif, **options)
    upright = decode(path, size=16, channels=3).int()
    expected = decode(corners(), size=16, channels=3).int()
    assert (upright - expected).abs().max() <= (8 if suffix == "jpg" else 0)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_exif_block_does_not_lose_the_image(tmp_path):
    entry = b"\x01\x12\0\x03\xff\xff\xff\xff\xff\xff\xff\xff"
    corners().save(tmp_path / "exif.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + entry)
    assert decode(tmp_path / "exif.jpg", size=16, channels=3).shape == (3, 16, 16)


def test_palette_becomes_its_colours(tmp_path):
    path = tmp_path / "palette.png"
    corners().convert("P", palette=Image.Palette.ADAPTIVE).save(path)
    image = decode(path, size=16, channels=3)
    assert [pixel(image, 0, 0), pixel(image, 0, 15), pixel(image, 15, 0)] == [RED, GREEN, BLUE]


def test_palette_with_transparency_lies_on_white(tmp_path):
    path = tmp_path / "palette.gif"
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    picture.putpixel((3, 3), 1)
    picture.save(path, transparency=0)
    image = decode(path, size=4, channels=3)
    assert pixel(image, 0, 0) == WHITE
    assert pixel(image, 3, 3) == RED


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (0, 0, 0, 0), WHITE),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (0, 0), WHITE),
        ("LA", (100, 255), (100, 100, 100)),
    ],
)
def test_alpha_lies_on_white(tmp_path, mode, colour, expected):
    path = tmp_path / "alpha.png"
    Image.new(mode, (4, 4), colour).save(path)
    assert pixel(decode(path, size=4, channels=3), 2, 2) == expected
    luma = round(0.299 * expected[0] + 0.587 * expected[1] + 0.114 * expected[2])
    assert decode(path, size=4, channels=1)[0, 2, 2] == luma


def test_cmyk_becomes_rgb(tmp_path):
    path = tmp_path / "print.jpg"
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path, quality=100)  # magenta + yellow: red
    red, green, blue = pixel(decode(path, size=8, channels=3), 4, 4)
    assert red > 250
    assert green < 5
    assert blue < 5


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, suffix):
    path = tmp_path / f"deep.{suffix}"
    values = np.array([[0, 257], [32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(path)
    assert decode(path, size=None, channels=1).tolist() == [[[0, 1], [128, 255]]]
    assert decode(path, size=None, channels=3)[:, 1, 0].tolist() == [128, 128, 128]


def test_float_images_are_scaled_from_one_and_others_refused(tmp_path):
    Image.fromarray(np.array([[0.0, 1.0]], dtype=np.float32)).save(tmp_path / "float.tif")
    assert decode(tmp_path / "float.tif", size=None, channels=1).tolist() == [[[0, 255]]]
    Image.fromarray(np.array([[0.0, 7.0]], dtype=np.float32)).save(tmp_path / "wide.tif")
    with pytest.raises(UserError, match=r"wide\.tif: .*must be in 0\.\.1"):
        decode(tmp_path / "wide.tif", size=None, channels=1)


def test_one_bit_images_are_black_and_white(tmp_path):
    Image.new("1", (3, 3), 1).save(tmp_path / "bit.png")
    assert decode(tmp_path / "bit.png", size=3, channels=1).unique().tolist() == [255]


def test_grey_and_colour_become_each_other():
    assert pixel(decode(Image.new("L", (2, 2), 77), size=2, channels=3), 0, 0) == (77, 77, 77)
    assert decode(Image.new("RGB", (2, 2), (0, 255, 0)), size=2, channels=1)[0, 0, 0] == 150  # 0.587 * 255


def test_the_centre_square_is_kept_in_both_directions():
    wide = Image.new("RGB", (48, 16), RED)
    wide.paste(corners(), (16, 0))
    assert torch.equal(decode(wide, size=16, channels=3), decode(corners(), size=16, channels=3))
    tall = Image.new("RGB", (16, 48), RED)
    tall.paste(corners(), (0, 16))
    assert torch.equal(decode(tall, size=16, channels=3), decode(corners(), size=16, channels=3))


def test_shrinking_averages_instead_of_dropping_pixels():
    stripes = np.zeros((64, 64), dtype=np.uint8)
    stripes[:, ::2] = 200
    image = decode(Image.fromarray(stripes), size=8, channels=1)[0, 1:-1, 1:-1]
    assert (image.int() - 100).abs().max() <= 3


def test_large_jpegs_are_read_like_large_pngs(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 640).astype(np.uint8), (400, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.jpg", quality=98)
    from_jpeg = decode(tmp_path / "ramp.jpg", size=32, channels=1).int()
    assert (from_jpeg - decode(Image.fromarray(ramp), size=32, channels=1).int()).abs().max() <= 3


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1)])
def test_tiny_and_thin_images_grow(shape):
    image = decode(Image.new("RGB", shape, (10, 20, 30)), size=5, channels=3)
    assert pixel(image, 4, 4) == (10, 20, 30)


def test_sources_may_be_paths_strings_bytes_and_pillow_images(tmp_path):
    path = tmp_path / "a picture ü 图.png"
    corners().save(path)
    expected = decode(corners(), size=8, channels=3)
    for source in (path, str(path), path.read_bytes(), Image.open(path)):
        assert torch.equal(decode(source, size=8, channels=3), expected)
        if isinstance(source, Image.Image):
            source.close()


def bad_files(folder):
    """Files that end in .jpg and are no readable JPEG, with a word of the reason."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    (folder / "truncated.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (folder / "text.jpg").write_text("this is no image")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "postscript.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    (folder / "folder.jpg").mkdir()
    return {
        "truncated": "truncated",
        "text": "not an image",
        "empty": "empty",
        "postscript": "not an image",
        "folder": "directory",
        "missing": "no such file",
    }


def test_unreadable_files_are_named_with_the_reason_in_one_line(tmp_path):
    for name, reason in bad_files(tmp_path).items():
        with pytest.raises(UserError) as caught:
            decode(tmp_path / f"{name}.jpg", size=8, channels=3)
        message = str(caught.value)
        assert message.startswith(f"{tmp_path / name}.jpg: ")
        assert reason in message.lower()
        assert "\n" not in message


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (300, 300)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300 * 300 // 3)
    with pytest.raises(UserError, match=r"bomb\.png: .*decompression bomb"):
        decode(path, size=8, channels=1)


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 2_000))
@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "PPM", "ICO", "JPEG2000", "QOI", "PCX"]
)
@pytest.mark.filterwarnings("ignore")
def test_mutated_files_are_read_or_refused_and_never_crash(kind, position, value, cut):
    buffer = io.BytesIO()
    corners().save(buffer, kind)
    content = bytearray(buffer.getvalue())
    content[position % len(content)] = value
    message = "image bytes: "
    try:
        image = decode(bytes(content[: len(content) - cut % 50]), size=8, channels=3)
        assert image.shape == (3, 8, 8)
    except UserError as error:
        message = str(error)
    assert message.startswith("image bytes: ")


@pytest.mark.parametrize(("size", "channels", "word"), [(0, 3, "size"), (-1, 1, "size"), (8, 2, "channels")])
def test_wrong_arguments_are_value_errors(size, channels, word):
    with pytest.raises(ValueError, match=f"{word} must be"):
        decode(corners(), size=size, channels=channels)


def test_headers_tell_grey_from_colour(tmp_path):
    for mode, grey in {"1": True, "L": True, "LA": True, "I;16": True, "RGB": False, "P": False}.items():
        path = tmp_path / f"{mode.replace(';', '')}.png"
        Image.new(mode, (5, 3)).save(path)
        header = read_header(os.fspath(path))
        assert (header.width, header.height, header.grey) == (5, 3, grey)


def test_an_error_names_the_file_and_has_the_reason_alone(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DecodeError) as caught:
        decode(tmp_path / "text.png", size=8, channels=3)
    assert caught.value.reason == "empty, not an image, or damaged at its start"
    assert str(caught.value) == f"{tmp_path}/text.png: {caught.value.reason}"
