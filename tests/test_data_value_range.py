"""Value ranges: 12 bits in 16, floats, wide integers, 16-bit colours, NaN; the same range wherever an image is read."""

import dataclasses
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import nin
from nin import checkpoint, data, training
from nin.config import TrainConfig
from nin.data.decoder import DecodeError, read_extent
from nin.data.value_range import BYTES, FLOATS, INTEGERS, NOT_FINITE, choose_range, scale_range


def png16(values):
    """Return a PNG of 16 bits a channel, (H, W, C); Pillow writes none with colours."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def stripes(label, seed, top):
    """Return noise with a bright row or a bright column, 16 × 16, from 0 to top."""
    values = np.random.default_rng(seed).random((16, 16)) * 0.4
    values[(slice(None), 5) if label else (5, slice(None))] = 0.7
    values[0, :2] = 0, 1
    return values * top


WRITERS = {
    "12 bits in 16": (4095, lambda path, v: Image.fromarray(v.astype(np.uint16)).save(path.with_suffix(".png"))),
    "16 bits": (65535, lambda path, v: Image.fromarray(v.astype(np.uint16)).save(path.with_suffix(".png"))),
    "12-bit TIFF": (4095, lambda path, v: Image.fromarray(v.astype(np.uint16)).save(path.with_suffix(".tif"))),
    "32-bit integers": (3e6, lambda path, v: Image.fromarray(v.astype(np.int32)).save(path.with_suffix(".tif"))),
    "below zero": (2000, lambda path, v: Image.fromarray((v - 1000).astype(np.int32)).save(path.with_suffix(".tif"))),
    "an offset": (100, lambda path, v: Image.fromarray((v + 3e4).astype(np.uint16)).save(path.with_suffix(".png"))),
    "floats to 1": (1, lambda path, v: Image.fromarray(v.astype(np.float32)).save(path.with_suffix(".tif"))),
    "floats to 255": (255, lambda path, v: Image.fromarray(v.astype(np.float32)).save(path.with_suffix(".tif"))),
    "small floats": (1e-3, lambda path, v: Image.fromarray(v.astype(np.float32)).save(path.with_suffix(".tif"))),
    "12-bit colours": (4095, lambda path, v: path.with_suffix(".png").write_bytes(png16(np.stack([v] * 3, 2)))),
    "12-bit colours, alpha": (
        4095,
        lambda path, v: path.with_suffix(".png").write_bytes(png16(np.stack([v] * 3 + [v * 0 + 65535], 2))),
    ),
}


def write_set(root, kind, per_class=12):
    top, write = WRITERS[kind]
    for label in (0, 1):
        (root / f"kind{label}").mkdir(parents=True)
        for number in range(per_class):
            write(root / f"kind{label}" / str(number), stripes(label, 2 * number + label, top))
    return root


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_numbers_keeps_its_contrast(kind, tmp_path):
    images = data.load(write_set(tmp_path, kind), memory_limit_bytes=0)
    pixels = images.train.fetch(torch.arange(len(images.train)))
    assert (int(pixels.min()), int(pixels.max())) == (0, 255)
    for index, (path, label) in enumerate(zip(images.train.names, images.train.labels.tolist(), strict=True)):
        expected = stripes(label, 2 * int(path.split("/")[1].split(".")[0]) + label, 255)
        assert np.abs(pixels[index, 0].numpy() - expected).max() <= (3 if kind == "an offset" else 1.5)
    whole = kind in ("16 bits", "floats to 1")
    assert (images.value_range is None) is whole
    notes = data.check(tmp_path).notes
    assert notes == images.notes
    assert any("these two become black and white" in note for note in notes) is not whole


def test_a_training_on_12_bits_in_16_learns_and_its_run_reads_the_same_range(tmp_path):
    root = write_set(tmp_path / "set", "12 bits in 16", per_class=20)
    images = data.load(root)
    config = TrainConfig(model="nin_digits", epochs=8, batch_size=16, threads=1, precision="fp32", shift=1)
    result = training.train(images, config, out=tmp_path / "run")
    assert result.info.result["test_accuracy"] == 1
    low, high = checkpoint.load_info(tmp_path / "run").preprocessing.value_range
    assert (low, high) == (0, 4095)
    classifier = nin.load(tmp_path / "run")
    paths = [root / name for name in images.test.names]
    wanted = [images.classes[label] for label in images.test.labels.tolist()]
    assert [p.label for p in classifier.predict(paths)] == wanted
    assert [p.label for p in classifier.predict([path.read_bytes() for path in paths])] == wanted
    stored = torch.stack([data.decode(path, size=16, channels=1, value_range=(low, high)) for path in paths])
    assert torch.equal(stored, images.test.images)
    again = data.load_from_record(result.info.data, result.info.preprocessing)
    assert torch.equal(again.test.images, images.test.images)
    other = dataclasses.replace(images, value_range=None)
    assert "its value range is (0.0, 4095.0)" in result.info.mismatch(other)


def test_shards_have_a_range_too(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = write_set(tmp_path / "set", "12-bit colours")
    data.write_shards(root, tmp_path / "shards")
    folder, shards = data.load(root), data.load(tmp_path / "shards")
    assert shards.value_range == folder.value_range == (0, 4095)
    pixels = shards.test.fetch(torch.arange(len(shards.test)))
    assert sorted(image.numpy().tobytes() for image in pixels) == sorted(
        image.numpy().tobytes() for image in folder.test.images
    )


def test_16_bit_colours_are_read_in_full():
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 4)).astype(np.uint16)
    values[..., 3] = 65535
    for channels in (3, 4):
        content = png16(values[..., :channels])
        assert read_extent(content) == (INTEGERS, values[..., :3].min(), values[..., :3].max())
        got = data.decode(content, size=None, channels=3, value_range=(0, 65535))
        assert np.array_equal(got.permute(1, 2, 0).numpy(), scale_range(values[..., :3], (0, 65535)))
        usual = data.decode(content, size=None, channels=3).permute(1, 2, 0).numpy()
        assert np.array_equal(usual, values[..., :3] >> 8)


def test_floats_that_are_no_numbers_are_noted_and_become_black(tmp_path):
    for label in (0, 1):
        (tmp_path / f"kind{label}").mkdir()
        for number in range(4):
            values = stripes(label, number, 1).astype(np.float32)
            if number == 0:
                values[8, 8], values[9, 9] = np.nan, np.inf
            Image.fromarray(values).save(tmp_path / f"kind{label}" / f"{number}.tif")
    Image.fromarray(np.full((16, 16), np.nan, np.float32)).save(tmp_path / "kind0" / "nothing.tif")
    images = data.load(tmp_path)
    assert len(images.train) + len(images.test) == 8
    assert "2 images hold NaN or infinity, which become black and white" in images.notes
    assert [path for path, _ in images.skipped] == ["kind0/nothing.tif"]
    pixels = data.decode(tmp_path / "kind0" / "0.tif", size=None, channels=1, value_range=(0, 1))
    assert (pixels[0, 8, 8], pixels[0, 9, 9]) == (0, 255)
    with pytest.raises(DecodeError, match="no pixel is a finite number"):
        read_extent(tmp_path / "kind0" / "nothing.tif")


def test_the_range_is_that_of_most_images():
    depths, lows = np.full(200, INTEGERS), np.zeros(200)
    highs = np.full(200, 4095.0)
    assert choose_range(depths, lows, highs) == (0, 4095)
    highs[7] = 65535  # a hot pixel
    assert choose_range(depths, lows, highs) == (0, 4095)
    highs[::10] = 65535
    assert choose_range(depths, lows, highs) is None
    assert choose_range(np.full(3, BYTES), lows[:3], highs[:3]) is None
    assert choose_range(np.full(3, FLOATS), np.zeros(3), np.array([0.9, 1, 0.7])) is None
    assert choose_range(np.full(3, FLOATS), np.zeros(3), np.array([90.0, 255, 70])) == (0, 255)
    assert choose_range(np.array([FLOATS, NOT_FINITE]), np.zeros(2), np.ones(2)) == (0, 1)
    assert choose_range(np.full(2, INTEGERS), np.zeros(2), np.zeros(2)) is None


def test_bytes_in_a_small_part_of_their_range_and_plain_images_are_noted(tmp_path):
    for label in (0, 1):
        (tmp_path / f"kind{label}").mkdir()
        for number in range(4):
            values = stripes(label, 2 * number + label, 15).astype(np.uint8)
            Image.fromarray(values).save(tmp_path / f"kind{label}" / f"{number}.png")
    assert data.load(tmp_path).notes == ("The images use values 0 to 15 of 0 to 255 only; a training normalises them",)
    Image.new("L", (16, 16), 200).save(tmp_path / "kind0" / "plain.png")
    assert data.check(tmp_path).notes == ("1 image is of one colour: kind0/plain.png",)


def test_a_damaged_range_in_a_run_folder_is_refused():
    for wrong in ((1, 0), (0, float("nan")), (0, float("inf"))):
        with pytest.raises(ValueError, match="value_range must be"):
            checkpoint.Preprocessing(8, 1, (0.5,), (0.5,), wrong).check()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_8_bits_and_less_have_no_range(mode, tmp_path):
    buffer = io.BytesIO()
    Image.new(mode, (4, 4)).save(buffer, {"CMYK": "TIFF", "YCbCr": "JPEG"}.get(mode, "PNG"))
    assert read_extent(buffer.getvalue()).depth == BYTES
    got = data.decode(buffer.getvalue(), size=4, channels=3, value_range=(0, 4095))
    assert torch.equal(got, data.decode(buffer.getvalue(), size=4, channels=3))
