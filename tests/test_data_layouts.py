"""Folders and shards as people have them: every labelled image is used with its label, or listed with a reason."""

import numpy as np
import pytest

from nin import data
from support import layouts


def examine(seed, tmp_path):
    """Check a random folder or random shards."""
    rng = np.random.default_rng(seed)
    make = layouts.random_shards if seed % 3 == 2 else layouts.random_folder
    layout = make(rng, tmp_path / f"set{seed}")
    found = data.load(layout.root, size=16, memory_limit_bytes=1 << 20)
    assert layouts.unmentioned(layout, found) == []
    assert len(found.train) + len(found.test) == len(layout.labels)  # nothing but the labelled images
    for path in layout.other:
        assert layouts.is_mentioned(path, found), path
    checked = data.check(layout.root, size=16)
    assert checked.refusal is None
    assert sum(train + test for _, train, test in checked.classes) == len(layout.labels)


@pytest.mark.parametrize("seed", range(12))
def test_every_labelled_image_is_used_or_listed(seed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    examine(seed, tmp_path)


@pytest.mark.slow
def test_every_labelled_image_of_300_layouts_is_used_or_listed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for seed in range(12, 312):
        examine(seed, tmp_path)
