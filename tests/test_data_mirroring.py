"""Mirroring: what the names of classes say, what a look at the images says, and that a training keeps to it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import nin
from nin import data, training
from nin.cli.train import flip_text
from nin.config import TrainConfig
from nin.data.mirroring import choose_flip, find_swapped_classes, reason_in_names

SHARED = Path(__file__).parents[2] / "shared" / "data"


def arrows(angle, count, seed):
    """Return noisy arrows that point at about an angle (0 is right, counterclockwise), uint8 (N, 3, 32, 32)."""
    rng, images = np.random.default_rng(seed), []
    for _ in range(count):
        back, front = rng.integers(0, 90, 3), rng.integers(150, 256, 3)
        image = Image.new("RGB", (64, 64), tuple(back.tolist()))
        draw = ImageDraw.Draw(image)
        draw.line((12, 32, 46, 32), fill=tuple(front.tolist()), width=9)
        draw.polygon([(56, 32), (38, 16), (38, 48)], fill=tuple(front.tolist()))
        move = tuple(rng.integers(-5, 6, 2).tolist())
        image = image.rotate(angle + float(rng.normal(0, 6)), translate=move).resize((32, 32))
        images.append((np.asarray(image) + rng.normal(0, 12, (32, 32, 3))).clip(0, 255).astype(np.uint8))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def blobs(count, classes, seed):
    """Images of spots whose number is the class and whose places are random: mirroring changes nothing."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 40, (count, 1, 24, 24)).astype(np.uint8)
    labels = np.arange(count) % classes
    for image, label in zip(images, labels, strict=True):
        for row, column in rng.integers(0, 20, (3 * label + 1, 2)):
            image[0, row : row + 4, column : column + 4] = 220
    return torch.from_numpy(images), torch.from_numpy(labels)


@pytest.mark.parametrize(
    "names",
    [
        ("turn left", "turn right"),
        ("turnLeft", "ahead"),
        ("Links", "Rechts"),
        ("gauche", "droite"),
        ("izquierda", "derecha"),
        ("sign_east", "sign_west"),
        ("clockwise", "counter-clockwise"),
        ("mirrored", "plain"),
        ("hand_L", "hand_R", "foot_L", "foot_R"),
        ("knee l", "knee r", "hip"),
        ("0", "1", "2"),
        ("zero", "one", "two"),
        ("digit_3", "digit_4"),
        ("b", "d", "p", "q"),
        ("letter a", "letter b"),
        (*"ABCDEFGH", "space"),
        ("0", "90", "180", "270"),
        ("rot0", "rot90"),
        ("-45 deg", "0 deg", "45 deg"),
        ("N", "E", "S", "W"),
        ("NE", "SW"),
        ("north", "south", "east", "west"),
        ("左", "右"),
    ],
)
def test_names_that_speak_against_mirroring(names):
    assert reason_in_names(names) is not None


@pytest.mark.parametrize(
    "names",
    [
        ("cat", "dog"),
        ("T-shirt/top", "Trouser", "Pullover"),
        ("copyright", "brightness"),
        ("aleft", "theft"),
        ("class 1", "class 2", "class 3"),
        ("grade_0", "grade_1"),
        ("1", "2", "10", "11", "57", "102"),
        ("5", "10", "20", "50"),
        ("b1", "knee"),
        ("with_mask", "without_mask"),
    ],
)
def test_names_that_say_nothing_about_mirroring(names):
    assert reason_in_names(names) is None


@pytest.mark.parametrize(
    ("angles", "swapped"),
    [((180, 0), (0, 1)), ((0, 90, 180, 270), (0, 2)), ((45, 135, 270), (0, 1)), ((90, 270), None)],
)
@pytest.mark.parametrize("count", [16, 60])
def test_classes_that_are_mirror_images_are_seen(angles, swapped, count):
    images = torch.cat([arrows(angle, count, seed) for seed, angle in enumerate(angles)])
    labels = torch.arange(len(angles)).repeat_interleave(count)
    assert find_swapped_classes(images, labels, len(angles)) == swapped
    choice = choose_flip([f"kind {name}" for name in ("foo", "bar", "baz", "qux")[: len(angles)]], images, labels)
    assert choice.flip is (swapped is None)
    if swapped is not None:
        assert "mirrored images of 'kind foo' look like" in choice.reason


@pytest.mark.parametrize("seed", range(3))
def test_classes_that_only_differ_otherwise_are_mirrored(seed):
    images, labels = blobs(300, 3, seed)
    assert find_swapped_classes(images, labels, 3) is None
    assert find_swapped_classes(images, labels[torch.randperm(300)], 3) is None  # labels that mean nothing


def test_left_and_right_of_an_object_are_seen():
    images, _ = blobs(200, 3, 0)
    labels = torch.arange(200) % 2
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 9:15, (2, 16)[label] : (8, 22)[label]] = 255
    assert find_swapped_classes(images, labels, 2) == (0, 1)


def test_few_images_and_empty_classes_are_no_evidence():
    images = torch.cat([arrows(0, 5, 0), arrows(180, 5, 1)])
    labels = torch.arange(2).repeat_interleave(5)
    choice = choose_flip(["foo", "bar"], images, labels)
    assert choice.flip
    assert "too few images" in choice.reason
    images = torch.cat([arrows(0, 20, 0), arrows(180, 20, 1)])
    assert find_swapped_classes(images, torch.tensor([1, 4]).repeat_interleave(20), 7) == (1, 4)
    assert find_swapped_classes(images[:20], torch.zeros(20, dtype=torch.int64), 3) is None


def test_many_classes_are_looked_at_in_pairs_of_neighbours():
    """Of 600 classes, a few at a time: the answer takes about a second, and no error."""
    images = torch.randint(0, 256, (7200, 1, 8, 8), dtype=torch.uint8)
    assert find_swapped_classes(images, torch.arange(7200) % 600, 600) is None


@pytest.mark.parametrize(("name", "folder"), [("fashion-mnist", "FashionMNIST"), ("mnist", "MNIST")])
def test_real_sets(name, folder):
    if not (SHARED / folder).exists():
        pytest.skip(f"{SHARED / folder} is missing")
    images = data.load(name, data_dir=SHARED)
    assert images.flip is (name == "fashion-mnist")
    sample = images.train.images[:2000], images.train.labels[:2000]
    # a mirrored 2 looks like a 5 when the names do not tell that they are digits
    assert find_swapped_classes(*sample, 10) == (None if name == "fashion-mnist" else (2, 5))


@pytest.fixture
def turns(tmp_path):
    """A folder of arrows to both sides whose class names tell nothing."""
    for name, angle in (("foo", 0), ("bar", 180)):
        (tmp_path / "turns" / name).mkdir(parents=True)
        for number, pixels in enumerate(arrows(angle, 30, angle)):
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "turns" / name / f"{number}.png")
    return tmp_path / "turns"


def test_the_choice_is_said_and_can_be_changed(turns):
    images = data.load(turns)
    assert images.flip is False
    assert flip_text(images, nin.TrainConfig()) == (
        "No image is mirrored: mirrored images of 'bar' look like 'foo', and the other way round (--flip changes it)"
    )
    assert flip_text(images, nin.TrainConfig(flip=True)) == "Half of the images are mirrored in each epoch: as asked"
    assert "(--no-flip changes it)" in flip_text(dataclasses.replace(images, flip=True), nin.TrainConfig())
    assert data.load(turns, memory_limit_bytes=0).flip is False


def test_a_training_keeps_the_choice_that_it_began_with(turns, tmp_path):
    images = data.load(turns)
    config = TrainConfig(model="nin_digits", epochs=2, batch_size=16, threads=1, precision="fp32")
    steps = []

    def stop():
        steps.append(1)
        return len(steps) == 2

    begun_otherwise = dataclasses.replace(images, flip=True, flip_reason="another version")
    with pytest.raises(KeyboardInterrupt):
        training.train(begun_otherwise, config, out=tmp_path / "run", keeping=training.CheckpointOptions(stop=stop))
    assert training.with_recorded_augmentation(images, tmp_path / "run").flip is True
    resumed = training.train(images, config, out=tmp_path / "run", keeping=training.CheckpointOptions(resume=True))
    assert resumed.info.recipe["flip"] is True
    assert "test_accuracy_flip" in resumed.info.result  # the second view follows the same choice
    again = training.train(images, config, out=tmp_path / "run", keeping=training.CheckpointOptions(resume=True))
    assert again.info.recipe["flip"] is True
    assert training.with_recorded_augmentation(images, tmp_path / "none") is images
    fresh = training.train(images, config)
    assert fresh.info.recipe["flip"] is False
    assert "test_accuracy_flip" not in fresh.info.result
