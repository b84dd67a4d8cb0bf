"""Predictions in files: the rows are the network's, and a stopped call goes on without a row lost or twice."""

import csv
import dataclasses
import io
import json
import os
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import nin
from nin import data
from nin.cli import app
from nin.errors import UserError
from nin.inference import batch_predict
from nin.inference.batch_predict import Partition

COUNT = 200  # more than three batches


@pytest.fixture(scope="module")
def classifier(run):
    return nin.load(run)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    chance = np.random.default_rng(0)
    for number in range(COUNT):
        values = chance.integers(0, 256, (8, 8), dtype=np.uint8)
        name = f'{number:03d} "odd", name\n.png' if number == 3 else f"{number:03d}.png"
        (root / ("a", "b")[number % 2]).mkdir(exist_ok=True)
        Image.fromarray(values).save(root / ("a", "b")[number % 2] / name)
    (root / "b" / "005.png").write_text("no image")
    return root


@pytest.fixture(scope="module")
def paths(folder):
    return data.PathList(sorted(str(path) for path in folder.rglob("*.png")))


@pytest.fixture(scope="module")
def whole(classifier, paths, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "p.csv"
    assert batch_predict.predict_to_file(classifier, paths, out) == batch_predict.PredictionCounts(COUNT, 0, 1)
    assert [path.name for path in out.parent.iterdir()] == ["p.csv"]
    return out.read_bytes()


def rows_of(content):
    return list(csv.DictReader(content.decode().splitlines(keepends=True)))


def test_each_row_is_the_networks_answer(classifier, paths, whole):
    rows = rows_of(whole)
    assert [row["image"] for row in rows] == list(paths)
    for row in rows[::7]:
        if row["problem"]:
            continue
        expected = classifier.predict(row["image"])[0]
        assert row["label"] == expected.label
        assert float(row["confidence"]) == pytest.approx(expected.confidence, abs=2e-6)
        assert [float(row[name]) for name in classifier.classes] == pytest.approx(expected.probabilities, abs=2e-6)
    (bad,) = (row for row in rows if row["problem"])
    assert bad["image"].endswith("005.png")
    assert bad["label"] == ""
    assert bad["problem"] == "empty, not an image, or damaged at its start"


class StopHereError(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 64, 128, 192])
def test_a_stopped_call_goes_on_with_the_same_bytes(classifier, paths, whole, stop_at, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_predict, "SECONDS_BETWEEN_SYNCS", 0)
    out = tmp_path / "p.csv"

    def stop(rows, all_rows):
        if rows >= stop_at:
            raise StopHereError

    with pytest.raises(StopHereError):
        batch_predict.predict_to_file(classifier, paths, out, on_progress=stop)
    assert not out.exists()
    with (tmp_path / "p.csv.partial").open("ab") as file:
        file.write(b"half a li")  # what a kill leaves after the last sync point
    with pytest.raises(UserError, match="go on with --resume"):
        batch_predict.predict_to_file(classifier, paths, out)
    done = batch_predict.predict_to_file(classifier, paths, out, resume=True)
    assert done.resumed == min(64 * -(-stop_at // 64), COUNT)
    assert out.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]


def test_resuming_refuses_other_images_and_damage(classifier, paths, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_predict, "SECONDS_BETWEEN_SYNCS", 0)
    out = tmp_path / "p.csv"

    def stop(rows, all_rows):
        raise StopHereError

    with pytest.raises(StopHereError):
        batch_predict.predict_to_file(classifier, paths, out, on_progress=stop)
    with pytest.raises(UserError, match="about other images"):
        batch_predict.predict_to_file(classifier, paths[1:], out, resume=True)
    sync_point = tmp_path / "p.csv.partial.json"
    content = sync_point.read_text()
    for text, message in (("[", "is damaged"), (json.dumps({**json.loads(content), "bytes": 10**9}), "does not fit")):
        sync_point.write_text(text)
        with pytest.raises(UserError, match=message):
            batch_predict.predict_to_file(classifier, paths, out, resume=True)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_resuming_leaves_a_finished_file_as_it_is(classifier, paths, suffix, tmp_path):
    out, some = tmp_path / f"p.{suffix}", paths[:70]
    batch_predict.predict_to_file(classifier, some, out)
    before = (out.read_bytes(), out.stat().st_mtime_ns)
    counts = batch_predict.predict_to_file(classifier, some, out, resume=True)
    assert (counts.total, counts.resumed) == (70, 70)
    for others in (some[:-1], [*some, paths[80]], [paths[80], *some[1:]]):
        with pytest.raises(UserError, match="no finished table of these images"):
            batch_predict.predict_to_file(classifier, others, out, resume=True)
    assert (out.read_bytes(), out.stat().st_mtime_ns) == before
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    out.write_bytes(b"somebody's notes")
    with pytest.raises(UserError, match="no finished table"):
        batch_predict.predict_to_file(classifier, some, out, resume=True)
    assert out.read_bytes() == b"somebody's notes"


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes_write_one_file(classifier, paths, whole, world_size, tmp_path):
    out = tmp_path / "p.csv"
    partitions = [Partition(rank, world_size) for rank in range(world_size)]
    threads = [
        threading.Thread(
            target=batch_predict.predict_to_file, args=(classifier, paths, out), kwargs={"partition": partition}
        )
        for partition in partitions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    # other batches sum in another order: the last digit may differ
    for one, other in zip(rows_of(out.read_bytes()), rows_of(whole), strict=True):
        assert one["image"] == other["image"]
        assert one["problem"] == other["problem"]
        if not one["problem"]:
            assert float(one["confidence"]) == pytest.approx(float(other["confidence"]), abs=2e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]


def test_partitions_are_all_of_it_once():
    for count in (0, 1, 5, 1000):
        for world_size in (1, 2, 3, 7):
            bounds = [Partition(rank, world_size).bounds(count) for rank in range(world_size)]
            assert [i for start, stop in bounds for i in range(start, stop)] == list(range(count))


def test_parquet_holds_the_same_whatever_comes_first(run, paths, tmp_path, monkeypatch):
    """Blocks of a few rows, most of them without a problem, and classes that look like numbers."""
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(batch_predict, "PARQUET_BLOCK_BYTES", 1000)
    classifier = nin.load(run)
    classes = ("007", "1e3", "true", "", "caf\udce9", "5", "6", "7", "nan", "9")
    classifier.info = dataclasses.replace(classifier.info, classes=classes)
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.png")
    shutil.copy(paths[0], strange)
    bad = next(i for i, path in enumerate(paths) if path.endswith("005.png"))
    order = data.PathList([*paths[:bad], *paths[bad + 1 :], strange, paths[bad]])  # the problem is the last row
    for name in ("p.csv", "p.parquet"):
        batch_predict.predict_to_file(classifier, order, tmp_path / name)
    with open(tmp_path / "p.csv", encoding="utf-8", errors="backslashreplace", newline="") as file:
        head, *texts = csv.reader(file)
    table = parquet.read_table(tmp_path / "p.parquet")
    assert table.column_names == head
    assert [str(kind) for kind in table.schema.types] == ["string"] * 2 + ["double"] * 11 + ["string"]
    rows = list(zip(*(column.to_pylist() for column in table.columns), strict=True))
    assert len(rows) == COUNT + 1
    for row, text in zip(rows, texts, strict=True):
        assert [row[0], row[1], row[-1]] == [text[0], text[1], text[-1]]
        assert list(row[2:-1]) == [float(value) if value else None for value in text[2:-1]]
    assert rows[-1][-1]
    assert not any(row[-1] for row in rows[:-1])
    assert {path.name for path in tmp_path.iterdir()} == {"p.csv", "p.parquet", os.path.basename(strange)}


def test_every_column_has_a_name_of_its_own(run, paths, tmp_path):
    classifier = nin.load(run)
    classes = ("image", "label", "confidence", "problem", *"abcdef")
    classifier.info = dataclasses.replace(classifier.info, classes=classes)
    batch_predict.predict_to_file(classifier, paths[:2], tmp_path / "p.csv")
    head = (tmp_path / "p.csv").read_text().splitlines()[0].split(",")
    asked = [f"class {name}" for name in classes[:4]]
    assert head == ["image", "label", "confidence", *asked, *"abcdef", "problem"]


def test_shards_have_the_answers_of_their_images(classifier, folder, tmp_path, monkeypatch, run):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data.write_shards(folder, tmp_path / "shards", images_per_shard=50)
    app.app(["predict", str(run), str(tmp_path / "shards"), "--csv", str(tmp_path / "p.csv")])
    rows = rows_of((tmp_path / "p.csv").read_bytes())
    images = data.open_shards(tmp_path / "shards")
    assert [row["image"] for row in rows] == list(images.names)
    assert len(rows) == COUNT - 1
    for index in range(0, len(rows), 29):
        assert rows[index]["label"] == classifier.predict(images.read(index))[0].label


def test_the_shell_writes_the_same_file(run, folder, paths, whole, tmp_path, capsys):
    app.app(["predict", str(run), str(folder), "--csv", str(tmp_path / "p.csv")])
    # the shell answers by a snapshot of the network, whose numbers are the same to rounding
    tables = [sorted(csv.reader(io.StringIO(text.decode()))) for text in ((tmp_path / "p.csv").read_bytes(), whole)]
    for row, other in zip(*tables, strict=True):
        for value, wanted in zip(row, other, strict=True):
            assert value == wanted or float(value) == pytest.approx(float(wanted), abs=1e-5)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "200 images in" in captured.err
    assert "1 cannot be read" in captured.err


def test_the_table_leaves_out_what_cannot_be_read(run, folder, capsys):
    app.app(["predict", str(run), str(folder / "b"), "--json"])
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == COUNT // 2 - 1
    assert "left out" in captured.err
    with pytest.raises(UserError, match=r"005\.png"):
        app.app(["predict", str(run), str(folder / "b" / "005.png"), "--json"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "give --csv FILE"),
        (["--csv", "a.csv", "--parquet", "b.parquet"], "not both"),
        (["--parquet", "b.csv"], r"must end in \.parquet"),
    ],
)
def test_wrong_options(run, folder, options, message):
    with pytest.raises(UserError, match=message):
        app.app(["predict", str(run), str(folder), *options])


def test_scores_of_pixels_are_those_of_the_image(classifier, paths):
    p = classifier.info.preprocessing
    pixels = torch.stack([data.decode(path, size=p.size, channels=p.channels) for path in (paths[0], paths[1])])
    assert torch.allclose(classifier.score_pixels(pixels), classifier.scores([paths[0], paths[1]]), atol=1e-6)
