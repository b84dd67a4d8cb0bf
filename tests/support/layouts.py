"""Image folders and shards as people have them, composed at random, with a record of every labelled image in them."""

import dataclasses
import io
import json
import os
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image

SPLITS = [
    ("train", "test"),
    ("Training", "Testing"),
    ("training_set", "test_set"),
    ("seg_train", "seg_test"),
    ("train", "valid"),
    ("train", "dev"),
    ("train", "eval"),
    ("TRAIN", "TEST"),
    ("train_images", "val_images"),
    ("animals_train", "animals_test"),
    ("trainset", "testset"),
    ("Train Data", "Test Data"),
]
CLASSES = [
    ("cat", "dog"),
    ("Cat", "cat", "dog"),
    ("cat", "cat ", "dog"),
    ("été", "hiver"),
    ("0", "1", "2"),
    ("with_mask", "without_mask"),
    ("Ärger", "Freude", "Neugier"),
    ("train", "bus", "car"),
]
# extension, Pillow's format, mode
FILES = [
    (".jpg", "JPEG", "RGB"),
    (".JPG", "JPEG", "RGB"),
    (".jfif", "JPEG", "RGB"),
    (".jpe", "JPEG", "L"),
    (".png", "PNG", "RGB"),
    (".PNG", "PNG", "P"),
    (".png", "PNG", "RGBA"),
    (".png", "PNG", "I;16"),
    (".webp", "WEBP", "RGB"),
    (".avif", "AVIF", "RGB"),
    (".ppm", "PPM", "RGB"),
    (".pgm", "PPM", "L"),
    (".tga", "TGA", "RGB"),
    (".tif", "TIFF", "RGB"),
    (".tiff", "TIFF", "CMYK"),
    (".bmp", "BMP", "RGB"),
    (".gif", "GIF", "P"),
    (".jp2", "JPEG2000", "RGB"),
    (".ico", "ICO", "RGB"),
    ("", "JPEG", "RGB"),
    ("", "PNG", "RGB"),
    (".jpg ", "JPEG", "RGB"),
    (".jpg.jpg", "JPEG", "RGB"),
    (".image", "PNG", "RGB"),
    (".png", "JPEG", "RGB"),
    (".v2.jpeg", "JPEG", "RGB"),
]
APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        " + b"\0" * 60


def encoded(rng, file_format, mode, size=16):
    """Return the bytes of an image unlike any other."""
    values = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 4096, (size, size)).astype(np.uint16))
    else:
        image = Image.fromarray(values).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


@dataclasses.dataclass
class Layout:
    """A folder on the disk, and what is in it.

    Attributes:
        root: what is given to nin.
        labels: the class of each image that has one, by its path relative to root (of shards: SHARD/MEMBER).
        other: paths that must not be taken for labelled images.
        tests: the paths among the labelled images that are test images.
    """

    root: Path
    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    other: set[str] = dataclasses.field(default_factory=set)
    tests: set[str] = dataclasses.field(default_factory=set)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def random_folder(rng, root):
    """Write a random image folder; return its `Layout`."""
    layout = Layout(root)
    classes = list(CLASSES[rng.integers(len(CLASSES))])
    top = root
    for _ in range(rng.integers(3) if rng.random() < 0.3 else 0):
        top = top / "dataset"
    style = rng.choice(["flat", "split", "doubled", "by class"], p=[0.3, 0.45, 0.1, 0.15])
    if style in ("flat", "by class"):
        top = root  # a single folder above classes would be a class
    train, test = SPLITS[rng.integers(len(SPLITS))]
    places = {
        "flat": [("", False)],
        "split": [(train, False), (test, True)],
        "doubled": [(f"{train}/{train}", False), (f"{test}/{test}", True)],
        "by class": [("train", False), ("test", True)],
    }[style]
    for place, is_test in places:
        for name in classes:
            folder = top / name / place if style == "by class" else top / place / name
            _fill_class(rng, layout, folder, name, is_test)
    if style in ("split", "doubled") and rng.random() < 0.4:
        extra = str(rng.choice(["unlabelled", "seg_pred", "sample"]))
        for number in range(3):
            path = top / extra / f"{number}.jpg"
            write(path, encoded(rng, "JPEG", "RGB"))
            layout.other.add(path.relative_to(root).as_posix())
    _add_litter(rng, layout, top, [top / place for place, _ in places] if style != "by class" else [top])
    return layout


def _fill_class(rng, layout, folder, name, is_test):
    stored = unicodedata.normalize(str(rng.choice(["NFC", "NFD"])), folder.name)
    folder = folder.parent / stored
    for number in range(rng.integers(5, 9)):
        extension, file_format, mode = FILES[rng.integers(len(FILES))]
        below = str(rng.choice(["", "", "", "deeper", "a/b"]))
        path = folder / below / f"{'ab'[rng.integers(2)]}{number}{extension}"
        write(path, encoded(rng, file_format, mode))
        relative = path.relative_to(layout.root).as_posix()
        layout.labels[relative] = unicodedata.normalize("NFC", name)
        if is_test:
            layout.tests.add(relative)
        if rng.random() < 0.05 and extension:
            mask = path.with_name(f"{path.stem}_mask.png")
            write(mask, encoded(rng, "PNG", "L"))
            layout.other.add(mask.relative_to(layout.root).as_posix())


def _add_litter(rng, layout, top, places):
    """Add what systems and people leave, at random."""
    classes = [folder for place in places for folder in sorted(place.iterdir()) if folder.is_dir()]
    somewhere = [top, *places, *classes]

    def put(name, content):
        path = somewhere[rng.integers(len(somewhere))] / name
        write(path, content)
        layout.other.add(path.relative_to(layout.root).as_posix())

    jpeg = encoded(rng, "JPEG", "RGB")
    choices = [
        lambda: put(".DS_Store", b"\0\0\0\1Bud1"),
        lambda: put("Thumbs.db", b"\xd0\xcf\x11\xe0" + bytes(100)),
        lambda: put("._a.jpg", APPLE_DOUBLE),
        lambda: put("__MACOSX/cat/._a.jpg", APPLE_DOUBLE),
        lambda: put(".ipynb_checkpoints/a-checkpoint.jpg", jpeg),
        lambda: put("@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", jpeg),
        lambda: put(".hidden.jpg", jpeg),
        lambda: put("zero.png", b""),
        lambda: put("film.mp4", b"\0\0\0\x18ftypmp42" + bytes(50)),
        lambda: put("paper.pdf", b"%PDF-1.4\n%%EOF"),
        lambda: put("notes.txt", b"P5 players, 2 balls"),
        lambda: put("labels.csv", b"id,label\n1,cat\n"),
        lambda: put("half.jpg", jpeg[: len(jpeg) // 2]),
        lambda: put("drawing.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"),
    ]
    for choice in rng.permutation(len(choices))[: rng.integers(0, 7)]:
        choices[choice]()
    if rng.random() < 0.3:
        (classes[0] / "again").symlink_to(classes[0])
    if rng.random() < 0.2:
        (classes[-1] / "gone.jpg").symlink_to(layout.root / "nowhere.jpg")
        layout.other.add((classes[-1] / "gone.jpg").relative_to(layout.root).as_posix())
    if rng.random() < 0.2:
        run = somewhere[rng.integers(len(somewhere))] / "run"
        write(run / "config.json", b"{}")
        write(run / "model.safetensors", b"")
        write(run / "samples" / "0.png", jpeg)
        layout.other |= {(run / "samples" / "0.png").relative_to(layout.root).as_posix()}


def add_member(tar, name, content):
    """Append a file to a tar file that is open."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def random_shards(rng, root):
    """Write random shards; return their `Layout`."""
    layout = Layout(root)
    style = str(rng.choice(["cls", "names", "txt", "json", "json name"]))
    names = [str(k) for k in range(3)] if style in ("cls", "json") else ["cat", "dog", "éléphant"]
    split = rng.random() < 0.4
    shards = ["train-000.tar", "train-001.tar", "test-000.tar"] if split else ["a.tar", "b.tar"]
    suffix = str(rng.choice(["", "", ".gz"]))
    tar_format = int(rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    upper = rng.random() < 0.2
    folder = str(rng.choice(["", "./", "deep/er/", "x" * 90 + "/"]))
    dotted = str(rng.choice(["", "", "v1.2 "]))
    mixed = rng.random() < 0.3
    root.mkdir(parents=True)
    for shard in shards:
        members = []
        for number in range(10):
            key = f"{folder}{dotted}{number:05d}"
            extension, file_format, mode = FILES[rng.integers(17)]
            image = (f"{key}{extension.upper() if upper else extension}", encoded(rng, file_format, mode))
            label = names[(number + len(layout.labels)) % len(names)]
            ending, content = _label_member(style, label)
            sample = [image]
            path = f"{shard}{suffix}/{image[0]}"
            if rng.random() < 0.93:
                sample.append((f"{key}.{ending.upper() if upper else ending}", content.encode()))
                layout.labels[path] = label
                if shard.startswith("test"):
                    layout.tests.add(path)
            else:
                layout.other.add(path)
            if mixed and not dotted:
                sample.append((f"{key}.seg.png", encoded(rng, "PNG", "L")))
                sample.append((f"{key}.npy", b"\x93NUMPY"))
            if rng.random() < 0.05:
                sample.insert(0, (f"{folder}._{number:05d}.jpg", APPLE_DOUBLE))
            members.append(sample)
        flat = [row for sample in members for row in sample]
        if rng.random() < 0.2:  # first all images, then all labels
            flat.sort(key=lambda row: row[0].lower().endswith(("cls", "txt", "json")))
        if rng.random() < 0.3:
            flat.insert(0, ("README", b"hello"))
        mode = "w:gz" if suffix else "w"
        with tarfile.open(root / f"{shard}{suffix}", mode, format=tar_format) as tar:
            for name, content in flat:
                add_member(tar, name, content)
    return layout


def _label_member(style, label):
    """Return the extension and the content of a member that holds a label."""
    if style == "json":
        return "json", json.dumps({"label": int(label), "width": 16})
    if style == "json name":
        return "json", json.dumps({"class_name": label})
    return ("txt", f"{label}\n") if style == "txt" else ("cls", label)


def unmentioned(layout, data):
    """Return the labelled images of a layout that a data set without a val part neither holds right nor lists."""
    held = {}
    for part, is_test in ((data.train, False), (data.test, True)):
        for name, label in zip(part.names, part.labels.tolist(), strict=True):
            held[name] = (data.classes[label], is_test)
    listed = {finding.path for finding in data.findings} | {path for path, _ in data.skipped}
    missing = []
    for path, label in layout.labels.items():
        if path in held:
            right_part = not layout.tests or held[path][1] == (path in layout.tests)
            if held[path][0] != label or not right_part:
                missing.append((path, label, held[path]))
        elif path not in listed:
            missing.append((path, label, None))
    wrong = [(path, None, held[path]) for path in layout.other if path in held]
    return missing + wrong


def is_mentioned(path, data):
    """Return whether a path, a folder above it or a pattern for it is among the findings or the notes."""
    parents = {os.fspath(parent) for parent in Path(path).parents}
    if any(f.path == path or f.path.rstrip("/") in parents for f in data.findings):
        return True
    return any(f"/{parent} " in note for note in data.notes for parent in parents)
