"""Muon: its directions, beside PyTorch's; what is SGD's; and trainings with it."""

import dataclasses

import pytest
import torch
from torch import nn

import nin
from nin import data, optim, training
from nin.config import TrainConfig
from nin.errors import UserError
from support.stopping import check_resuming

QUICK = TrainConfig(optimizer="muon", epochs=2, batch_size=64, threads=1, precision="fp32", shift=1)


def newton_schulz(x, steps=5):
    """The iteration as it is written, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x.double() / x.double().norm()
    for _ in range(steps):
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    return x


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 5), (6, 40), (40, 6), (96, 160)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthogonalise_is_newton_schulz(shape, dtype):
    matrix = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    found = optim.orthogonalise(3e-5 * matrix)
    assert found.dtype == dtype
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(found.double(), newton_schulz(matrix), **tolerance)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6)])
def test_orthogonalise_in_bfloat16(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = optim.orthogonalise(matrix, dtype=torch.bfloat16)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), newton_schulz(matrix), rtol=0, atol=0.03)


def test_orthogonalise_brings_singular_values_to_one():
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(n, 6, dtype=torch.float64, generator=generator))[0] for n in (6, 9))
    values = torch.tensor([9.0, 4.0, 2.0, 1.0, 0.5, 0.2], dtype=torch.float64)
    found = u.T @ optim.orthogonalise((u * values) @ v.T) @ v  # in the directions of the matrix
    assert (found - found.diag().diag()).abs().max() < 1e-12
    assert found.diag().min() > 0.65
    assert found.diag().max() < 1.25
    assert torch.equal(optim.orthogonalise(torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_takes_the_direction_of_pytorchs(layout):
    """PyTorch's computes in bfloat16, takes no filters, and leaves the length as it comes out."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, bias=False).to(memory_format=layout)
    theirs = nn.Parameter(layer.weight.detach().flatten(1).clone())
    other = torch.optim.Muon([theirs], lr=1.0, momentum=0.9, weight_decay=0.0)
    options = {"momentum": 0.9, "weight_decay": 0.3, "matrices": [layer.weight], "sgd_factor": 2.0}
    own = optim.muon(layer, learning_rate=0.1, **options)
    for _ in range(3):
        before, theirs_before = layer.weight.detach().clone(), theirs.detach().clone()
        gradient = torch.randn(layer.weight.shape, generator=generator)
        layer.weight.grad, theirs.grad = gradient.to(memory_format=layout), gradient.flatten(1)
        own.step()
        other.step()
        change = theirs_before - theirs.detach()
        expected = before.flatten(1) - 0.1 * 6**0.5 * change / change.norm()
        expected *= 6**0.5 / expected.norm()
        torch.testing.assert_close(layer.weight.detach().flatten(1), expected, rtol=0, atol=5e-3)
        assert layer.weight.norm().item() == pytest.approx(6**0.5)
        assert layer.weight.is_contiguous(memory_format=layout)


def test_what_is_not_muons_is_sgds():
    def steps(make, **own):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 1))
        if own:
            own["matrices"] = [model[0].weight]
        options = {"momentum": 0.9, "weight_decay": 0.3, "slower": model[0].parameters(), "slower_rate": 0.5}
        optimizer = make(model, learning_rate=1.0, **options, **own)
        for number in range(3):
            for group in optimizer.param_groups:
                group["lr"] = (0.1 if own else 0.2) * group["lr_factor"]
            for p in model.parameters():
                p.grad = torch.full_like(p, number - 1.0)
            optimizer.step()
        return dict(model.named_parameters())

    one, other = steps(optim.muon, sgd_factor=2.0), steps(optim.sgd)
    for name in ("0.bias", "1.weight", "1.bias"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=0)
    assert not torch.allclose(one["0.weight"], other["0.weight"])


def test_a_weight_without_a_gradient_stays():
    layer, frozen = nn.Linear(3, 3), nn.Linear(3, 3)
    model = nn.Sequential(layer, frozen)
    matrices = [layer.weight, frozen.weight]
    optimizer = optim.muon(model, learning_rate=0.1, momentum=0.9, weight_decay=0.1, matrices=matrices, sgd_factor=2.0)
    before = frozen.weight.detach().clone()
    layer.weight.grad = torch.zeros(3, 3)  # no direction: the length alone
    optimizer.step()
    assert torch.equal(frozen.weight, before)
    assert torch.isfinite(layer.weight).all()
    with pytest.raises(ValueError, match="closure must be None"):
        optimizer.step(lambda: 0)


@pytest.fixture(scope="module")
def digits():
    images = data.load("digits")
    return nin.data.Data.from_sets(
        "some digits", images.train.select(torch.arange(0, len(images.train), 4)), images.test, images.classes
    )


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-30, 1e-22, 1e-15, 1e15])
@pytest.mark.parametrize("channels", [3, 16, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_of_any_size_gives_a_finite_step(size, channels, dtype):
    layer = nn.Linear(32, channels, bias=False)
    options = {"momentum": 0.9, "weight_decay": 0.0, "matrices": [layer.weight], "sgd_factor": 2.0, "dtype": dtype}
    own = optim.muon(layer, learning_rate=0.1, **options)
    before = layer.weight.detach() * (channels**0.5 / layer.weight.detach().norm())
    layer.weight.grad = size * torch.randn(channels, 32, generator=torch.Generator().manual_seed(0))
    own.step()
    moved = float((layer.weight.detach() - before).norm() / before.norm())
    assert layer.weight.norm().item() == pytest.approx(channels**0.5)
    assert 0.05 < moved < 0.2 if size >= 1e-15 else moved < 0.2
    assert moved < 1e-6 or size > 0


def test_trains_and_keeps_the_length_of_its_weights(digits):
    result = training.train(digits, dataclasses.replace(QUICK, learning_rate=0.035))
    layers = [module for module in result.model.modules() if isinstance(module, nn.Conv2d)]
    assert all(isinstance(layer, nin.layers.StandardisedConv2d) for layer in layers[:-1])  # not the class layer
    for layer in layers[:-1]:
        assert 0.9 < layer.weight.norm().item() / len(layer.weight) ** 0.5 < 1.001  # the average is a little shorter
    assert result.metrics[-1]["train_loss"] < 2.0 < result.metrics[0]["train_loss"]


@pytest.mark.parametrize("stop_at", [1, 7])
def test_resuming_gives_the_same_bits(digits, tmp_path, stop_at):
    check_resuming(digits, QUICK, tmp_path, stop_at)


def test_networks_without_standardised_weights_are_refused():
    sizes = {"images": 100, "image_size": 64, "flip": True, "shift": 2}
    for settings, got in (
        ({"model": "googlenet"}, "got googlenet with normalisation=none"),
        ({"normalisation": "none"}, "got nin_cifar with normalisation=none"),
    ):
        with pytest.raises(UserError, match=f"optimizer muon is for networks with weight standardisation .*{got}"):
            TrainConfig(optimizer="muon", **settings).resolve(**sizes)


def test_its_learning_rate_can_be_found(digits, monkeypatch):
    monkeypatch.setattr("nin.training.learning_rate_test.MOST_STEPS", 20)
    config = TrainConfig(optimizer="muon", learning_rate="auto", epochs=1, batch_size=32, threads=1, precision="fp32")
    result = training.train(digits, config)
    assert 1e-4 < result.info.recipe["learning_rate"] < 0.3
