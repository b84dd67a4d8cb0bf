import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import nin
from nin import checkpoint, data
from nin.checkpoint import Preprocessing
from nin.data import ResizeOptions
from nin.data.resizing import BAR_GREY, draft_size
from nin.errors import UserError

BICUBIC = v2.InterpolationMode.BICUBIC


def photo(width, height, mode="RGB"):
    """Return a smooth image: different filters and roundings stay close on it."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [127 + 120 * np.sin(x / 37 + shift) * np.cos(y / 53 - shift) for shift in (0, 1, 2)]
    image = Image.fromarray(np.stack(channels, 2).round().astype(np.uint8))
    return image.convert(mode)


def decode(image, size, **options):
    return data.decode(image, size=size, channels=len(image.getbands()), resize=ResizeOptions(**options))


@pytest.mark.parametrize("shape", [(300, 400), (401, 299), (256, 256), (91, 640)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_crop_fraction_is_torchvisions_resize_and_crop(shape, mode):
    image = photo(*shape, mode)
    got = decode(image, 112, crop_fraction=0.875)
    expected = v2.functional.pil_to_tensor(v2.CenterCrop(112)(v2.Resize(128, BICUBIC)(image)))
    # torchvision rounds the longer side and the corner to whole pixels, here the box is exact: half a pixel apart
    slope = max(int(expected.int().diff(dim=axis).abs().max()) for axis in (1, 2))
    assert (got.int() - expected.int()).abs().max() <= 0.6 * slope + 2


@pytest.mark.parametrize("shape", [(300, 400), (401, 299), (50, 640), (224, 224)])
def test_squash_keeps_everything(shape):
    image = photo(*shape)
    expected = v2.functional.pil_to_tensor(v2.Resize((64, 64), BICUBIC)(image))
    assert torch.equal(decode(image, 64, mode="squash"), expected)


def test_squash_with_a_crop_fraction_is_the_middle_of_a_larger_square():
    image = photo(300, 400)
    expected = v2.functional.pil_to_tensor(v2.CenterCrop(64)(v2.Resize((80, 80), BICUBIC)(image)))
    assert (decode(image, 64, mode="squash", crop_fraction=0.8).int() - expected.int()).abs().max() <= 2


@pytest.mark.parametrize(("shape", "inner"), [((300, 400), (48, 64)), ((400, 100), (64, 16)), ((9, 3000), (1, 64))])
def test_letterbox_keeps_proportions_between_grey_bars(shape, inner):
    image = photo(*shape)
    got = decode(image, 64, mode="letterbox")
    width, height = inner
    top, left = (64 - height) // 2, (64 - width) // 2
    expected = v2.functional.pil_to_tensor(image.resize(inner, Image.Resampling.BICUBIC))
    assert torch.equal(got[:, top : top + height, left : left + width], expected)
    bars = torch.ones(64, 64, dtype=torch.bool)
    bars[top : top + height, left : left + width] = False
    assert (got[:, bars] == BAR_GREY).all()


@pytest.mark.parametrize("mode", ["crop", "squash", "letterbox"])
def test_a_square_image_is_resized_the_same_in_every_mode(mode):
    image = photo(100, 100)
    assert torch.equal(decode(image, 64, mode=mode), decode(image, 64))
    assert torch.equal(decode(image, 100, mode=mode), v2.functional.pil_to_tensor(image))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "hamming", "box", "nearest"])
def test_interpolations_are_pillows(interpolation):
    image = photo(90, 70)
    expected = image.resize((31, 31), Image.Resampling[interpolation.upper()])
    got = decode(image, 31, mode="squash", interpolation=interpolation)
    assert torch.equal(got, v2.functional.pil_to_tensor(expected))


@pytest.mark.parametrize("fraction", [1.0, 0.875, 0.3])
@pytest.mark.parametrize("mode", ["crop", "squash", "letterbox"])
def test_a_jpeg_decoded_at_a_fraction_looks_the_same(tmp_path, mode, fraction):
    image = photo(1600, 1200)
    image.save(tmp_path / "a.jpg", quality=95)
    options = {"mode": mode, "crop_fraction": fraction}
    got = data.decode(tmp_path / "a.jpg", size=40, channels=3, resize=ResizeOptions(**options))
    with Image.open(tmp_path / "a.jpg") as file:
        assert (got.int() - decode(file.convert("RGB"), 40, **options).int()).abs().max() <= 4


def test_a_draft_holds_twice_what_is_needed():
    assert draft_size(4000, 3000, 224, ResizeOptions()) == (448, 448)
    assert draft_size(4000, 3000, 224, ResizeOptions(crop_fraction=0.875)) == (512, 512)
    assert draft_size(4000, 3000, 224, ResizeOptions("letterbox")) == (448, 336)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "stretch"}, "mode must be one of crop, squash, letterbox, got 'stretch'"),
        ({"interpolation": 3}, "interpolation must be one of bicubic, .*, got 3"),
        ({"crop_fraction": 0}, "crop_fraction must be above 0 and at most 1, got 0"),
        ({"crop_fraction": 1.01}, "got 1.01"),
        ({"crop_fraction": math.nan}, "got nan"),
        ({"crop_fraction": "0.5"}, "got '0.5'"),
        ({"crop_fraction": True}, "got True"),
    ],
)
def test_wrong_options_get_one_line(options, message):
    with pytest.raises(UserError, match=message):
        ResizeOptions(**options)


def test_another_mode_keeps_the_filter_and_the_whole_image():
    weights = ResizeOptions("crop", "bilinear", 0.875)
    assert weights.with_mode("crop") is weights
    assert weights.with_mode("squash") == ResizeOptions("squash", "bilinear", 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of 2 × 4 wide photos: the ends of one class are dark, their middles are alike."""
    root = tmp_path_factory.mktemp("wide")
    for name, ends in (("dark", 0), ("light", 255)):
        (root / name).mkdir()
        for number in range(4):
            pixels = np.full((40, 80, 3), 100 + number, dtype=np.uint8)
            pixels[:, :15] = pixels[:, -15:] = ends
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.mark.parametrize("memory_limit_bytes", [0, 1 << 20])
@pytest.mark.parametrize("mode", ["crop", "squash", "letterbox"])
def test_a_folder_and_its_shards_are_read_in_the_mode(folder, tmp_path, mode, memory_limit_bytes):
    how = {"size": 16, "resize": mode, "memory_limit_bytes": memory_limit_bytes}
    images = data.load(folder, **how)
    assert images.resize == ResizeOptions(mode)
    path = next(folder.rglob(images.test.names[0]))
    expected = data.decode(path, size=16, channels=images.channels, resize=ResizeOptions(mode))
    assert torch.equal(images.test.fetch(torch.tensor([0]))[0], expected)
    data.write_shards(folder, tmp_path / "shards")
    sharded = data.load(tmp_path / "shards", **how)
    assert sharded.resize == images.resize
    index = next(i for i, name in enumerate(sharded.test.names) if name.endswith(".png"))
    assert sharded.test.fetch(torch.tensor([index])).shape == (1, images.channels, 16, 16)
    for image, label in zip(sharded.train.fetch(torch.arange(2)), sharded.train.labels[:2], strict=True):
        same = images.train.fetch((images.train.labels == label).nonzero().flatten())
        assert (same.int() - image.int()).abs().amax((1, 2, 3)).min() <= 4  # of another number, alike otherwise


def test_a_run_keeps_its_way_of_resizing(folder, tmp_path):
    run, config = tmp_path / "run", nin.TrainConfig(epochs=1, model="nin_digits", device="cpu")
    images = data.load(folder, size=16, resize="squash")
    result = nin.train(images, config, out=run)
    values = json.loads((run / "config.json").read_text())
    assert values["format_version"] == 2  # version 1 would cut out the centre square
    assert values["preprocessing"]["resize"] == {"mode": "squash", "interpolation": "bicubic", "crop_fraction": 1.0}
    classifier = nin.load(run)
    assert classifier.info.preprocessing == Preprocessing.of(images)
    path = next(folder.rglob("0.png"))
    squashed = data.decode(path, size=16, channels=images.channels, resize=ResizeOptions("squash"))
    torch.testing.assert_close(classifier.scores(path), classifier.score_pixels(squashed[None]))
    again = data.load_from_record(classifier.info.data, classifier.info.preprocessing)
    assert result.info.mismatch(again, test_images=True) is None
    cropped = data.load(folder, size=16)
    assert result.info.mismatch(cropped) == (
        f"its way of resizing is squash (bicubic), that of {folder.name} is crop (bicubic)"
    )


def test_a_run_without_one_crops_the_centre_square(trained_run):
    info = checkpoint.load_info(trained_run)
    assert info.preprocessing.resize == ResizeOptions()
    assert json.loads(info.to_json())["format_version"] == 1
    values = dataclasses.asdict(info.preprocessing)
    del values["resize"], values["value_range"]  # as version 0.1 wrote them
    assert Preprocessing.from_dict(values) == info.preprocessing
    with pytest.raises(UserError, match="mode must be one of"):
        Preprocessing.from_dict(values | {"resize": {"mode": "stretch"}})


def test_images_that_are_fixed_refuse_another_way():
    digits = data.load("digits")
    with pytest.raises(UserError, match=r"resize: expected crop, which made digits, got squash; leave it out"):
        data.load(digits, resize="squash")
    assert data.load("digits", resize="squash").resize.mode == "squash"  # for what it is given later
