"""Shards of other people: which members are images and labels, what is listed, and archives that were cut."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from nin import data
from nin.cli.app import main
from nin.data.tar_index import index_tar, split_key
from nin.errors import UserError
from support.layouts import APPLE_DOUBLE, add_member


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png(seed, size=12):
    values = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(values).save(content, "PNG")
    return content.getvalue()


def write_tar(path, members, mode="w", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **options) as tar:
        for name, content in members:
            add_member(tar, name, content)
    return path


def samples(count=8, key="{:04d}", extra=(), label=lambda n: ("cls", str(n % 2))):
    """Return the members of samples: an image, its label, and extra members (ending, content)."""
    members = []
    for n in range(count):
        ending, text = label(n)
        rows = [("png", png(n)), (ending, text.encode()), *extra]
        members += [(f"{key.format(n)}.{end}", content) for end, content in rows]
    return members


def labels_by_name(found):
    parts = (found.train, found.test)
    return {
        name: found.classes[label]
        for part in parts
        for name, label in zip(part.names, part.labels.tolist(), strict=True)
    }


def kinds(found):
    return {(finding.path, finding.kind) for finding in found.findings}


@pytest.mark.parametrize(
    ("label", "classes"),
    [
        (lambda n: ("cls", str(n % 2)), ("0", "1")),
        (lambda n: ("CLS", f" {n % 2}\r\n"), ("0", "1")),
        (lambda n: ("cls", f"{n % 2:03d}"), ("0", "1")),
        (lambda n: ("cls", ("cat", "été")[n % 2]), ("cat", "été")),
        (lambda n: ("txt", ("cat\n", "dog\n")[n % 2]), ("cat", "dog")),
        (lambda n: ("json", json.dumps({"label": n % 2, "url": "x"})), ("0", "1")),
        (lambda n: ("json", json.dumps({"label": ("cat", "dog")[n % 2]})), ("cat", "dog")),
        (lambda n: ("json", json.dumps({"class_name": ("cat", "dog")[n % 2]})), ("cat", "dog")),
        (lambda n: ("json", json.dumps(n % 2)), ("0", "1")),
        (lambda n: ("json", json.dumps({"cls": float(n % 2)})), ("0", "1")),
        (lambda n: ("cls", ("10", "9")[n % 2]), tuple(map(str, range(11)))),
    ],
)
def test_labels_of_every_form(tmp_path, label, classes):
    write_tar(tmp_path / "s" / "a.tar", samples(label=label))
    found = data.load(tmp_path / "s")
    assert found.classes == classes
    expected = {n: label(n)[1].strip() for n in range(8)}
    texts = labels_by_name(found)
    assert len(texts) == 8
    for n in range(8):
        assert texts[f"a.tar/{n:04d}.png"].lstrip("0") in expected[n].lstrip("0") or label(n)[0] == "json"
    assert texts["a.tar/0000.png"] != texts["a.tar/0001.png"]
    assert found.findings == ()


def test_a_cls_goes_before_json_and_text(tmp_path):
    extra = (("json", b'{"label": 7}'), ("txt", b"a caption of its own"))
    write_tar(tmp_path / "s" / "a.tar", samples(extra=extra))
    assert data.load(tmp_path / "s").classes == ("0", "1")


def test_captions_are_no_classes(tmp_path):
    write_tar(tmp_path / "s" / "a.tar", samples(count=60, label=lambda n: ("txt", f"picture {n} of a cat")))
    with pytest.raises(UserError, match=r"the \.txt members hold 60 different texts for 60 images"):
        data.load(tmp_path / "s")


def test_a_sample_has_one_image_and_the_others_are_listed(tmp_path):
    extra = (("seg.png", png(99)), ("depth.PNG", png(98)), ("webp", png(97)), ("npy", b"\x93NUMPY"), ("xml", b"<a/>"))
    write_tar(tmp_path / "s" / "a.tar", samples(extra=extra))
    found = data.load(tmp_path / "s")
    assert set(labels_by_name(found)) == {f"a.tar/{n:04d}.png" for n in range(8)}
    assert kinds(found) == {
        ("a.tar/*.seg.png", "beside the image"),
        ("a.tar/*.depth.png", "beside the image"),
        ("a.tar/*.webp", "beside the image"),
        ("a.tar/*.npy", "no image"),
        ("a.tar/*.xml", "no image"),
    }
    assert all(finding.detail.startswith("8 members") for finding in found.findings)
    assert len(data.open_shards(tmp_path / "s")) == 8
    checked = data.check(tmp_path / "s")
    assert (checked.images, checked.refusal) == (8, None)
    assert {(finding.path, finding.kind) for finding in checked.findings} == kinds(found)


@pytest.mark.parametrize("key", ["{:04d}", "img 2.0 v{}", "./x.y/{}", "a.b/c/{:03d}.left", "v{}.final"])
def test_dots_in_names(tmp_path, key):
    write_tar(tmp_path / "s" / "a.tar", samples(key=key))
    assert labels_by_name(data.load(tmp_path / "s")) == {f"a.tar/{key.format(n)}.png": str(n % 2) for n in range(8)}


def test_a_dotted_image_takes_the_label_of_its_key(tmp_path):
    members = [
        row
        for n in range(4)
        for row in ((f"{n}.left.png", png(n)), (f"{n}.right.png", png(n + 50)), (f"{n}.cls", b"%d" % (n % 2)))
    ]
    write_tar(tmp_path / "s" / "a.tar", members)
    found = data.load(tmp_path / "s")
    assert labels_by_name(found) == {f"a.tar/{n}.left.png": str(n % 2) for n in range(4)}
    assert kinds(found) == {("a.tar/*.right.png", "beside the image")}


def test_images_without_labels_are_listed_and_predicted(tmp_path):
    members = [row for row in samples() if row[0] != "0003.cls"]
    write_tar(tmp_path / "s" / "a.tar", [*members, ("x.png", png(50)), ("y.png", png(51)), ("y.cls", b"-1")])
    found = data.load(tmp_path / "s")
    assert len(labels_by_name(found)) == 7
    assert kinds(found) == {(f"a.tar/{name}.png", "no label") for name in ("0003", "x", "y")}
    opened = data.open_shards(tmp_path / "s")
    assert len(opened) == 10
    assert sorted(opened.labels.tolist()) == [-1] * 3 + [0] * 4 + [1] * 3


def test_names_that_come_twice(tmp_path):
    twice = [*samples(4), *samples(4)]
    write_tar(tmp_path / "s" / "a.tar", twice)
    assert len(data.open_shards(tmp_path / "s")) == 8
    swapped = [("0.png", png(0)), ("0.cls", b"0"), ("0.png", png(1)), ("0.cls", b"1"), ("0.png", png(2))]
    index = index_tar(write_tar(tmp_path / "t" / "a.tar", swapped))
    assert [None if label < 0 else index.labels[label] for label in index.members["label"]] == ["0", "1", None]


def test_litter_links_and_metadata_are_listed(tmp_path):
    members = samples(key="./{:04d}", extra=())
    path = write_tar(
        tmp_path / "s" / "a.tar", [("./._0000.png", APPLE_DOUBLE), ("__MACOSX/._a.cls", APPLE_DOUBLE), *members]
    )
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "0000.png"
        tar.addfile(link)
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    found = data.load(tmp_path / "s")
    assert len(labels_by_name(found)) == 8
    assert kinds(found) == {
        ("a.tar/./._0000.png", "hidden"),
        ("a.tar/__MACOSX/._a.cls", "hidden"),
        ("a.tar/link.png", "no image"),
    }


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, tar_format):
    key = "d" * 60 + "/" + "éa" * (20 if tar_format == tarfile.USTAR_FORMAT else 120) + "{:03d}"
    write_tar(tmp_path / "s" / "a.tar", samples(key=key), format=tar_format)
    found = data.load(tmp_path / "s")
    assert set(labels_by_name(found)) == {f"a.tar/{key.format(n)}.png" for n in range(8)}
    again = data.open_shards(tmp_path / "s")  # from the cache
    assert set(again.names) == set(labels_by_name(found))


@pytest.mark.parametrize(
    ("ending", "mode"),
    [(".tar.gz", "w:gz"), (".tgz", "w:gz"), (".tar", "w:gz"), (".tar.bz2", "w:bz2"), (".tar.xz", "w:xz")],
)
def test_compressed_shards_are_unpacked_to_the_cache(tmp_path, ending, mode):
    path = write_tar(tmp_path / "s" / f"train{ending}", samples(), mode)
    write_tar(tmp_path / "s" / f"test{ending}", samples(4), mode)
    found = data.load(tmp_path / "s")
    assert (len(found.train), len(found.test)) == (8, 4)
    pixels = found.train.fetch(torch.arange(8))
    assert torch.equal(pixels[2], data.decode(png(2), size=12, channels=3))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cannot be unpacked|cut off|damaged"):
        data.load(tmp_path / "s")
    assert {p.suffix for p in (tmp_path / "cache" / "nin" / "shards").iterdir()} == {".tar"}


def test_shards_in_folders_of_parts(tmp_path):
    write_tar(tmp_path / "s" / "train" / "0.tar", samples())
    write_tar(tmp_path / "s" / "validation" / "0.tar", samples(4))
    found = data.load(tmp_path / "s")
    assert (len(found.train), len(found.test)) == (8, 4)
    assert found.test.names[0] == "validation/0.tar/0000.png"


@pytest.mark.parametrize("names", [("imagenet-train-0.tar", "imagenet-validation-0.tar"), ("train.tar", "eval.tar")])
def test_parts_by_the_names_of_shards(tmp_path, names):
    for name, count in zip(names, (8, 4), strict=True):
        write_tar(tmp_path / "s" / name, samples(count))
    found = data.load(tmp_path / "s")
    assert (len(found.train), len(found.test)) == (8, 4)


def test_an_archive_cut_anywhere_is_refused(tmp_path):
    """At every block, and inside headers, data, padding and the end: also where tarfile sees an end."""
    members = samples(3, extra=(("json", b"{}"),))
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + 512  # of the padding of the last member
    assert not whole[end:].strip(b"\0")
    path = tmp_path / "cut.tar"
    for block in range(0, end + 1024, 512):
        for inside in (0, 1, 100, 511):
            path.write_bytes(whole[: block + inside] if block + inside < end + 1024 else whole[: end + 1023])
            with pytest.raises(UserError, match=r"cut\.tar: (cut off|damaged|not a tar file)") as caught:
                data.open_shards(path)
            assert "\n" not in str(caught.value)
    path.write_bytes(whole[: end + 1024])
    assert len(data.open_shards(path)) == 3


def test_a_damaged_header_does_not_end_the_archive(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples())
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[6].offset
    content = bytearray(path.read_bytes())
    content[offset + 20] ^= 0x55
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"damaged at byte {offset:,} of {len(content):,}, after 6 whole members"):
        data.check(path)


def test_joined_archives_are_noted(tmp_path):
    first = write_tar(tmp_path / "s" / "a.tar", samples()).read_bytes()
    (tmp_path / "s" / "a.tar").write_bytes(first + first)
    (finding,) = data.load(tmp_path / "s").findings
    assert (finding.path, finding.detail) == ("a.tar", "what lies behind the end of the archive is not read")


def test_an_empty_shard_is_noted(tmp_path):
    write_tar(tmp_path / "s" / "a.tar", samples())
    write_tar(tmp_path / "s" / "b.tar", [])
    assert kinds(data.load(tmp_path / "s")) == {("b.tar", "no image")}
    (tmp_path / "s" / "c.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"c\.tar: not a tar file, or damaged"):
        data.load(tmp_path / "s")


def test_check_reads_every_image_of_shards(tmp_path, capsys):
    members = samples()
    members[4] = ("0002.png", png(2)[:60])
    members[8] = ("0004.png", png(0))
    members[10] = ("0005.png", png(0))
    write_tar(tmp_path / "s" / "a.tar", members)
    found = data.check(tmp_path / "s")
    assert kinds(found) == {
        ("a.tar/0002.png", "unreadable"),
        ("a.tar/0000.png", "in two classes"),
        ("a.tar/0004.png", "in two classes"),
        ("a.tar/0005.png", "in two classes"),
    }
    assert sum(train + test for _, train, test in found.classes) == 7
    with pytest.raises(SystemExit) as stop:
        main(["check", str(tmp_path / "s")])
    assert stop.value.code == 1
    assert "unreadable, 1 file: left out" in "".join(capsys.readouterr())


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_takes_the_same_images_and_labels(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    extra = (("seg.png", png(99)), ("json", b'{"label": 1}'))
    path = write_tar(
        tmp_path / "s" / "a.tar", [("._0.png", APPLE_DOUBLE), *samples(extra=extra), ("last.png", png(77))]
    )
    theirs = {
        (sample["__key__"], sample["png"]): sample["cls"].decode()
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
        if "png" in sample and "cls" in sample
    }
    shards = data.open_shards(path)
    ours = {
        (split_key(name.removeprefix("a.tar/"))[0], shards.read(index)): str(int(shards.labels[index]))
        for index, name in enumerate(shards.names)
        if shards.labels[index] >= 0
    }
    assert ours == theirs


def test_names_beside_the_metadata_of_nin_are_refused(tmp_path):
    write_tar(tmp_path / "s" / "a.tar", samples(label=lambda n: ("cls", ("cat", "dog")[n % 2])))
    (tmp_path / "s" / "nin-shards.json").write_text('{"classes": ["cat", "dog"]}')
    with pytest.raises(UserError, match=r"expected numbers as labels beside nin-shards\.json, got 'cat'"):
        data.load(tmp_path / "s")
