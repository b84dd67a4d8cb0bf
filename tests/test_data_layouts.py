"""Folders and shards as people have them: every labelled image is used with its label, or listed with a reason."""

import importlib.util

import numpy as np
import pytest
from PIL import Image

from nin import data
from nin.data import image_formats
from nin.data.decoder import DecodeError
from support import layouts


def examine(seed, tmp_path):
    """Check a random folder or random shards."""
    rng = np.random.default_rng(seed)
    make = layouts.random_shards if seed % 3 == 2 else layouts.random_folder
    layout = make(rng, tmp_path / f"set{seed}")
    found = data.load(layout.root, size=16, memory_limit_bytes=1 << 20)
    assert layouts.unmentioned(layout, found) == []
    assert len(found.train) + len(found.test) == len(layout.labels)  # nothing but the labelled images
    for path in layout.other:
        assert layouts.is_mentioned(path, found), path
    checked = data.check(layout.root, size=16)
    assert checked.refusal is None
    assert sum(train + test for _, train, test in checked.classes) == len(layout.labels)


@pytest.mark.parametrize("seed", range(12))
def test_every_labelled_image_is_used_or_listed(seed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    examine(seed, tmp_path)


@pytest.mark.slow
def test_every_labelled_image_of_300_layouts_is_used_or_listed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for seed in range(12, 312):
        examine(seed, tmp_path)


# -- photos of iPhones ---------------------------------------------------------------------------------------------

# The first bytes of such a file: the size of a box, its kind, the brand.
HEIC_START = b"\0\0\0\x24ftypheic\0\0\0\0mif1heic"


@pytest.fixture
def without_heif(monkeypatch):
    """Pillow as it is without pillow_heif."""
    formats = tuple(name for name in image_formats.SIGNED_FORMATS if name != "HEIF")
    monkeypatch.setattr(image_formats, "SIGNED_FORMATS", formats)


@pytest.mark.parametrize("name", ["IMG_1.HEIC", "IMG_2.heif", "IMG_3.jpg"])
def test_a_heic_photo_is_listed_with_what_to_install(tmp_path, without_heif, name):
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for number in range(3):
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{number}.png")
    (tmp_path / "cat" / name).write_bytes(HEIC_START + bytes(100))
    images = data.load(tmp_path)
    reason = "a HEIC photo: pip install 'network-in-network[heic]'"
    assert images.skipped == ((f"cat/{name}", reason),)
    assert [(f.path, f.kind, f.detail) for f in images.findings] == [(f"cat/{name}", "unreadable", reason)]
    for source in (tmp_path / "cat" / name, HEIC_START + bytes(100)):
        with pytest.raises(DecodeError, match="a HEIC photo: pip install"):
            data.decode(source, size=8, channels=3)


@pytest.mark.skipif(importlib.util.find_spec("pillow_heif") is None, reason="pillow_heif is not installed")
def test_a_heic_photo_is_read_upright(tmp_path):
    pixels = np.zeros((64, 128, 3), dtype=np.uint8)
    pixels[:, 96:] = 255  # the right quarter is white
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter: white at the bottom
    image.save(tmp_path / "a.heic", quality=95, exif=exif.tobytes())
    image.save(tmp_path / "a.jpg", quality=95, exif=exif.tobytes())
    expected = data.decode(tmp_path / "a.jpg", size=None, channels=3)
    assert expected.shape == (3, 128, 64)
    for source in (tmp_path / "a.heic", (tmp_path / "a.heic").read_bytes()):
        got = data.decode(source, size=None, channels=3)
        assert (got.int() - expected.int()).abs().float().mean() < 4
    (tmp_path / "a.heic").rename(tmp_path / "a.png")
    assert data.decode(tmp_path / "a.png", size=32, channels=3).shape == (3, 32, 32)
