"""Arrays and tensors as images: layouts, ranges, labels, and what is refused."""

import re

import numpy as np
import pytest
import torch

from nin.data import load
from nin.data.arrays import to_nchw, to_pillow, to_uint8
from nin.errors import UserError


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((40, 6, 6), (1, 6, 6)),
        ((40, 6, 6, 3), (3, 6, 6)),
        ((40, 3, 6, 6), (3, 6, 6)),
        ((40, 6, 6, 5), (5, 6, 6)),
    ],
)
@pytest.mark.parametrize("kind", ["numpy", "torch", "float"])
def test_arrays(shape, expected, kind):
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    labels = np.arange(40) % 4
    source = {"numpy": values, "torch": torch.from_numpy(values), "float": (values / 255).astype(np.float32)}[kind]
    data = load((source, labels))
    assert tuple(data.train.images.shape[1:]) == expected
    assert (len(data.train), len(data.test), data.classes) == (32, 8, ("0", "1", "2", "3"))
    both = load(((source, labels), (source, labels)))
    laid_out = values if shape[-1] == 6 else values.transpose(0, 3, 1, 2)
    assert torch.equal(both.test.images.flatten(), torch.from_numpy(laid_out.copy()).flatten())
    assert load(both) is both


def test_array_labels_may_be_words():
    values = np.zeros((6, 4, 4), dtype=np.uint8)
    data = load(((values, np.array(["b10", "b9", "a"] * 2)), (values[:2], ["a", "b10"])))
    assert data.classes == ("a", "b9", "b10")
    assert data.train.labels.tolist() == [2, 1, 0, 2, 1, 0]
    assert data.test.labels.tolist() == [0, 2]


ZEROS, TWO = np.zeros((4, 5, 5), dtype=np.uint8), [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((ZEROS,), "got a tuple of 1"),
        ((ZEROS, [0, 1]), r"labels: expected shape \(4,\)"),
        ((ZEROS, [1, 1, 1, 1]), "two classes or more, got 1"),
        ((ZEROS, [0, 1, 2, 3]), "two images or more in a class"),
        ((np.zeros((4, 5, 6), np.uint8), TWO), r"square images .* got \(4, 5, 6\)"),
        ((ZEROS[:0], []), r"square images .* got \(0, 5, 5\)"),
        ((ZEROS.astype(np.int32), TWO), "expected uint8, or floats in 0..1, got int32"),
        ((ZEROS + 2.0, TWO), r"floats in 0\.\.1, got 2\.\.2"),
        ((ZEROS + np.nan, TWO), r"floats in 0\.\.1, got nan"),
        (((ZEROS, TWO), (ZEROS[:, :4, :4], TWO)), r"test images: expected shape \(1, 5, 5\)"),
        (((ZEROS, TWO), (ZEROS, [0, 0, 1, 2])), "classes of the training labels, got 2"),
    ],
)
def test_bad_arrays(source, message):
    with pytest.raises(UserError, match=message):
        load(source)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 4, 5), (4, 4), (2, 2, 2, 2, 2)])
def test_other_shapes_are_told_as_they_were_given(shape):
    with pytest.raises(UserError, match=rf"X must be square, got {re.escape(str(shape))}"):
        to_nchw(np.zeros(shape), error="X must be square, got {shape}")


def test_floats_are_rounded_to_the_nearest_byte():
    values = np.array([0, 0.5 / 255, 1.5 / 255, 0.4, 1])
    assert to_uint8(values).tolist() == [0, 0, 2, 102, 255]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_every_float_type_become_pictures(dtype):
    array = torch.tensor([[0, 1], [1, 0]], dtype=dtype, requires_grad=True)
    assert np.asarray(to_pillow(array)).tolist() == [[0, 255], [255, 0]]
