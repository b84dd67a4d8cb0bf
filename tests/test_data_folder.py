"""Image folders: layouts, splits, odd files, and the one-line errors of bad ones."""

import os
import tarfile
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nin.cli import app
from nin.data import FileSet, ImageSet, batches, check, load, write_shards
from nin.data.dataset import PathList, default_size
from nin.data.folder_listing import natural_key
from nin.errors import UserError


def picture(path, colour=(200, 0, 0), size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def noise(path, seed, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


@pytest.fixture
def animals(tmp_path):
    """Two classes, cat with 10 images and dog with 5, each image another."""
    for seed in range(10):
        noise(tmp_path / "cat" / f"{seed}.png", seed)
    for seed in range(5):
        noise(tmp_path / "dog" / "deeper" / f"{seed}.PNG", 100 + seed)
    return tmp_path


def test_a_folder_of_class_folders_is_split_class_by_class(animals):
    data = load(animals)
    assert data.classes == ("cat", "dog")
    assert (data.channels, data.size, data.flip, data.shift) == (3, 8, True, 1)
    assert torch.bincount(data.train.labels).tolist() == [8, 4]
    assert torch.bincount(data.test.labels).tolist() == [2, 1]
    assert data.train.images.dtype == torch.uint8
    assert data.train.images.shape == (12, 3, 8, 8)
    assert len(set(data.train.names) | set(data.test.names)) == 15
    assert data.skipped == ()
    assert data.name == animals.name


def test_images_labels_and_names_belong_together(animals):
    data = load(animals)
    for part in (data.train, data.test):
        for image, label, name in zip(part.images, part.labels, part.names, strict=True):
            assert name.startswith(data.classes[label] + "/")
            stored = np.array(Image.open(animals / name)).transpose(2, 0, 1)
            assert np.array_equal(image.numpy(), stored)


def test_the_split_depends_on_seed_and_names_only(animals, tmp_path_factory):
    first = load(animals, seed=3)
    assert load(animals, seed=3).test.names == first.test.names
    assert any(load(animals, seed=seed).test.names != first.test.names for seed in range(4, 8))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in reversed([*first.train.names, *first.test.names]):  # written in another order
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / name).write_bytes((animals / name).read_bytes())
    again = load(elsewhere, seed=3)
    assert again.test.names == first.test.names
    assert torch.equal(again.train.images, first.train.images)


def test_a_new_file_moves_at_most_one_old_file(animals):
    before = set(load(animals).test.names)
    noise(animals / "cat" / "new.png", 55)
    after = set(load(animals).test.names) - {"cat/new.png"}
    assert len(before - after) <= 1
    assert len(after - before) <= 1


@pytest.mark.parametrize(("fraction", "expected"), [(0.01, [1, 1]), (0.5, [5, 3]), (0.99, [9, 4])])
def test_every_class_keeps_images_on_both_sides(animals, fraction, expected):
    assert torch.bincount(load(animals, test_fraction=fraction).test.labels).tolist() == expected


@pytest.mark.parametrize("held_out", ["test", "val", "valid", "Test"])
def test_given_parts_are_matched_by_name(tmp_path, held_out):
    for name in ("10", "2", "ant"):
        picture(tmp_path / "train" / name / "a.png")
    picture(tmp_path / held_out / "ant" / "b.png")
    picture(tmp_path / held_out / "2" / "c.png")
    data = load(tmp_path)
    assert data.classes == ("2", "10", "ant")
    assert data.train.names == ("train/2/a.png", "train/10/a.png", "train/ant/a.png")
    assert data.test.labels.tolist() == [0, 2]
    assert data.test.names == (f"{held_out}/2/c.png", f"{held_out}/ant/b.png")


def test_val_beside_test_is_the_validation_part(tmp_path):
    for part in ("train", "val", "test", "dev"):
        for name in ("a", "b"):
            picture(tmp_path / part / name / f"{part}.png")
    data = load(tmp_path)
    assert data.test.names == ("test/a/test.png", "test/b/test.png")
    assert data.validation.names == ("dev/a/dev.png", "dev/b/dev.png")
    assert data.validation.labels.tolist() == [0, 1]
    assert data.train.names == ("train/a/train.png", "train/b/train.png")
    (note,) = data.notes
    assert note.endswith("test gives the final figure, " + str(tmp_path / "dev") + " is to choose by")
    assert "val is not used (2 images)" in note
    decoded = load(tmp_path, memory_limit_bytes=0).validation
    assert tuple(decoded.names) == data.validation.names
    assert torch.equal(decoded.fetch(torch.arange(2)), data.validation.images)


@pytest.mark.parametrize(
    ("files", "held", "said"),
    [
        ([], 0, "val is empty"),
        (["1.png", "2.png"], 0, "val is not used: 2 images without a label"),
        (["a/1.png", "c/2.png"], 1, "val/c is not used: 1 image of a class that is not in"),
        (["A/1.png"], 1, "is taken for the class 'a'"),
    ],
)
def test_what_of_val_cannot_be_used_is_said(tmp_path, files, held, said):
    for part in ("train", "test"):
        for name in ("a", "b"):
            picture(tmp_path / part / name / f"{part}.png")
    (tmp_path / "val").mkdir()
    for number, name in enumerate(files):
        picture(tmp_path / "val" / name, size=(20 + number, 20))
    data = load(tmp_path)
    assert held == (0 if data.validation is None else len(data.validation))
    (note,) = data.notes
    assert said in note
    assert len(data.train) + len(data.test) == 4


def test_a_set_with_val_is_checked_and_written_as_shards(tmp_path, capsys):
    for part, count in (("train", 4), ("val", 2), ("test", 3)):
        for name in ("a", "b"):
            for number in range(count):
                noise(tmp_path / "set" / part / name / f"{number}.png", [ord(name), count, number])
    leak = tmp_path / "set" / "val" / "a" / "leak.png"
    leak.write_bytes((tmp_path / "set" / "train" / "a" / "0.png").read_bytes())
    found = check(tmp_path / "set")
    assert found.classes == (("a", 4, 3), ("b", 4, 3))
    assert found.validation == (3, 2)
    kinds = {finding.path: finding.kind for finding in found.findings}
    assert kinds["val/a/leak.png"] == "in validation and another part"
    app.main(["check", str(tmp_path / "set")])
    assert "to choose by" in capsys.readouterr().out
    shards = tmp_path / "shards"
    assert [path.name[:5] for path in write_shards(tmp_path / "set", shards)] == ["train", "test-", "val-0"]
    written = load(shards)
    assert [len(part) for part in (written.train, written.test, written.validation)] == [8, 6, 5]
    assert check(shards).validation == (3, 2)
    # parts that are not there are not made up
    (shards / "test-000000.tar").unlink()
    assert (len(load(shards).test), load(shards).validation) == (5, None)


def test_train_alone_is_split(tmp_path):
    for name in ("cat", "dog"):
        for number in range(5):
            picture(tmp_path / "train" / name / f"{number}.png")
    data = load(tmp_path)
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.test)) == (8, 2)


def test_names_sort_naturally():
    names = ["10", "2", "b10", "b9", "B1", "02", "a", "é", "1a", "1"]
    assert sorted(names, key=natural_key) == ["1", "1a", "02", "2", "10", "a", "B1", "b9", "b10", "é"]
    assert sorted(["x²", "²", "x2"], key=natural_key) == ["x2", "x²", "²"]


def test_hidden_and_foreign_files_are_no_classes_and_no_images(animals):
    picture(animals / ".ipynb_checkpoints" / "x.png")
    picture(animals / "__MACOSX" / "x.png")
    picture(animals / "cat" / ".ipynb_checkpoints" / "x.png")
    picture(animals / "cat" / "._0.png")
    (animals / ".DS_Store").write_bytes(b"\0")
    (animals / "cat" / "notes.txt").write_text("hello")
    (animals / "labels.csv").write_text("a,b")
    data = load(animals)
    assert data.classes == ("cat", "dog")
    assert len(data.train) + len(data.test) == 15
    assert data.skipped == ()


def test_symlink_loops_end_and_do_not_mix_classes(animals):
    (animals / "cat" / "again").symlink_to(animals / "cat")
    (animals / "cat" / "up").symlink_to(animals)
    (animals / "dog" / "above").symlink_to(animals.parent)
    (animals / "dog" / "self").symlink_to(animals / "dog" / "self")
    data = load(animals)
    assert len(data.train) + len(data.test) == 15


def test_links_to_images_and_folders_are_followed(animals, tmp_path_factory):
    store = tmp_path_factory.mktemp("outside") / "store"
    picture(store / "one.png")
    picture(store.parent / "another" / "two.png")
    (store / "up").symlink_to(store.parent)
    (animals / "fox").symlink_to(store)
    (animals / "cat" / "linked.png").symlink_to(store / "one.png")
    (animals / "cat" / "broken.png").symlink_to(store / "gone.png")
    data = load(animals)
    assert data.classes == ("cat", "dog", "fox")
    assert torch.bincount(torch.cat([data.train.labels, data.test.labels])).tolist() == [11, 5, 1]
    assert data.skipped == (("cat/broken.png", "there is no such file"),)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(animals):
    os.mkfifo(animals / "cat" / "pipe.png")
    assert load(animals).skipped == ()


def test_unicode_and_long_names(tmp_path):
    long = "x" * 180
    for name in ("猫", "собака", unicodedata.normalize("NFD", "éléphant")):
        for number in range(2):
            picture(tmp_path / name / long / f"画像 {number}.png")
    data = load(tmp_path)
    assert set(data.classes) == {"猫", "собака", "éléphant"}
    assert len(data.train) == 3


@pytest.mark.skipif(os.name == "nt", reason="this system's names are Unicode")
def test_names_that_are_not_unicode(animals):
    folder = os.fsencode(animals) + b"/cat/"
    os.rename(folder + b"0.png", folder + b"\xff\xfe.png")
    for limit in (0, 1 << 20):
        data = load(animals, memory_limit_bytes=limit)
        assert len(data.train) + len(data.test) == 15
        assert data.train.fetch(torch.arange(len(data.train))).shape == (12, 3, 8, 8)


def spoil(animals):
    content = (animals / "cat" / "0.png").read_bytes()
    (animals / "cat" / "0.png").write_bytes(content[: len(content) // 2])
    (animals / "dog" / "deeper" / "3.PNG").write_text("no image")


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_unreadable_images_are_listed_and_left_out(animals, limit):
    spoil(animals)
    data = load(animals, memory_limit_bytes=limit)
    reasons = dict(data.skipped)
    assert list(reasons) == ["cat/0.png", "dog/deeper/3.PNG"]
    assert "truncated" in reasons["cat/0.png"]
    assert "not an image" in reasons["dog/deeper/3.PNG"]
    assert not set(reasons) & {*data.train.names, *data.test.names}
    assert len(data.train) + len(data.test) == 13


def test_strict_stops_at_an_unreadable_image(animals):
    spoil(animals)
    with pytest.raises(UserError, match=r"dog/deeper/3\.PNG: .*not an image.*replace or remove"):
        load(animals, strict=True)
    (animals / "dog" / "deeper" / "3.PNG").unlink()
    with pytest.raises(UserError, match=r"cat/0\.png: .*truncated.*replace or remove"):
        load(animals, strict=True)


def test_on_demand_equals_in_memory(animals):
    memory, files = load(animals), load(animals, memory_limit_bytes=0)
    assert isinstance(memory.train, ImageSet)
    assert isinstance(files.train, FileSet)
    assert tuple(files.train.names) == memory.train.names
    assert torch.equal(files.train.labels, memory.train.labels)
    assert torch.equal(files.test.fetch(torch.tensor([2, 0])), memory.test.fetch(torch.tensor([2, 0])))
    assert files.mean == memory.mean
    assert files.std == memory.std


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_number_of_workers_changes_nothing(animals, workers):
    spoil(animals)
    one, other = load(animals, workers=1), load(animals, workers=workers)
    assert torch.equal(one.train.images, other.train.images)
    assert one.skipped == other.skipped
    files = load(animals, memory_limit_bytes=0).train
    order = torch.randperm(len(files))
    seen = list(batches(files, order, 4, workers=workers))
    assert torch.equal(torch.cat([indices for _, _, indices in seen]), order)
    assert torch.equal(torch.cat([images for images, _, _ in seen]), one.train.images[order])


def test_a_file_that_vanishes_is_named(animals):
    files = load(animals, memory_limit_bytes=0).train
    (animals / files.names[2]).unlink()
    with pytest.raises(UserError, match=r"cat/.*: there is no such file"):
        list(batches(files, torch.arange(len(files)), 4, workers=2))


def test_many_names_take_few_bytes():
    names = PathList(f"class/{number:07d}.jpg" for number in range(10_000))
    assert names[9_999] == names[-1] == "class/0009999.jpg"
    assert list(names[3:5]) == ["class/0000003.jpg", "class/0000004.jpg"]
    assert len(names._buffer) + names._ends.nbytes < 10_000 * 26
    with pytest.raises(IndexError):
        names[10_000]


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "1"])
def test_grey_folders_have_one_channel(tmp_path, mode):
    for name in ("a", "b"):
        for number in range(2):
            picture(tmp_path / name / f"{number}.png", colour=0, mode=mode)
    data = load(tmp_path)
    assert data.channels == 1
    assert data.std == (1 / 255,)
    assert data.flip is False  # called by single characters: pictures of characters
    picture(tmp_path / "a" / "colour.png")
    assert load(tmp_path).channels == 3


def test_mean_and_std_are_those_of_the_training_images(animals):
    data = load(animals)
    values = data.train.images.double() / 255
    assert data.mean == pytest.approx(values.mean((0, 2, 3)).tolist(), abs=1e-12)
    assert data.std == pytest.approx(values.std((0, 2, 3), correction=0).tolist(), abs=1e-12)


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(28, 28)] * 3, 28),
        ([(64, 64)] * 3, 64),
        ([(80, 80)] * 3, 64),
        ([(28, 28), (28, 30)], 32),
        ([(48, 100)] * 3, 32),
        ([(49, 100)] * 3, 64),
        ([(97, 100)] * 3, 128),
        ([(161, 400)] * 3, 224),
        ([(10, 10), (500, 500), (600, 600)], 224),
    ],
)
def test_the_size_follows_the_images(shapes, expected):
    widths, heights = np.array(shapes).T
    assert default_size(widths, heights, images=5000) == expected
    assert default_size(widths, heights, images=4999) == min(expected, 96)


def test_a_size_can_be_asked_for(animals):
    data = load(animals, size=20)
    assert data.train.images.shape[2:] == (20, 20)
    assert (data.size, data.shift) == (20, 2)


def test_progress_is_reported(animals):
    calls = []
    load(animals, on_progress=lambda *call: calls.append(call))
    assert calls == [("looking at files", 15, 15), ("reading images", 15, 15)]


def test_bad_folders_are_told_in_one_line(tmp_path):
    root = tmp_path / "set"

    def complaint(**options):
        with pytest.raises(UserError) as caught:
            load(root, **options)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        return str(caught.value)

    assert "no such folder" in complaint()
    root.mkdir()
    assert "got an empty folder" in complaint()
    (root / "readme.txt").write_text("x")
    assert "got files that are no images" in complaint()
    picture(root / "stray.png")
    assert "<class>/<image>" in complaint()
    assert "got 1 image directly in the folder" in complaint()
    picture(root / "cat" / "1.png")
    assert "two classes or more, got only 'cat'" in complaint()
    (root / "cat" / "1.png").unlink()
    (root / "cat" / "1.txt").write_text("x")
    (root / "dog").mkdir()
    (root / "dog" / "1.txt").write_text("x")
    assert "got no images" in complaint()
    (root / "cat" / "1.png").write_text("x")
    assert "none of 1 image can be read" in complaint()
    picture(root / "dog" / "1.png")
    picture(root / "dog" / "2.png")
    assert "class 'cat' has no readable training image (1 unreadable)" in complaint()
    picture(root / "cat" / "1.png")
    (root / "dog" / "2.png").unlink()
    assert "no image is left for testing" in complaint()


def test_a_file_is_no_folder(tmp_path):
    picture(tmp_path / "cat.png")
    with pytest.raises(UserError, match="expected a folder, got a file"):
        load(tmp_path / "cat.png")


def test_one_folder_too_high_is_recognised(tmp_path):
    for name in ("cat", "dog"):
        picture(tmp_path / "pictures" / name / "1.png")
    with pytest.raises(UserError, match=r"did you mean .*pictures\?"):
        load(tmp_path)


def test_unknown_and_empty_test_classes(tmp_path):
    for name in ("cat", "dog"):
        picture(tmp_path / "train" / name / "1.png")
    (tmp_path / "test" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match="got no images"):
        load(tmp_path)
    picture(tmp_path / "test" / "fox" / "1.png")
    with pytest.raises(UserError, match=r"class 'fox' is not in .*train"):
        load(tmp_path)


def test_real_folder(tmp_path):
    """A few hundred CIFAR-10 JPEGs from the archive, when it lies beside the repository."""
    archive = Path(__file__).parents[2] / "shared" / "data" / "cifar10-jpeg.tar.xz"
    if not archive.exists():
        pytest.skip(f"{archive} is missing")
    wanted: Counter[str] = Counter()
    with tarfile.open(archive) as tar:
        for member in tar:
            folder = os.path.dirname(member.name)
            if member.isfile() and wanted[folder] < 5:
                wanted[folder] += 1
                tar.extract(member, tmp_path, filter="data")
            if sum(wanted.values()) >= 30:
                break
    root = next(path.parent for path in tmp_path.rglob("*") if path.is_dir() and path.name in ("train", "test"))
    for part in ("train", "test"):
        if (root / part).exists():
            data = load(root / part)
            assert (data.channels, data.size) == (3, 32)
            assert data.skipped == ()
            assert data.train.images.float().std() > 20
