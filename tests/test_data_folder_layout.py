"""Folders as people have them: the names of the parts, unlabelled images, odd files, and what is said of each."""

import os
import shutil
import unicodedata
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from nin import data
from nin.cli.app import main
from nin.cli.check import show_check
from nin.data.split_names import find_splits, folded_name
from nin.errors import UserError


def noise(path, seed=0, size=(8, 8), **options):
    """Write noise, another for each path and seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, *os.fsencode(path)])
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path, **options)


def fill(folder, names=("cat", "dog"), count=3):
    for name in names:
        for number in range(count):
            noise(folder / name / f"{number}.png")


def by_path(found):
    return {finding.path: finding.kind for finding in found.findings}


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"),
        ("Training", "Testing"),
        ("training_set", "test_set"),
        ("train", "dev"),
        ("train", "eval"),
        ("seg_train", "seg_test"),
        ("train_images", "test_images"),
        ("TRAIN", "VALID"),
        ("trainset", "testset"),
        ("TrainSet", "TestSet"),
        ("asl_alphabet_train", "asl_alphabet_test"),
        ("cifar10-train", "cifar10-test"),
        ("train", "test1"),
        ("train2017", "val2017"),
        ("Training Data", "Validation Data"),
        ("entrenamiento", "prueba"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("dataset/dataset/train", "dataset/dataset/val"),
        ("images/train", "images/test"),
        ("trainval", "test"),
        ("train_val", "test"),
        ("训练集", "测试集"),
    ],
)
def test_the_parts_have_many_names(tmp_path, train, test):
    fill(tmp_path / train)
    fill(tmp_path / test, count=2)
    found = data.load(tmp_path)
    assert found.classes == ("cat", "dog")
    assert (len(found.train), len(found.test)) == (6, 4)
    assert all(name.startswith(test + "/") for name in found.test.names)
    assert found.findings == ()


@pytest.mark.parametrize(
    "names", [("train", "bus", "car"), ("latest", "oldest"), ("valley", "hill"), ("test", "train station")]
)
def test_other_names_are_classes(tmp_path, names):
    fill(tmp_path, names, count=4)
    assert data.load(tmp_path).classes == tuple(sorted(names))


def test_trains_are_a_class_even_where_classes_have_folders(tmp_path):
    for name, inside in (("train", ("steam", "diesel")), ("car", ("old", "new"))):
        fill(tmp_path / name, inside)
    assert data.load(tmp_path).classes == ("car", "train")


def test_train_beside_a_folder_without_labels(tmp_path):
    fill(tmp_path / "train", count=5)
    noise(tmp_path / "unlabelled" / "1.png")
    found = data.load(tmp_path)
    assert (found.classes, len(found.train), len(found.test)) == (("cat", "dog"), 8, 2)
    assert found.notes == (f"{tmp_path}/unlabelled is not used (1 image): it is beside train",)


def test_train_beside_a_folder_of_the_same_classes(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "fresh", count=2)
    found = data.load(tmp_path)
    assert (len(found.train), len(found.test)) == (6, 4)
    assert found.notes == (f"{tmp_path}/fresh is taken for the test images: it holds folders of the same names",)


def test_folders_of_equal_names_in_all_classes_are_noted(tmp_path):
    fill(tmp_path / "Lernbilder")
    fill(tmp_path / "Pruefbilder")
    (note,) = data.check(tmp_path).notes
    assert "Lernbilder, Pruefbilder hold folders of the same names (cat, dog)" in note
    assert "call the parts train and test" in note


@pytest.mark.parametrize("set_folder", ["Plants(Augmented)/Plants(Augmented)", "data/dataset"])
def test_the_parts_may_lie_in_one_folder_beside_others(tmp_path, set_folder):
    fill(tmp_path / set_folder / "train")
    fill(tmp_path / set_folder / "valid", count=2)
    noise(tmp_path / "test" / "test" / "leaf.png")
    found = data.check(tmp_path)
    assert found.classes == (("cat", 3, 2), ("dog", 3, 2))
    assert found.notes == (
        f"{tmp_path / set_folder} is read: it holds the parts of the set",
        f"{tmp_path / 'test'} is not used (1 image): the parts of the set lie in "
        f"{tmp_path / set_folder.partition('/')[0]}",
    )


def test_a_class_with_flat_parts_beside_a_class_without_is_no_set(tmp_path):
    for place in ("cat/train", "cat/test", "dog"):
        for number in range(3):
            noise(tmp_path / place / f"{number}.png")
    assert [name for name, _, _ in data.check(tmp_path).classes] == ["cat", "dog"]


@pytest.mark.parametrize("links", [{"cat/all": ".."}, {"cat/all": ".", "cat/dog": "../dog", "dog/cat": "../cat"}])
def test_links_that_lead_back_are_listed_and_end(tmp_path, links):
    fill(tmp_path)
    for name, target in links.items():
        (tmp_path / name).symlink_to(target, target_is_directory=True)
    found = data.check(tmp_path)
    assert [name for name, _, _ in found.classes] == ["cat", "dog"]
    assert "a link to a folder that it lies in" in {finding.detail for finding in found.findings}


def test_the_folder_meant_is_named_however_deep(tmp_path):
    fill(tmp_path / "archive" / "slides" / "breast")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("from a microscope")
    with pytest.raises(UserError, match=r"got only 'archive'; did you mean .*breast\?"):
        data.load(tmp_path)


def test_the_parts_may_lie_in_each_class(tmp_path):
    for name in ("cat", "dog"):
        fill(tmp_path / name, ("train",), count=4)
        fill(tmp_path / name, ("val",), count=2)
        fill(tmp_path / name, ("test",), count=1)
    noise(tmp_path / "cat" / "loose.png")
    found = data.load(tmp_path)
    assert (found.classes, len(found.train), len(found.test)) == (("cat", "dog"), 8, 2)
    assert all("/test/" in name for name in found.test.names)
    expected = {f"{name}/val/{number}.png": name for name in ("cat", "dog") for number in (0, 1)}
    names = found.validation.names
    assert {n: found.classes[label] for n, label in zip(names, found.validation.labels, strict=True)} == expected
    assert by_path(found) == {"cat/loose.png": "no label"}


@pytest.mark.parametrize("place", ["test", "test/unknown", "test/test", "test/images"])
def test_test_images_without_labels(tmp_path, place):
    fill(tmp_path / "train", count=5)
    for number in range(3):
        noise(tmp_path / place / f"{number}.png")
    found = data.load(tmp_path)
    assert (len(found.train), len(found.test)) == (8, 2)
    (note,) = found.notes
    assert "is not used: 3 images without a label" in note
    fill(tmp_path / "val", count=1)
    found = data.load(tmp_path)
    assert found.test.names == ("val/cat/0.png", "val/dog/0.png")
    assert found.notes == (note,)


def test_unlabelled_images_beside_labelled_test_images(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "test")
    noise(tmp_path / "test" / "unknown" / "1.png")
    noise(tmp_path / "test" / "loose.png")
    noise(tmp_path / "stray.png")
    (tmp_path / "val").mkdir()
    found = data.load(tmp_path)
    assert len(found.test) == 6
    assert by_path(found) == {"test/loose.png": "no label", "stray.png": "no label"}
    assert f"{tmp_path}/test/unknown is not used: 1 image without a label" in found.notes


def test_a_class_written_otherwise_in_test_is_that_class(tmp_path):
    fill(tmp_path / "train", ("Traffic Light", "Hydrant"))
    fill(tmp_path / "test", ("traffic_light", "hydrant "))
    found = data.load(tmp_path)
    assert torch.bincount(found.test.labels).tolist() == [3, 3]
    assert any("traffic_light is taken for the class 'Traffic Light'" in note for note in found.notes)


@pytest.mark.parametrize("names", [("Cat", "cat"), ("cat", "cat "), ("red apple", "red_apple")])
def test_classes_of_nearly_one_name_are_noted(tmp_path, names):
    fill(tmp_path, (*names, "dog"))
    found = data.load(tmp_path)
    assert len(found.classes) == 3
    assert f"{names[0]!r} and {names[1]!r} are different classes: if they are one" in found.notes[0]


def test_both_forms_of_an_accent_are_one_class(tmp_path):
    for form in ("NFC", "NFD"):
        noise(tmp_path / unicodedata.normalize(form, "été") / f"{form}.png")
        noise(tmp_path / "hiver" / f"{form}.png")
    found = data.load(tmp_path)
    assert (found.classes, len(found.train) + len(found.test)) == (("hiver", "été"), 4)


@pytest.mark.parametrize(
    ("name", "file_format"),
    [
        *(
            (f"a{e}", "JPEG")
            for e in (".jpg", ".JPG", ".jpeg", ".jfif", ".jpe", ".jpg ", ".jpg.jpg", "", ".bin", ".v1.2")
        ),
        *((f"a{e}", "PNG") for e in (".png", ".apng", "", ".jpg", ".txt")),
        *((f"a{e}", "PPM") for e in (".ppm", ".PNM", "")),
        *((f"a{e}", "TIFF") for e in (".tif", ".TIFF", "")),
        *((f"a{e}", "AVIF") for e in (".avif", "")),
        ("a.webp", "WEBP"),
        ("a.tga", "TGA"),
        ("a.jp2", "JPEG2000"),
        ("a.ico", "ICO"),
        ("a.qoi", "QOI"),
        ("a.pcx", "PCX"),
    ],
)
def test_pillow_says_what_is_an_image(tmp_path, name, file_format):
    root = tmp_path / "set"
    fill(root)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)  # the smallest icon of old Pillows
    Image.fromarray(pixels).save(root / "cat" / name, file_format)
    found = data.check(root)
    assert {row[0]: row[1] + row[2] for row in found.classes} == {"cat": 4, "dog": 3}
    assert set(by_path(found).values()) <= {"wrong extension"}
    assert data.decode(root / "cat" / name, size=8, channels=3).shape == (3, 8, 8)
    assert name in [os.path.basename(path) for path in data.find_images(root / "cat")]
    data.write_shards(root, tmp_path / "shards")
    assert len(data.open_shards(tmp_path / "shards")) == 7


OTHERS = {
    ".DS_Store": b"\0\0\0\1Bud1",
    "._0.png": b"\0\5\x16\7\0\2\0\0Mac OS X        ",
    "Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600),
    "desktop.ini": b"[.ShellClassInfo]",
    "film.mp4": b"\0\0\0\x18ftypmp42" + bytes(64),
    "film.mpg": b"\0\0\1\xba" + bytes(64),
    "paper.pdf": b"%PDF-1.7",
    "drawing.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n",
    "disguised": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n",
    "table.csv": b"P5,P6\n1,2\n",
    "weights.h5": b"\x89HDF\r\n\x1a\n" + bytes(64),
    "empty": b"",
}


@pytest.mark.parametrize("name", OTHERS)
def test_files_that_are_no_images_are_listed(tmp_path, name):
    fill(tmp_path)
    (tmp_path / "cat" / name).write_bytes(OTHERS[name])
    for found in (data.load(tmp_path), data.check(tmp_path)):
        hidden = name.startswith(".") or name in ("Thumbs.db", "desktop.ini")
        assert by_path(found) == {f"cat/{name}": "hidden" if hidden else "no image"}
    assert data.load(tmp_path, strict=True).skipped == ()  # they were never meant to be images
    findings = []
    assert len(list(data.find_images(tmp_path / "cat", findings=findings))) == 3
    assert [finding.path for finding in findings] == [name]


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "__MACOSX", "@eaDir", "$RECYCLE.BIN", ".git", "__pycache__"])
def test_folders_of_systems_are_no_classes(tmp_path, name):
    fill(tmp_path)
    noise(tmp_path / name / "0.png")
    noise(tmp_path / "cat" / name / "0.png")
    found = data.load(tmp_path)
    assert found.classes == ("cat", "dog")
    assert by_path(found) == {f"{name}/": "hidden", f"cat/{name}/": "hidden"}


def test_zero_bytes_and_broken_links_are_unreadable(tmp_path):
    fill(tmp_path)
    (tmp_path / "cat" / "zero.jpg").write_bytes(b"")
    (tmp_path / "cat" / "link.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "cat" / "link").symlink_to(tmp_path / "nowhere")
    found = data.load(tmp_path)
    assert by_path(found) == {"cat/zero.jpg": "unreadable", "cat/link.png": "unreadable", "cat/link": "no image"}
    with pytest.raises(UserError, match=r"cat/link\.png: there is no such file"):
        data.load(tmp_path, strict=True)


def test_a_folder_without_images_is_no_class(tmp_path):
    fill(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "1.xml").write_text("<annotation/>")
    found = data.load(tmp_path)
    assert found.classes == ("cat", "dog")
    assert found.notes == (
        f"{tmp_path}/annotations is no class: it holds no image",
        f"{tmp_path}/empty is no class: it holds no image",
    )
    assert by_path(found) == {"annotations/1.xml": "no image"}


def test_masks_beside_their_images_are_left_out(tmp_path):
    fill(tmp_path)
    for name in ("0_mask.png", "1_mask_1.png", "2-segmentation.png", "2_gt.tif"):
        noise(tmp_path / "cat" / name)
    noise(tmp_path / "dog" / "masks" / "0.png")
    noise(tmp_path / "dog" / "masks" / "1_mask.png")
    noise(tmp_path / "dog" / "other_mask.png")  # of no image
    noise(tmp_path / "dog" / "masks" / "77.png")
    found = data.load(tmp_path)
    left_out = ("cat/0_mask.png", "cat/1_mask_1.png", "cat/2-segmentation.png", "cat/2_gt.tif")
    assert by_path(found) == dict.fromkeys((*left_out, "dog/masks/0.png", "dog/masks/1_mask.png"), "mask")
    assert len(found.train) + len(found.test) == 8
    fill(tmp_path / "faces", ("with_mask", "mask"))
    assert data.load(tmp_path / "faces").classes == ("mask", "with_mask")


def test_masks_in_a_folder_called_after_the_class(tmp_path):
    for name in ("bream", "sprat", "with_mask"):
        for number in range(3):
            noise(tmp_path / name / name / f"{number}.png")
            noise(tmp_path / name / f"{name} GT" / f"{number}.png")
    for number in range(3):  # the class itself is called like masks
        noise(tmp_path / "with_mask" / f"{number}.png")
    found = data.check(tmp_path)
    assert [train + test for _, train, test in found.classes] == [3, 3, 6]
    assert [kind for path, kind in by_path(found).items() if " GT/" in path] == ["mask"] * 9
    assert not any("same names" in note for note in found.notes)


def test_what_nin_wrote_among_the_images_is_left_out(tmp_path, run):
    fill(tmp_path)
    shutil.copytree(run, tmp_path / "run")
    noise(tmp_path / "run" / "samples" / "0.png")
    for number, name in enumerate(("0", "1")):
        for folder in ("maps", "cat"):
            (tmp_path / folder).mkdir(exist_ok=True)
            noise(tmp_path / folder / f"000{number}-{name}.png")
            if folder == "maps":
                _mark(tmp_path / folder / f"000{number}-{name}.png")
    _mark(tmp_path / "cat" / "0001-1.png")
    found = data.load(tmp_path)
    assert found.classes == ("cat", "dog")
    assert by_path(found) == dict.fromkeys(
        ("run/", "maps/0000-0.png", "maps/0001-1.png", "cat/0001-1.png"), "output of nin"
    )
    assert len(found.train) + len(found.test) == 7


def _mark(path):
    from PIL.PngImagePlugin import PngInfo

    comment = PngInfo()
    comment.add_text("Comment", data.MAP_COMMENT)
    with Image.open(path) as image:
        image.load()
    image.save(path, pnginfo=comment)


def test_a_tar_file_beside_the_folders_does_not_make_them_shards(tmp_path):
    fill(tmp_path)
    (tmp_path / "photos.tar").write_bytes(bytes(1024))
    assert not data.is_shards(tmp_path)
    assert by_path(data.load(tmp_path)) == {"photos.tar": "no image"}


def test_a_table_of_labels_is_told(tmp_path):
    for number in range(3):
        noise(tmp_path / "train" / f"{number}.jpg")
    (tmp_path / "train.csv").write_text("id,label\n0,cat\n")
    with pytest.raises(
        UserError, match=r"got 3 images directly in the folder; labels in a table \(train\.csv\) are not"
    ):
        data.load(tmp_path)


def test_check_says_that_all_is_well_beside_harmless_files(tmp_path, capsys):
    fill(tmp_path)
    (tmp_path / "cat" / ".DS_Store").write_bytes(b"")
    show_check(data.check(tmp_path))
    printed = capsys.readouterr()
    text = " ".join((printed.out + printed.err).split())
    assert "hidden, 1 file: left out" in text
    assert "6 images: each is whole" in text
    (tmp_path / "cat" / "half.png").write_bytes((tmp_path / "cat" / "0.png").read_bytes()[:40])
    show_check(data.check(tmp_path))
    assert "are whole" not in "".join(capsys.readouterr())


def test_names_of_parts():
    assert find_splits(["seg_train", "seg_test", "seg_pred"]) == {"seg_train": "train", "seg_test": "test"}
    assert find_splits(["train", "train_masks"]) == {"train": "train"}
    assert find_splits(["trainA", "testA"]) == {"trainA": "train", "testA": "test"}
    assert find_splits(["training", "restraining", "trains", "testimony"]) == {"training": "train"}
    assert find_splits(["train test"]) == {}
    assert Counter(find_splits(["Train", "TEST", "Valid", "dev"]).values()) == {"train": 1, "test": 1, "val": 2}
    assert folded_name(" Red-Apple_1 ") == folded_name("red apple 1")


def test_the_maps_of_predict_are_known_again(tmp_path, run):
    fill(tmp_path)
    images = [str(path) for path in sorted((tmp_path / "cat").iterdir())]
    assert main(["predict", str(run), *images, "--maps", str(tmp_path / "maps")]) in (0, None)
    found = data.load(tmp_path)
    assert found.classes == ("cat", "dog")
    assert by_path(found) == {f"maps/000{number}-{number}.png": "output of nin" for number in range(3)}
