"""The validation part, the folds, and the order of an epoch with balanced classes."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from nin import data
from nin.data.dataset import PathList
from nin.errors import UserError


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Classes of 12, 6 and 2 images, whose grey value is their number."""
    root = tmp_path_factory.mktemp("photos")
    for name, count in (("a", 12), ("b", 6), ("c", 2)):
        (root / name).mkdir()
        for i in range(count):
            Image.fromarray(np.full((8, 8), 10 * i + ord(name) - 97, np.uint8)).save(root / name / f"{i}.png")
    return root


def test_validation_is_a_part_of_each_class_and_of_the_training_images_only(digits):
    split = data.split_validation(digits, 0.15, seed=3)
    assert len(split.train) + len(split.validation) == len(digits.train)
    for label in range(10):
        of_class = (digits.train.labels == label).sum().item()
        assert (split.validation.labels == label).sum() == int(0.15 * of_class + 0.5)
    both = torch.cat([split.train.images, split.validation.images]).flatten(1)
    assert torch.equal(both.unique(dim=0), digits.train.images.flatten(1).unique(dim=0))
    assert split.test is digits.test
    assert split.mean == digits.mean
    again, other = (data.split_validation(digits, 0.15, seed=seed) for seed in (3, 4))
    assert torch.equal(split.validation.images, again.validation.images)
    assert not torch.equal(split.validation.images, other.validation.images)


def test_validation_goes_by_name_and_works_on_files_that_are_decoded(folder):
    held, decoded = (data.load(folder, memory_limit_bytes=limit, test_fraction=0.5) for limit in (2 << 30, 0))
    assert isinstance(held.train, data.ImageSet)
    assert isinstance(decoded.train, data.FileSet)
    first, second = (data.split_validation(images, 0.3, seed=0) for images in (held, decoded))
    assert list(first.validation.names) == list(second.validation.names)
    everything = torch.arange(len(first.validation))
    assert torch.equal(first.validation.fetch(everything), second.validation.fetch(everything))
    assert not set(first.validation.names) & {*first.train.names, *first.test.names}
    # a file that goes moves no other one of another class
    order = torch.tensor([i for i, name in enumerate(held.train.names) if name != first.train.names[0]])
    fewer = dataclasses.replace(held, train=held.train.select(order))
    kept = {name for name in data.split_validation(fewer, 0.3, seed=0).validation.names if name[0] != "a"}
    assert kept == {name for name in first.validation.names if name[0] != "a"}


def test_validation_of_shards(folder, tmp_path):
    data.write_shards(folder, tmp_path / "shards")
    images = data.load(tmp_path / "shards")
    split = data.split_validation(images, 0.3, seed=0)
    assert sorted([*split.train.names, *split.validation.names]) == sorted(images.train.names)
    for part in (split.train, split.validation):
        for index, name in enumerate(part.names):
            same = list(images.train.names).index(name)
            assert torch.equal(part.fetch(torch.tensor([index])), images.train.fetch(torch.tensor([same])))
            assert part.labels[index] == images.train.labels[same]


def test_validation_needs_two_images_of_a_class(digits):
    few = dataclasses.replace(digits, train=digits.train.select(torch.tensor([0, 1])))
    assert few.train.labels.unique().numel() == 2
    with pytest.raises(UserError, match="validation: no class has two images"):
        data.split_validation(few, 0.5, seed=0)


def test_a_data_set_is_split_once(digits):
    split = data.split_validation(digits, 0.2, seed=0)
    assert data.split_validation(split, 0.2, seed=0) is split
    assert data.split_validation(split, None, seed=0) is split
    own = dataclasses.replace(digits, validation=digits.test)
    for images, fraction, seed in ((split, 0.3, 0), (split, 0.2, 1), (own, 0.2, 0)):
        with pytest.raises(UserError, match=r"validation: digits has a validation part already, of \d+ images: leave"):
            data.split_validation(images, fraction, seed=seed)


def test_the_parts_of_a_training_come_again_from_its_record(digits):
    fold = data.split_validation(data.take_fold(digits, 2, folds=3, seed=1), 0.2, seed=5)
    again = data.with_recorded_parts(digits, fold.origin)
    assert again.name == fold.name == "digits, fold 2 of 3"
    for part in ("train", "test", "validation"):
        assert torch.equal(getattr(again, part).images, getattr(fold, part).images), part
    assert data.with_recorded_parts(again, fold.origin) is again
    assert data.with_recorded_parts(digits, digits.origin) is digits


def test_each_training_image_is_in_one_fold(digits):
    folds = [data.take_fold(digits, number, folds=4, seed=0) for number in (1, 2, 3, 4)]
    tested = torch.cat([fold.test.images for fold in folds])
    assert len(tested) == len(digits.train)
    assert torch.equal(tested.flatten(1).unique(dim=0), digits.train.images.flatten(1).unique(dim=0))
    for fold in folds:
        assert len(fold.train) + len(fold.test) == len(digits.train)
        counts = [(f.test.labels == 0).sum().item() for f in folds]
        assert max(counts) - min(counts) <= 1
    with pytest.raises(UserError, match=r"folds: class '\d' has \d+ images to train on, which 500 folds"):
        data.take_fold(digits, 1, folds=500, seed=0)


def test_a_balanced_epoch_has_each_class_equally_often():
    labels = torch.tensor([0] * 60 + [1] * 25 + [2] * 5 + [4] * 10)
    whole = data.balanced_order(labels, seed=1, epoch=2)
    assert len(whole) == 100
    assert whole.unique().numel() == 100, "each time that an image comes up has its own number"
    chosen = labels[whole % 100]
    assert chosen.bincount().tolist() == [25, 25, 25, 0, 25]
    times = (whole % 100).bincount(minlength=100)
    assert times[labels == 0].max() == 1
    assert times[labels == 1].tolist() == [1] * 25
    assert times[labels == 2].tolist() == [5] * 5
    assert set(times[labels == 4].tolist()) == {2, 3}
    # any part of it, as processes and resumed runs take it
    assert torch.equal(data.balanced_order(labels, seed=1, epoch=2, start=37, stop=80), whole[37:80])
    assert not torch.equal(data.balanced_order(labels, seed=1, epoch=3), whole)
    assert not torch.equal(data.balanced_order(labels, seed=2, epoch=2), whole)
    # it is a shuffle: no class is first
    assert chosen[:40].unique().numel() == 4


def test_images_of_a_balanced_epoch_keep_their_numbers_when_a_file_is_lost(tmp_path):
    for i in range(3):
        Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
    names = PathList(f"{i}.png" for i in range(3))
    images = data.FileSet(labels=torch.tensor([0, 1, 2]), names=names, channels=1, size=8, root=tmp_path)
    order, lost = torch.tensor([2, 4, 0, 5, 1, 8, 3]), []
    whole = [numbers for _, _, numbers in data.batches(images, order, 4, on_lost=lambda *row: lost.append(row))]
    assert torch.equal(torch.cat(whole), order)
    assert not lost
    (tmp_path / "1.png").unlink()
    for pixels, labels, numbers in data.batches(images, order, 7, on_lost=lambda *row: lost.append(row)):
        assert numbers.tolist() == [2, 0, 5, 8, 3]
        assert labels.tolist() == [2, 0, 2, 2, 0]
        assert pixels[:, 0, 0, 0].tolist() == [80, 0, 80, 80, 0]
    assert [path for path, _ in lost] == ["1.png", "1.png"]
