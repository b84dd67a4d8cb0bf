"""Order, flips, shifts and normalisation: pure functions of (seed, epoch, index)."""

import pytest
import torch

from nin.data import ImageSet, augment, batches, epoch_order, sampler, to_float
from nin.data.sampler import hash_indices, stratified_holdout

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def images(count=64, channels=3, height=9, width=7):
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8)


def test_the_hash_is_splitmix64():
    # The first outputs of the reference generator for the state 0; ours keeps the upper 63 bits.
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert hash_indices(torch.arange(1, 5), 0).tolist() == [value >> 1 for value in expected]


def test_an_epoch_visits_every_sample_once_in_an_order_of_its_own():
    order = epoch_order(1000, seed=5, epoch=2)
    assert order.dtype == torch.int64
    assert order.sort().values.tolist() == list(range(1000))
    assert torch.equal(order, epoch_order(1000, seed=5, epoch=2))
    assert not torch.equal(order, epoch_order(1000, seed=5, epoch=3))
    assert not torch.equal(order, epoch_order(1000, seed=6, epoch=2))
    assert (order - torch.arange(1000)).abs().double().mean() == pytest.approx(333, abs=40)
    assert epoch_order(0, seed=0, epoch=0).tolist() == []


def test_the_order_of_a_released_version_stays():
    assert epoch_order(8, seed=0, epoch=0).tolist() == [7, 5, 6, 0, 3, 1, 2, 4]


@pytest.mark.parametrize("count", [1, 2, 3, 17, 1000, 99_991])
def test_a_large_order_is_computed_in_parts(monkeypatch, count):
    monkeypatch.setattr(sampler, "MAX_SORTED", 0)
    whole = epoch_order(count, seed=5, epoch=2)
    assert torch.equal(whole.sort().values, torch.arange(count))
    parts = [epoch_order(count, seed=5, epoch=2, start=start, stop=start + 700) for start in range(0, count, 700)]
    assert torch.equal(torch.cat(parts), whole)
    if count > 100:
        assert not torch.equal(whole, epoch_order(count, seed=5, epoch=3))
        # neighbours end up far apart, about count / 3 as in a random order
        assert (whole.diff().abs().double().mean() / count).item() == pytest.approx(1 / 3, abs=0.03)


@pytest.mark.parametrize("device", DEVICES)
def test_a_sample_is_augmented_the_same_in_any_batch(device):
    pictures, indices = images().to(device), torch.arange(100, 164)
    options = {"seed": 1, "epoch": 4, "flip": True, "shift": 2}
    together = augment(pictures, indices, **options)
    assert torch.equal(together, augment(pictures, indices, **options))
    for place in (0, 17, 63):
        alone = augment(pictures[place : place + 1], indices[place : place + 1], **options)
        assert torch.equal(alone[0], together[place])
    turned = augment(pictures.flip(0), indices.flip(0), **options)
    assert torch.equal(turned.flip(0), together)
    assert torch.equal(together.cpu(), augment(pictures.cpu(), indices, **options))


def test_flips_mirror_half_now_and_the_other_half_next():
    pictures, indices = images(400), torch.arange(400)
    mirrored = {}
    for epoch in (0, 1, 2):
        result = augment(pictures, indices, seed=0, epoch=epoch, flip=True, shift=0)
        mirrored[epoch] = (result == pictures.flip(3)).flatten(1).all(1)
        kept = (result == pictures).flatten(1).all(1)
        assert torch.equal(mirrored[epoch], ~kept)
    assert 160 < mirrored[0].sum() < 240
    assert torch.equal(mirrored[1], ~mirrored[0])
    assert torch.equal(mirrored[2], mirrored[0])
    other_seed = augment(pictures, indices, seed=1, epoch=0, flip=True, shift=0)
    assert not torch.equal(other_seed, augment(pictures, indices, seed=0, epoch=0, flip=True, shift=0))


@pytest.mark.parametrize("shift", [1, 3])
def test_shifts_move_by_every_amount_up_to_the_limit_and_repeat_the_edge(shift):
    height, width = 9, 7
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=torch.uint8)[None].expand(height, width)
    pictures = torch.stack([rows, columns]).expand(500, 2, height, width)
    moved = augment(pictures, torch.arange(500), seed=0, epoch=0, flip=False, shift=shift).int()
    down, right = moved[:, 0, 4, 3] - 4, moved[:, 1, 4, 3] - 3
    amounts = set(range(-shift, shift + 1))
    assert {(d, r) for d, r in zip(down.tolist(), right.tolist(), strict=True)} == {
        (d, r) for d in amounts for r in amounts
    }
    expected_rows = (torch.arange(height) + down[:, None]).clamp(0, height - 1)
    expected_columns = (torch.arange(width) + right[:, None]).clamp(0, width - 1)
    assert torch.equal(moved[:, 0], expected_rows[:, :, None].expand(-1, -1, width).int())
    assert torch.equal(moved[:, 1], expected_columns[:, None].expand(-1, height, -1).int())
    later = augment(pictures, torch.arange(500), seed=0, epoch=1, flip=False, shift=shift)
    assert not torch.equal(later.int(), moved)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 1, 1, 1), (3, 5, 2, 9)])
def test_odd_shapes_and_layouts(shape):
    pictures = torch.randint(0, 256, shape, dtype=torch.uint8)
    indices = torch.arange(len(pictures))
    options = {"seed": 0, "epoch": 0, "flip": True, "shift": 3}
    result = augment(pictures, indices, **options)
    assert result.shape == shape
    assert result.dtype == torch.uint8
    last = pictures.to(memory_format=torch.channels_last)
    assert torch.equal(augment(last, indices, **options), result)


def test_without_flip_and_shift_nothing_changes():
    pictures = images()
    assert augment(pictures, torch.arange(64), seed=0, epoch=0, flip=False, shift=0) is pictures


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels_last", [True, False])
def test_to_float_normalises(dtype, channels_last):
    pictures, mean, std = images(), (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    result = to_float(pictures, mean, std, dtype=dtype, channels_last=channels_last)
    spread = torch.tensor(std).view(1, 3, 1, 1)
    expected = (pictures.double() / 255 - torch.tensor(mean).view(1, 3, 1, 1)) / spread
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
    assert pictures.dtype == torch.uint8


def test_to_float_wants_one_mean_and_std_per_channel():
    with pytest.raises(ValueError, match=r"each of the 3 channels of images, got 1 and 3"):
        to_float(images(), (0.5,), (0.5, 0.5, 0.5))


def test_batches_follow_the_order_and_end_with_the_rest():
    dataset = ImageSet(images(10), torch.arange(10) % 3)
    order = epoch_order(10, seed=0, epoch=0)
    seen = list(batches(dataset, order, 4))
    assert [len(labels) for _, labels, _ in seen] == [4, 4, 2]
    assert torch.equal(torch.cat([indices for _, _, indices in seen]), order)
    for pictures, labels, indices in seen:
        assert torch.equal(pictures, dataset.images[indices])
        assert torch.equal(labels, indices % 3)
    rest = list(batches(dataset, order[4:], 4))  # going on in the middle of an epoch
    assert torch.equal(rest[0][2], seen[1][2])
    assert list(batches(dataset, order[:0], 4)) == []
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        list(batches(dataset, order, 0))


def test_held_out_is_stratified_and_a_function_of_the_names():
    names = [f"{number}.png" for number in range(200)]
    labels = [number % 4 for number in range(200)]
    chosen = stratified_holdout(names, labels, fraction=0.2, seed=0)
    assert [sum(chosen[label::4]) for label in range(4)] == [10, 10, 10, 10]
    backwards = stratified_holdout(names[::-1], labels[::-1], fraction=0.2, seed=0)
    assert (backwards[::-1] == chosen).all()
    assert stratified_holdout(["only"], [0], fraction=0.5, seed=0).tolist() == [False]
