import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import nin
from nin import data
from nin.config import TrainConfig
from nin.data import image_augmentation
from nin.data.image_augmentation import OPERATIONS, ImageAugmentation, random_box, trivial_augment
from nin.data.mixing import Mix, draw_mix, mix_batch, partner_positions
from nin.errors import UserError
from nin.runtime import distributed
from nin.training import batches

CPU = torch.device("cpu")
STRONG = {"augment": "strong", "mixup": 0.2, "cutmix": 1.0}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 2 × 12 JPEGs of 200 × 150 pixels."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for number in range(12):
            noise = Image.fromarray(rng.integers(0, 256, (15, 20, 3), dtype=np.uint8))
            noise.resize((200, 150), Image.Resampling.BICUBIC).save(root / name / f"{number}.jpg")
    return root


@pytest.fixture(scope="module")
def small():
    """Small grey images."""
    rng = np.random.default_rng(0)
    images = data.load((rng.integers(0, 256, (100, 8, 8), dtype=np.uint8), np.arange(100) % 2))
    return dataclasses.replace(images, flip=True)


def resolved(images, **options):
    config = TrainConfig(**{"batch_size": 8, "device": "cpu", **options})
    return config.resolve(images=len(images.train), image_size=images.size, flip=images.flip, shift=images.shift)


def epoch(images, *, number=1, first_step=0, on_lost=None, **options):
    config = resolved(images, **options)
    how = {"epoch": number, "first_step": first_step, "ahead": False, "on_lost": on_lost or (lambda *lost: None)}
    return list(batches.epoch_batches(images, config, CPU, **how))


def equal(first, second):
    pairs = zip(first, second, strict=True)
    return all(torch.equal(x, y) and torch.equal(a, b) for (x, a), (y, b) in pairs)


# -- the draws ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"augment": "strong"}, STRONG, {"mixup": 0.4}, {"balance": "sampling"}])
@pytest.mark.parametrize("size", [32, 96])
def test_batches_are_those_of_any_memory_and_of_a_resumed_epoch(photos, size, options):
    images = data.load(photos, size=size)
    whole = epoch(images, **options)
    assert equal(whole, epoch(images, **options))
    assert equal(whole, epoch(data.load(photos, size=size, memory_limit_bytes=0), **options))
    assert equal(whole, epoch(data.load(photos, size=size, photos=False), **options))
    assert equal(whole[1:], epoch(images, first_step=1, **options))
    assert not torch.equal(whole[0][0], epoch(images, number=2, **options)[0][0])
    assert not torch.equal(whole[0][0], epoch(images, seed=1, **options)[0][0])


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_have_together_what_one_has(photos, monkeypatch, world_size):
    images = data.load(photos, size=96)
    whole = epoch(images, **STRONG)
    parts = []
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "world_size", lambda: world_size)
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(epoch(images, **STRONG))
    for rank, part in enumerate(parts):
        mine = [(x[rank::world_size], targets[rank::world_size]) for x, targets in whole]
        assert equal(part, mine)


def test_the_pixels_are_the_same_in_threads(photos):
    images = data.load(photos, size=96)
    part = batches.augmented_set(images, resolved(images, augment="strong"), epoch=0)
    one, two = (list(data.batches(part, torch.arange(16), 4, workers=workers)) for workers in (0, 3))
    assert all(torch.equal(a, b) for (a, _, _), (b, _, _) in zip(one, two, strict=True))


def test_small_images_keep_flip_and_shift(small):
    config = resolved(small)
    assert config.augment == "light"
    (x, labels), *_ = epoch(small)
    order = data.epoch_order(len(small.train), seed=0, epoch=1)[:8]
    pixels = data.augment(small.train.images[order], order, seed=0, epoch=1, flip=config.flip, shift=config.shift)
    assert torch.equal(x, data.to_float(pixels, small.mean, small.std))
    assert torch.equal(labels, small.train.labels[order])


def test_none_changes_nothing(photos):
    images = data.load(photos, size=96)
    (x, labels), *_ = epoch(images, augment="none")
    order = data.epoch_order(len(images.train), seed=0, epoch=1)[:8]
    assert torch.equal(x, data.to_float(images.train.fetch(order), images.mean, images.std))
    assert torch.equal(labels, images.train.labels[order])
    config = resolved(images, augment="none")
    assert (config.flip, config.shift) == (False, 0)


def test_an_image_that_comes_up_twice_is_another_each_time(photos):
    images = data.load(photos, size=96)
    part = batches.augmented_set(images, resolved(images), epoch=0)
    once, again = part.fetch(torch.tensor([3, 3 + len(part)]))
    assert not torch.equal(once, again)
    assert torch.equal(once, part.fetch(torch.tensor([3]))[0])


def test_a_partner_that_is_lost_leaves_the_image_alone(photos, tmp_path):
    import shutil

    root = shutil.copytree(photos, tmp_path / "copy")
    images = data.load(root, size=96, memory_limit_bytes=0)
    batch = data.epoch_order(len(images.train), seed=0, epoch=1)[:8]
    (root / images.train.names[int(batch[5])]).unlink()
    lost = []
    (x, targets), *_ = epoch(images, mixup=0.4, on_lost=lambda *what: lost.append(what))
    (alone, labels), *_ = epoch(images)  # without it too
    assert len(lost) == 1
    assert len(x) == 7
    torch.testing.assert_close(x[1], alone[1])  # its partner was number 5
    assert targets[1].argmax() == labels[1]
    assert targets[1].max() == 1
    assert not torch.allclose(x[0], alone[0])


# -- the pixels ---------------------------------------------------------------------------------------------------


def light(size=96, **changes):
    options = {"level": "light", "crops": True, "flip": False, "size": size, "interpolation": "bicubic"}
    return ImageAugmentation(**{**options, "fill": (9, 9, 9), "seed": 0, "epoch": 0, **changes})


def test_crops_lie_in_the_photo_and_have_the_sizes_that_were_asked_for():
    rng = np.random.default_rng(0)
    areas, aspects = [], []
    for width, height in ((400, 300), (300, 400), (224, 224)) * 200:
        left, top, right, bottom = random_box(width, height, 0.35, rng.random)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        areas.append((right - left) * (bottom - top) / (width * height))
        aspects.append((right - left) / (bottom - top))
    assert min(areas) >= 0.35 - 1e-9
    assert max(areas) > 0.9
    assert 3 / 4 - 1e-9 <= min(aspects) < 0.8 < 1.25 < max(aspects) <= 4 / 3 + 1e-9
    # a panorama in which no such crop fits
    assert random_box(4000, 30, 0.9, rng.random) == pytest.approx((1980, 0, 2020, 30))


def test_half_of_the_photos_are_mirrored_in_every_epoch_and_the_other_half_in_the_next():
    ramp = np.tile(np.linspace(0, 255, 200, dtype=np.uint8)[None, :, None], (150, 1, 3))
    mirrored = [
        [light(flip=True, epoch=number)(ramp, index)[0, 48].astype(int) for index in range(100)] for number in (0, 1)
    ]
    first, second = ([row[0] > row[-1] for row in rows] for rows in mirrored)
    assert [not a for a in first] == second
    assert 30 < sum(first) < 70
    assert not any(np.diff(light()(ramp, index)[0, 48].astype(int)).min() < -1 for index in range(20))


def test_a_crop_is_torchvisions(monkeypatch):
    pixels = np.random.default_rng(1).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    monkeypatch.setattr(image_augmentation, "random_box", lambda *arguments: (20, 10, 140, 130))
    got = torch.from_numpy(light()(pixels, 0))
    bicubic = v2.InterpolationMode.BICUBIC
    expected = v2.functional.resized_crop(Image.fromarray(pixels), 10, 20, 120, 120, [96, 96], bicubic)
    difference = got.int() - v2.functional.pil_to_tensor(expected).int()
    # torchvision cuts first, so its filter sees no pixel beyond the edge
    assert difference[:, 3:-3, 3:-3].abs().max() == 0


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_shape_and_mode(name, mode):
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 40, 3), dtype=np.uint8)).convert(mode)
    for strength in (-1.0, -0.3, 0.0, 1.0):
        result = OPERATIONS[name](v2.functional, image, strength, [7] * len(image.getbands()))
        assert (result.size, result.mode) == (image.size, image.mode)
    if name not in ("posterize", "solarize", "autocontrast", "equalize"):
        zero = OPERATIONS[name](v2.functional, image, 0.0, [7] * len(image.getbands()))
        assert np.array_equal(np.array(zero), np.array(image))
    changed = OPERATIONS[name](v2.functional, image, 1.0, [7] * len(image.getbands()))
    unchanged = name == "identity" or (mode == "L" and name == "saturation")
    if name != "autocontrast":  # which changes nothing where all values are used
        assert np.array_equal(np.array(changed), np.array(image)) == unchanged


def test_nothing_is_turned_where_nothing_is_mirrored():
    used = set()

    def spy(name):
        return lambda f, image, s, fill: used.add(name) or image

    operations = {name: spy(name) for name in OPERATIONS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_augmentation, "OPERATIONS", operations)
        rng = np.random.default_rng(0)
        for _ in range(500):
            trivial_augment(Image.new("L", (8, 8)), rng.random, turns=False, fill=[0])
        assert used == set(OPERATIONS) - {"rotate", "shear_x", "shear_y"}
        used.clear()
        for _ in range(500):
            trivial_augment(Image.new("L", (8, 8)), rng.random, turns=True, fill=[0])
        assert used == set(OPERATIONS)


def test_strong_erases_a_quarter_of_the_images():
    white = np.full((96, 96, 3), 255, dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_augmentation, "COLOUR_JITTER", 0)
        patch.setattr(image_augmentation, "OPERATIONS", {"identity": OPERATIONS["identity"]})
        erased = [(light(level="strong")(white, index) == 9).mean() for index in range(200)]
    assert 0.15 < np.mean([part > 0 for part in erased]) < 0.35
    assert 0.015 < min(part for part in erased if part) < max(erased) < 0.21


@pytest.mark.parametrize("mode", ["crop", "squash", "letterbox"])
def test_photos_have_the_form_of_the_test_images(photos, mode):
    images = data.load(photos, size=96, resize=mode)
    shape = images.train.photo(0).shape
    assert shape == {"crop": (110, 147, 3), "squash": (110, 110, 3), "letterbox": (110, 110, 3)}[mode]
    lazy = data.load(photos, size=96, resize=mode, memory_limit_bytes=0)
    assert np.array_equal(images.train.photo(3), lazy.train.photo(3))
    chosen = torch.tensor([4, 1])
    for some in (images.train, lazy.train, data.load(photos, size=96, resize=mode, photos=False).train):
        assert np.array_equal(some.select(chosen).photo(1), images.train.photo(1))


def test_shards_are_augmented_like_files(photos, tmp_path):
    data.write_shards(photos, tmp_path / "shards")
    images, files = data.load(tmp_path / "shards", size=96), data.load(photos, size=96)
    label, name = int(images.train.labels[0]), images.train.names[0]
    assert images.train.photo(0).shape == (110, 147, 3)
    assert any(
        np.array_equal(images.train.photo(0), part.photo(index))
        for part in (files.train,)
        for index in (part.labels == label).nonzero().flatten().tolist()
    ), name
    assert epoch(images, augment="strong")[0][0].shape == (8, 3, 64, 64)


def test_grey_photos(photos, tmp_path):
    for path in photos.rglob("*.jpg"):
        target = tmp_path / path.relative_to(photos)
        target.parent.mkdir(exist_ok=True)
        Image.open(path).convert("L").save(target)
    images = data.load(tmp_path, size=96)
    assert images.channels == 1
    assert epoch(images, **STRONG)[0][0].shape == (8, 1, 64, 64)


# -- mixing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_partners_are_a_permutation_without_fixed_points(count):
    positions = torch.arange(count)
    partners = partner_positions(positions, count)
    assert partners.sort().values.equal(positions)
    assert count == 1 or not (partners == positions).any()


def test_mixup_is_the_mean_by_shares():
    x, labels = torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 2, 1])
    own, other = torch.arange(4), torch.tensor([2, 3, 0, 1])
    mixed, targets = mix_batch(x, labels, own, other, Mix(0.3, None), classes=3)
    torch.testing.assert_close(mixed, 0.3 * x + 0.7 * x[other])
    torch.testing.assert_close(targets[0], torch.tensor([0.3, 0.0, 0.7]))
    torch.testing.assert_close(targets[1], torch.tensor([0.0, 1.0, 0.0]))


def test_cutmix_pastes_a_box_and_counts_its_pixels():
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    mix = Mix(0.5, (0.25, 0.5, 1.0, 1.0))
    mixed, targets = mix_batch(x, labels, torch.tensor([0]), torch.tensor([1]), mix, classes=2)
    assert torch.equal(mixed[0, :, 4:, 2:], x[1, :, 4:, 2:])
    assert torch.equal(mixed[0, :, :4], x[0, :, :4])
    torch.testing.assert_close(targets, torch.tensor([[1 - 24 / 64, 24 / 64]]))


def test_mixes_are_a_function_of_seed_and_step():
    how = {"mixup": 0.5, "cutmix": 1.0, "seed": 3}
    mixes = [draw_mix(**how, epoch=0, step=step) for step in range(400)]
    assert mixes == [draw_mix(**how, epoch=0, step=step) for step in range(400)]
    assert mixes[0] != draw_mix(**how, epoch=1, step=0)
    boxes = [mix.box for mix in mixes if mix.box]
    assert 150 < len(boxes) < 250
    assert all(0 <= left <= right <= 1 and 0 <= top <= bottom <= 1 for left, top, right, bottom in boxes)
    assert abs(np.mean([mix.share for mix in mixes]) - 0.5) < 0.06
    assert all(mix.box is None for mix in (draw_mix(mixup=1, cutmix=0, seed=0, epoch=0, step=s) for s in range(9)))
    assert all(mix.box for mix in (draw_mix(mixup=0, cutmix=1, seed=0, epoch=0, step=s) for s in range(9)))


# -- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "heavy"}, "augment must be one of none, light, strong, got 'heavy'"),
        ({"mixup": -0.1}, "mixup must be at least 0 and finite, got -0.1"),
        ({"cutmix": float("inf")}, "cutmix must be at least 0 and finite, got inf"),
        ({"augment": "none", "flip": True}, 'augment "none" changes no image: leave flip and shift away'),
        ({"augment": "none", "shift": 2}, 'augment "none" changes no image'),
    ],
)
def test_wrong_settings_get_one_line(options, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**options)


def test_shift_is_for_small_images():
    with pytest.raises(UserError, match="shift is for images below 96 pixels, got 96: larger ones are cropped"):
        TrainConfig(shift=3).resolve(images=100, image_size=96, flip=True, shift=6)
    assert TrainConfig(shift=3).resolve(images=100, image_size=95, flip=True, shift=5).shift == 3


def test_crops_may_be_smaller_than_the_images_that_are_tested(photos):
    images = data.load(photos, size=96)
    for options in ({}, {"augment": "strong"}, {"mixup": 0.4}):
        assert [x.shape[1:] for x, _ in epoch(images, train_size=64, **options)] == [(3, 64, 64)] * 2
    wrong = {"train_size": 112}, {"train_size": 64, "augment": "none"}
    for options in wrong:
        with pytest.raises(UserError, match="train_size is for random crops of photos, of 96 pixels or more, and at"):
            resolved(images, **options)
    with pytest.raises(UserError, match="train_size is for random crops"):
        TrainConfig(train_size=32).resolve(images=100, image_size=64, flip=True, shift=5)
    with pytest.raises(UserError, match="train_size must be at least 16, got 8"):
        TrainConfig(train_size=8)


def test_a_network_that_does_not_take_the_smaller_crops_is_refused(photos):
    images = data.load(photos, size=224)
    config = TrainConfig(model="timm:vit_tiny_patch16_224", train_size=160, epochs=1)
    with pytest.raises(UserError, match="timm:vit_tiny_patch16_224 does not take images of 3×160×160"):
        nin.train(images, config)


def test_odd_channels_are_refused_where_single_images_are_augmented():
    rng = np.random.default_rng(0)
    images = data.load((rng.integers(0, 256, (40, 8, 8, 5), dtype=np.uint8), np.arange(40) % 2))
    assert epoch(images)[0][0].shape == (8, 5, 8, 8)
    with pytest.raises(UserError, match="augment is for grey or RGB images, got 5 channels"):
        epoch(images, augment="strong")


@pytest.mark.parametrize("size", [16, 96])
def test_a_mixed_up_training_resumes_bit_for_bit(photos, tmp_path, size):
    config = TrainConfig(epochs=2, batch_size=4, model="nin_digits", device="cpu", **STRONG)
    images = data.load(photos, size=size)
    whole = nin.train(images, config, out=tmp_path / "whole")
    steps = iter(range(100))
    keeping = nin.training.CheckpointOptions(stop=lambda: next(steps) == 5)
    with pytest.raises(KeyboardInterrupt):
        nin.train(images, config, out=tmp_path / "part", keeping=keeping)
    rest = nin.train(
        data.load(photos, size=size, memory_limit_bytes=0),
        config,
        out=tmp_path / "part",
        keeping=nin.training.CheckpointOptions(resume=True),
    )
    for a, b in zip(whole.model.state_dict().values(), rest.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    recipe = json.loads((tmp_path / "part" / "config.json").read_text())["recipe"]
    assert {name: recipe[name] for name in STRONG} == STRONG
    other = dataclasses.replace(config, augment="none")
    with pytest.raises(UserError, match="augment"):
        nin.train(images, other, out=tmp_path / "part", keeping=nin.training.CheckpointOptions(resume=True))
