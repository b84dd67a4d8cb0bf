"""Shards: what is written is read again, any image at any time, and nothing is lost or twice."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from nin import data
from nin.cli import app
from nin.config import TrainConfig
from nin.data import dataset, tar_index
from nin.data import webdataset as shards
from nin.errors import UserError
from support.stopping import check_resuming


def noise(seed):
    values = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """40 images in two classes; a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number in range(40):
        path = tmp_path / "images" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(number).save(path)
    return tmp_path / "images"


def by_content(images):
    return sorted((images.decode(index).tobytes(), int(images.labels[index])) for index in range(len(images)))


def test_shards_hold_what_the_folder_holds(folder, tmp_path):
    files, written = (
        data.load(folder, memory_limit_bytes=0),
        data.write_shards(folder, tmp_path / "s", images_per_shard=7),
    )
    assert [path.name for path in written] == [
        *(f"train-{n:06d}.tar" for n in range(5)),
        *(f"test-{n:06d}.tar" for n in range(2)),
    ]
    packed = data.load(tmp_path / "s")
    assert (packed.classes, packed.size, packed.channels) == (files.classes, files.size, files.channels)
    assert packed.mean == pytest.approx(files.mean, abs=1e-12)
    for part in ("train", "test"):
        assert by_content(getattr(packed, part)) == by_content(getattr(files, part))
    again = data.write_shards(folder, tmp_path / "again", images_per_shard=7)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_them(folder, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    written = data.write_shards(folder, tmp_path / "s", images_per_shard=16)
    urls = [str(path) for path in written]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("png", "cls"))
    assert len(samples) == 40
    packed = data.open_shards(tmp_path / "s" / "train-{000000..000001}.tar")
    packed = dataclasses.replace(packed, size=12)
    for index, (image, label) in enumerate(samples[: len(packed)]):
        assert np.array_equal(packed.decode(index).transpose(1, 2, 0), image)
        assert int(packed.labels[index]) == label


def test_what_is_left_out_of_the_shards_is_said(folder, tmp_path, capsys):
    source = tmp_path / "photos"
    shutil.copytree(folder, source)
    broken = next(source.rglob("*.png")).with_name("broken.png")
    broken.write_text("no image")
    app.main(["shards", str(source), "--out", str(tmp_path / "s")])
    printed = capsys.readouterr().err
    assert "unreadable, 1 file: left out" in printed
    assert "broken.png: " in printed


def test_a_stopped_command_goes_on(folder, tmp_path, monkeypatch):
    out, whole = tmp_path / "s", tmp_path / "whole"
    data.write_shards(folder, whole, images_per_shard=7)

    class StopHereError(Exception):
        pass

    def stop(text, done, total):
        if text == "writing train shards" and done == 2:
            raise StopHereError

    with pytest.raises(StopHereError):
        data.write_shards(folder, out, images_per_shard=7, on_progress=stop)
    (out / ".train-000002.tar.abc").write_bytes(b"half")
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(times) == 2
    with pytest.raises(UserError, match="holds something else than an interrupted call"):
        data.write_shards(folder, out, images_per_shard=8)
    data.write_shards(folder, out, images_per_shard=7)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar") if path.name in times} == times
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
    # once more, when all are there: nothing is written, but a shard that is gone
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert data.write_shards(folder, out, images_per_shard=7) == tuple(
        sorted(out.glob("train-*.tar")) + sorted(out.glob("test-*.tar"))
    )
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == times
    with pytest.raises(UserError, match="holds something else"):
        data.write_shards(folder, out, images_per_shard=8)
    (out / "notes.txt").touch()
    with pytest.raises(UserError, match=r"overwrite removes shards only, and .*notes.txt"):
        data.write_shards(folder, out, images_per_shard=8, overwrite=True)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}.items() <= times.items()
    (out / "notes.txt").unlink()
    (out / ".train-000002.tar.abc").write_bytes(b"half")
    data.write_shards(folder, whole, images_per_shard=8, overwrite=True)
    data.write_shards(folder, out, images_per_shard=8, overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
    assert len(list(out.glob("*.tar"))) != len(times) - 1


def test_training_on_shards_resumes_in_the_middle_of_an_epoch(folder, tmp_path):
    data.write_shards(folder, tmp_path / "s", images_per_shard=7)
    images = data.load(tmp_path / "s")
    config = TrainConfig(model="nin_digits", epochs=2, batch_size=4, threads=1, precision="fp32")
    check_resuming(images, config, tmp_path, 5)


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def png(seed):
    content = io.BytesIO()
    noise(seed).save(content, "PNG")
    return content.getvalue()


def test_shards_of_others_have_numbers_for_classes(folder, tmp_path):
    for shard in range(2):
        members = [(f"a/{n:03d}.{e}", c) for n in range(10) for e, c in (("png", png(n)), ("cls", b"%d\n" % (n % 3)))]
        write_tar(tmp_path / "other" / f"{shard}.tar", [("readme.txt", b"hello"), *members])
    images = data.load(tmp_path / "other")
    assert images.classes == ("0", "1", "2")
    assert len(images.train) + len(images.test) == 20
    assert sorted({*images.train.names, *images.test.names})[:2] == ["0.tar/a/000.png", "0.tar/a/001.png"]


def test_an_image_that_cannot_be_read_is_left_out_of_its_batch(folder, tmp_path):
    members = [(f"{n}.{e}", c) for n in range(9) for e, c in (("png", png(n)), ("cls", b"%d" % (n % 2)))]
    members[6] = ("3.png", b"no image")
    write_tar(tmp_path / "bad.tar", members)
    images = dataclasses.replace(data.open_shards(tmp_path / "bad.tar"), size=12)
    lost = []
    batches = list(data.batches(images, torch.arange(9), 4, on_lost=lambda *what: lost.append(what)))
    assert [indices.tolist() for _, _, indices in batches] == [[0, 1, 2], [4, 5, 6, 7], [8]]
    assert lost == [("bad.tar/3.png", "empty, not an image, or damaged at its start")]
    assert torch.equal(batches[0][0][2], torch.from_numpy(images.decode(2)))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.txt", b"x")], "hold no images"),
        ([("a.png", b"x")], "has no label"),
        ([("a.png", b"x"), ("a.cls", b"-1")], r"has no label \(a\.cls holds no label: a number below 0"),
        ([("a.png", b"x"), ("a.cls", b"one")], "two classes or more, got only 'one'"),
        ([("a.png", b"x"), ("a.json", b'{"score": 1}')], r"its keys are score; expected one of label"),
        ([("a.png", b"x"), ("a.cls", b"1"), ("b.png", b"x"), ("b.cls", b"0")], "none of the images looked at"),
    ],
)
def test_shards_that_nobody_can_train_on(folder, tmp_path, members, message):
    write_tar(tmp_path / "s" / "a.tar", members)
    with pytest.raises(UserError, match=message):
        data.load(tmp_path / "s")


def test_wrong_shards_are_refused_in_a_line(folder, tmp_path):
    (tmp_path / "no.tar").write_bytes(b"this is no tar file" * 100)
    with pytest.raises(UserError, match=r"no\.tar: not a tar file, or damaged"):
        data.load(tmp_path / "no.tar")
    with pytest.raises(UserError, match="there is no such shard"):
        data.load(tmp_path / "none-{0..1}.tar")
    data.write_shards(folder, tmp_path / "s")
    with pytest.raises(UserError, match="holds shards already"):
        data.write_shards(tmp_path / "s", tmp_path / "t")
    for text in ("[", json.dumps({"classes": [1, 2]}), "{}"):
        (tmp_path / "s" / "nin-shards.json").write_text(text)
        with pytest.raises(UserError, match=r"nin-shards\.json is damaged"):
            data.load(tmp_path / "s")


def test_the_index_is_remembered_and_forgotten_when_damaged(folder, tmp_path, monkeypatch):
    data.write_shards(folder, tmp_path / "s")
    scans = []
    scan = tar_index._read_index
    monkeypatch.setattr(tar_index, "_read_index", lambda path: scans.append(path) or scan(path))
    first = data.open_shards(tmp_path / "s")
    assert len(scans) == 2
    second = data.open_shards(tmp_path / "s")
    assert len(scans) == 2
    assert list(first.names) == list(second.names)
    assert np.array_equal(first.members, second.members)
    for memory in (tmp_path / "cache").glob("nin/examined/*"):
        memory.write_bytes(memory.read_bytes()[:50])
    assert list(data.open_shards(tmp_path / "s").names) == list(first.names)
    assert len(scans) == 4


def test_urls_are_fetched_once(folder, tmp_path):
    pytest.importorskip("webdataset")
    (path, _) = data.write_shards(folder, tmp_path / "s")
    url = f"file:{path}"
    first = data.open_shards(url)
    assert len(first) == 32
    path.unlink()
    assert list(data.open_shards(url).names) == list(first.names)
    with pytest.raises(UserError, match="cannot be fetched"):
        data.open_shards(f"file:{tmp_path}/none.tar")
    with pytest.raises(UserError, match="cannot be fetched"):
        data.open_shards(f"pipe:cat {first.shards[0]}; false")
    assert [p.name for p in first.shards[0].parent.iterdir()] == [first.shards[0].name]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
@pytest.mark.parametrize("size", [5_000, 50_000])  # the disk is full when the buffer is flushed, and while copying
def test_a_shard_that_does_not_fit_on_the_disk_is_told_with_its_url(size, tmp_path):
    pytest.importorskip("webdataset")
    code = """
import resource, signal, sys
from nin import data
from nin.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    data.open_shards(sys.argv[1])
except UserError as error:
    print(error)
"""
    (tmp_path / "a.tar").write_bytes(bytes(size))
    url = f"file:{tmp_path}/a.tar"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, url]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith(f"{url}: cannot be fetched ([Errno 27] File too large")
    assert list((tmp_path / "cache" / "nin" / "shards").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{a,b}-{0..1}.tar", ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]),
    ],
)
def test_patterns_expand_as_in_the_shell(text, expected):
    assert list(shards._expand_braces(text)) == expected


def test_one_huge_label_does_not_make_a_billion_classes(tmp_path):
    path = tmp_path / "x.tar"
    members = [(f"{n}.{e}", c) for n in range(9) for e, c in (("png", png(n)), ("cls", b"%d" % (n % 2)))]
    write_tar(path, [*members, ("9.png", png(9)), ("9.cls", b"999999999")])
    with pytest.raises(UserError, match="label 999999999 does not fit 100000 classes"):
        data.load(str(path))


def counted(monkeypatch):
    """Count the images that are decoded from shards and from files, by name."""
    found = Counter()
    for module, kind in ((shards, "decode_pixels"), (shards, "decode_photo"), (dataset, "decode_pixels")):
        decode = getattr(module, kind)

        def count(source, *, decode=decode, kind=kind, **options):
            found[kind, options.get("name") or str(source)] += 1
            return decode(source, **options)

        monkeypatch.setattr(module, kind, count)
    return found


def test_what_memory_can_hold_is_decoded_once(folder, tmp_path, monkeypatch):
    data.write_shards(folder, tmp_path / "shards")
    expected = data.load(tmp_path / "shards", memory_limit_bytes=0)
    found = counted(monkeypatch)
    images = data.load(tmp_path / "shards")
    order = torch.arange(len(images.train))
    for _ in range(2):
        for batch in data.batches(images.train, order, 5):
            assert batch[0].dtype == torch.uint8
        images.test.fetch(torch.arange(len(images.test)))
    # the images of the statistics are among them, and so are those of parts and of the same image again
    part = data.split_validation(images, 0.3, seed=0)
    part.validation.fetch(torch.arange(len(part.validation)))
    part.train.select(torch.tensor([3, 1])).fetch(torch.tensor([0, 1]))
    assert set(found.values()) == {1}
    assert len(found) == len(images.train) + len(images.test)
    assert torch.equal(images.train.fetch(order), expected.train.fetch(order))
    for index in range(2):
        np.testing.assert_array_equal(images.train.photo(index), expected.train.photo(index))
    images.train.photo(1)
    assert [count for (kind, _), count in found.items() if kind == "decode_photo"][-1] == 2  # ours once, the other once
    # another process decodes its own
    again = pickle.loads(pickle.dumps(images.train))
    assert (again.store.used, torch.equal(again.fetch(order), images.train.fetch(order))) == (0, True)


@pytest.mark.parametrize("kind", ["shards", "folder"])
def test_what_does_not_fit_into_memory_is_decoded_each_time(folder, tmp_path, monkeypatch, kind):
    data.write_shards(folder, tmp_path / "shards")
    source = tmp_path / "shards" if kind == "shards" else folder
    one = data.load(source, memory_limit_bytes=0).test.decode(0).nbytes
    images = data.load(source, memory_limit_bytes=10 * one)
    found = counted(monkeypatch)
    order = torch.arange(len(images.train))
    images.test.fetch(torch.arange(len(images.test)))
    for _ in range(3):
        images.train.fetch(order)
    assert images.train.store is images.test.store
    assert images.train.store.used <= 10 * one
    once = sum(count <= 1 for count in found.values())
    assert 0 < once <= 10
    assert max(found.values()) == 3
