"""The built-in data sets: their files, and what is said where files are missing or damaged."""

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from nin.data import DATASET_NAMES, builtin, load
from nin.errors import UserError

SHARED = Path(__file__).parents[2] / "shared" / "data"


def idx(values):
    shape = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes((0, 0, 8, values.ndim)) + shape + values.astype(np.uint8).tobytes()


@pytest.fixture
def small_mnist(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, count in (("train", 20), ("t10k", 10)):
        pictures = random.integers(0, 256, (count, 28, 28))
        (raw / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pictures)))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 10))  # one packed, one not
    return tmp_path


def test_digits():
    data = load("digits")
    assert data.classes == tuple("0123456789")
    assert (data.channels, data.size, data.flip, data.shift) == (1, 8, False, 1)
    assert len(data.train) + len(data.test) == 1797
    counts = torch.bincount(data.test.labels), torch.bincount(data.train.labels)
    assert all(abs(test / (test + train) - 0.25) < 0.005 for test, train in zip(*counts, strict=True))
    assert data.train.images.max() == 255
    assert data.train.images.min() == 0
    assert data.train.names is None
    assert torch.equal(load("digits").test.images, data.test.images)
    assert not torch.equal(load("digits", seed=1).test.images[:400], data.test.images[:400])
    assert len(load("digits", test_fraction=0.5).test) == pytest.approx(898, abs=5)


def test_mnist_is_read_packed_and_unpacked_from_a_folder_that_stays_as_it_is(small_mnist):
    before = sorted(small_mnist.rglob("*"))
    data = load("mnist", data_dir=small_mnist)
    assert sorted(small_mnist.rglob("*")) == before
    assert data.train.images.shape == (20, 1, 28, 28)
    assert data.test.labels.tolist() == list(range(10))
    assert (data.size, data.shift, data.flip, data.classes[3]) == (28, 2, False, "3")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no gzip", "cannot be unpacked"),
        (gzip.compress(idx(np.zeros((20, 28, 28))))[:-20], "cannot be unpacked"),
        (gzip.compress(b"short"), "got something else"),
        (gzip.compress(idx(np.zeros((20, 28, 28)))[:-1]), "got something else"),
        (gzip.compress(idx(np.zeros(20))), "got something else"),
        (gzip.compress(idx(np.zeros((21, 28, 28)))), "as many labels as images"),
    ],
    # a gzip file holds the second in which it was made: as a test's name it would differ between processes
    ids=["no gzip", "cut off", "short", "too few bytes", "labels", "too many images"],
)
def test_damaged_idx_files_are_named(small_mnist, content, reason):
    (small_mnist / "MNIST" / "raw" / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        load("mnist", data_dir=small_mnist)
    assert str(small_mnist) in str(caught.value)


@pytest.mark.parametrize("name", DATASET_NAMES[1:])
def test_missing_files_are_told_and_nothing_is_downloaded_into_a_given_folder(name, tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "_download", lambda *_: pytest.fail("must not download"))
    with pytest.raises(UserError, match="leave out data_dir to download") as caught:
        load(name, data_dir=tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_data_dir_the_files_are_fetched_into_the_cache(small_mnist, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        builtin, "_download", lambda _, folder: shutil.copytree(small_mnist / "MNIST", folder / "MNIST")
    )
    assert len(load("mnist").train) == 20
    monkeypatch.setattr(builtin, "_download", lambda *_: pytest.fail("must not download again"))
    assert len(load("mnist").train) == 20


def test_without_network_the_message_says_where_the_files_belong(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no route\nto host")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(builtin, "_download", fail)
    with pytest.raises(UserError, match=r"cifar-10-batches-py/data_batch_1.*give DIR as data_dir") as caught:
        load("cifar10")
    assert "no route to host" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_torchvision_arrays_come_out_as_images(name, monkeypatch, tmp_path):
    class Fake:
        classes = ("plane", "car")

        def __init__(self, root, *, download, train=True, split="train"):
            assert not download
            self.data = np.zeros((4, 32, 32, 3), dtype=np.uint8)
            self.data[:, 1, 2, 0] = 9 if train and split == "train" else 7
            if name == "svhn":
                self.data = self.data.transpose(0, 3, 1, 2)
            self.targets = [0, 1, 0, 1]
            self.labels = np.array(self.targets)

    monkeypatch.setattr(builtin, "_torchvision_class", lambda _: Fake)
    data = load(name, data_dir=tmp_path)
    assert data.train.images.shape == (4, 3, 32, 32)
    assert data.train.images[0, 0, 1, 2] == 9
    assert data.test.images[0, 0, 1, 2] == 7
    assert data.test.labels.tolist() == [0, 1, 0, 1]
    assert data.flip is (name != "svhn")
    assert data.classes == (tuple("0123456789") if name == "svhn" else ("plane", "car"))


@pytest.mark.parametrize(
    ("name", "folder", "mean", "first"),
    [("fashion-mnist", "FashionMNIST", 0.2860, "Ankle boot"), ("mnist", "MNIST", 0.1307, "5")],
)
def test_real_files(name, folder, mean, first):
    if not (SHARED / folder).exists():
        pytest.skip(f"{SHARED / folder} is missing")
    data = load(name, data_dir=SHARED)
    assert (len(data.train), len(data.test), data.size) == (60_000, 10_000, 28)
    assert data.mean[0] == pytest.approx(mean, abs=1e-4)
    assert data.classes[data.train.labels[0]] == first
    assert data.flip is (name == "fashion-mnist")


def test_a_data_dir_that_is_none(tmp_path):
    with pytest.raises(UserError, match="data_dir: expected a folder"):
        load("mnist", data_dir=tmp_path / "nowhere")
