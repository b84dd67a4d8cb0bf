"""load: names, options; load_from_record: what a run folder, perhaps another person's, says it was trained on."""

import pytest
import torch

from nin import data
from nin.data.preprocessing import Preprocessing
from nin.errors import UserError

DIGITS = Preprocessing(8, 1, (0.3,), (0.4,))


def test_the_same_images_come_again():
    images = data.load("digits", seed=3, test_fraction=0.5)
    again = data.load_from_record(images.origin, Preprocessing.of(images))
    assert torch.equal(again.test.images, images.test.images)
    assert again.origin["seed"] == 3


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, "does not record where"),
        ({"name": "photos"}, "does not record where"),
        ({"source": 7}, "does not record where"),
        ({"source": "https://example.org/{000..009}.tar"}, "URL"),
        ({"source": "digits", "data_dir": 7}, "damaged"),
        ({"source": "digits", "test_fraction": "half"}, "damaged"),
        ({"source": "digits", "test_fraction": 7.0}, "test_fraction"),
        ({"source": "digits", "seed": None}, "damaged"),
        ({"source": "digits", "fold": 3, "folds": 2, "fold_seed": 0}, "damaged"),
        ({"source": "digits", "fold": 1, "folds": 2}, "damaged"),
        ({"source": "digits", "validation": "some", "validation_seed": 0}, "damaged"),
        ({"source": "digits", "validation": 0.2}, "damaged"),
        ({"source": "/nowhere/photos"}, "no such folder"),
    ],
)
def test_what_is_not_here_or_damaged_is_one_clear_line(record, words):
    with pytest.raises(UserError, match=words) as caught:
        data.load_from_record(record, DIGITS)
    assert "\n" not in str(caught.value)


def test_a_record_runs_no_program_and_downloads_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    proof = tmp_path / "proof"
    with pytest.raises(UserError, match="URL"):
        data.load_from_record({"source": f"pipe:touch {proof}; cat /dev/null #.tar"}, DIGITS)
    assert not proof.exists()
    with pytest.raises(UserError):
        data.load_from_record({"source": "mnist"}, DIGITS)
    assert not (tmp_path / "cache" / "nin").exists() or not any((tmp_path / "cache" / "nin").iterdir())


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("cifar-10", "cifar10"),
        ("FashionMNIST", "fashion-mnist"),
        ("fashion_mnist", "fashion-mnist"),
        ("digit", "digits"),
    ],
)
def test_names_that_are_nearly_right(source, hint):
    with pytest.raises(UserError, match=f"names are digits, mnist, .*did you mean {hint}"):
        data.load(source)


def test_names_that_are_not():
    with pytest.raises(UserError, match="/no/such/place: there is no such folder"):
        data.load("/no/such/place")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_fraction": 0.0}, "test_fraction: expected a number between 0 and 1, got 0.0"),
        ({"test_fraction": 1}, "test_fraction: expected a number between 0 and 1"),
        ({"size": 0}, "size: expected at least 1 pixel"),
        ({"size": 16}, "size: expected 8, the size of digits, got 16"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        data.load("digits", **options)
