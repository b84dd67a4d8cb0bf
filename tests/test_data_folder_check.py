"""check: the findings in an image folder, and the cache of its scan."""

import os
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from nin import data
from nin.data import folder as image_folder
from nin.data import folder_scan, image_scan
from nin.errors import UserError


def noise(path, seed, size=(16, 16), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path, **options)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two classes, each with 4 images for training and 2 for testing; a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "images"
    for number in range(12):
        part, place = ("train", number // 2) if number < 8 else ("test", number // 2)
        noise(root / part / ("cat", "dog")[number % 2] / f"{place}.png", number)
    return root


def kinds(found):
    return {(finding.path, finding.kind) for finding in found.findings}


def test_a_folder_without_fault(folder):
    found = data.check(folder)
    assert (found.images, found.size, found.channels, found.refusal) == (12, 16, 3, None)
    assert found.classes == (("cat", 4, 2), ("dog", 4, 2))
    assert found.findings == ()
    assert found.notes == ()


def spoil(folder):
    """Break the folder in every way that is found; return what is to be found."""
    content = (folder / "train/cat/0.png").read_bytes()
    (folder / "train/cat/half.png").write_bytes(content[: len(content) // 2])
    (folder / "train/cat/text.jpg").write_text("no image")
    shutil.copy(folder / "train/cat/1.png", folder / "train/cat/again.png")
    shutil.copy(folder / "train/dog/1.png", folder / "test/dog/leak.png")
    shutil.copy(folder / "train/dog/2.png", folder / "train/cat/dog.png")
    noise(folder / "train/dog/webp.jpg", 50, format="WEBP")
    noise(folder / "train/dog/tiny.png", 51, size=(3, 16))
    frames = [Image.new("L", (16, 16), grey) for grey in (0, 255)]
    frames[0].save(folder / "train/dog/moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "train/dog/pages.tif", save_all=True, append_images=frames[1:])
    return {
        ("train/cat/half.png", "unreadable"),
        ("train/cat/text.jpg", "unreadable"),
        ("train/cat/again.png", "duplicate"),
        ("train/cat/dog.png", "in two classes"),
        ("train/dog/2.png", "in two classes"),
        ("test/dog/leak.png", "in training and test"),
        ("train/dog/webp.jpg", "wrong extension"),
        ("train/dog/tiny.png", "tiny"),
        ("train/dog/moving.gif", "several frames"),
        ("train/dog/pages.tif", "several frames"),
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_every_fault_is_found_and_nothing_changed(folder, workers):
    expected = spoil(folder)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}
    found = data.check(folder, size=16, workers=workers)
    assert kinds(found) == expected
    assert [finding.kind for finding in found.findings][:2] == ["unreadable"] * 2
    details = {finding.path: finding.detail for finding in found.findings}
    assert details["train/cat/dog.png"] == "the same as train/dog/2.png"
    assert details["test/dog/leak.png"] == "the same as train/dog/1.png"
    assert details["train/dog/webp.jpg"] == "it is WEBP"
    assert details["train/dog/tiny.png"] == "3 × 16 pixels"
    assert "truncated" in details["train/cat/half.png"]
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def test_loading_finds_the_same(folder):
    expected = spoil(folder)
    for limit in (0, 1 << 20):
        images = data.load(folder, size=16, memory_limit_bytes=limit)
        assert kinds(images) == expected
        assert [path for path, _ in images.skipped] == ["train/cat/half.png", "train/cat/text.jpg"]


def test_huge_images_are_named_before_they_are_refused(folder, monkeypatch):
    monkeypatch.setattr(image_folder, "HUGE_PIXELS", 200)
    found = data.check(folder)
    assert Counter(finding.kind for finding in found.findings) == {"huge": 12}
    assert found.findings[0].detail == "16 × 16 pixels"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"none of 12 images can be read.*decompression bomb"):
        data.check(folder)


def test_classes_of_very_different_size_are_noted(folder):
    for number in range(40):
        noise(folder / "train" / "dog" / f"more{number}.png", 100 + number)
    (note,) = data.check(folder).notes
    assert note.startswith("dog has 44 images for training and cat only 4")
    assert data.load(folder).notes == (note,)


def test_what_no_training_would_take_is_still_listed(folder):
    for path in (folder / "train" / "cat").iterdir():
        path.write_text("no image")
    found = data.check(folder)
    assert "class 'cat' has no readable training image" in found.refusal
    assert len(found.findings) == 4


def test_only_folders_are_checked(tmp_path):
    with pytest.raises(UserError, match="named set"):
        data.check("digits")
    with pytest.raises(UserError, match="no such file or folder"):
        data.check(tmp_path / "none")


@pytest.fixture
def looks(monkeypatch):
    """The paths whose headers and pixels are read."""
    seen = {"headers": [], "pixels": []}
    read_header, decode_pixels = image_scan.read_header, image_scan.decode_pixels

    def count_header(file):
        seen["headers"].append(os.path.basename(file.name))
        return read_header(file)

    def count_pixels(path, **options):
        seen["pixels"].append(os.path.basename(path))
        return decode_pixels(path, **options)

    monkeypatch.setattr(image_scan, "read_header", count_header)
    monkeypatch.setattr(image_scan, "decode_pixels", count_pixels)
    monkeypatch.setattr(folder_scan, "_MIN_CACHED_FILES", 1)
    return seen


def test_a_file_is_looked_at_once_until_it_changes(folder, looks):
    expected = spoil(folder)
    assert kinds(data.check(folder, size=16)) == expected
    assert len(looks["headers"]) == 21
    for seen in looks.values():
        seen.clear()
    assert kinds(data.check(folder, size=16)) == expected
    assert sorted(looks["headers"]) == ["half.png", "text.jpg"]  # what was refused is looked at again
    assert looks["pixels"] == ["half.png"]
    noise(folder / "train/cat/0.png", 77, size=(17, 16))
    for seen in looks.values():
        seen.clear()
    assert kinds(data.check(folder, size=16)) == expected
    assert "0.png" in looks["headers"]
    assert "0.png" in looks["pixels"]


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00junk", b"PK\x03\x04", b"x" * 1000])
def test_a_damaged_memory_is_forgotten(folder, looks, content):
    data.check(folder)
    (memory,) = (folder.parent / "cache").glob("nin/examined/*")
    memory.write_bytes(content)
    looks["headers"].clear()
    assert data.check(folder).findings == ()
    assert len(looks["headers"]) == 12


def test_a_cache_that_cannot_be_written_costs_only_time(folder, looks, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "train/cat/0.png"))  # a file, not a folder
    for _ in range(2):
        assert data.check(folder).findings == ()
    assert len(looks["headers"]) == 24


def test_findings_become_csv():
    findings = (data.Finding("a,b.png", "tiny", "3 × 3 pixels"), data.Finding("c\udcff.png", "unreadable", 'so "bad"'))
    assert data.findings_csv(findings) == (
        'path,kind,detail\n"a,b.png",tiny,3 × 3 pixels\nc'.encode() + b'\xff.png,unreadable,"so ""bad"""\n'
    )
