"""Images that a run folder says it was trained on: the folder may be another person's."""

import pytest
import torch

from nin import data
from nin.errors import UserError


def test_the_same_images_come_again():
    images = data.load("digits", seed=3, test_fraction=0.5)
    again = data.load_from_record(images.origin, size=images.size)
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
        ({"source": "/nowhere/photos"}, "no such folder"),
    ],
)
def test_what_is_not_here_or_damaged_is_one_clear_line(record, words):
    with pytest.raises(UserError, match=words) as caught:
        data.load_from_record(record, size=8)
    assert "\n" not in str(caught.value)


def test_a_record_runs_no_program_and_downloads_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    proof = tmp_path / "proof"
    with pytest.raises(UserError, match="URL"):
        data.load_from_record({"source": f"pipe:touch {proof}; cat /dev/null #.tar"}, size=8)
    assert not proof.exists()
    with pytest.raises(UserError):
        data.load_from_record({"source": "mnist"}, size=28)
    assert not (tmp_path / "cache" / "nin").exists() or not any((tmp_path / "cache" / "nin").iterdir())
