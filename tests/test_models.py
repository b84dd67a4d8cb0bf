"""The networks: the papers' sizes, and that they train."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import nin
from nin import models
from nin.errors import UserError
from nin.layers import MLPConv, StandardisedConv2d

NORMALISATIONS = [None, "weight_standardisation"]


def parameters_of(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (models.nin_cifar(), 966_986),
        (models.nin_cifar(100), 984_356),
        (models.nin_imagenet(), 7_595_176),
        (models.googlenet(), 6_998_552),
    ],
    ids=["nin_cifar", "nin_cifar 100", "nin_imagenet", "googlenet"],
)
def test_parameters(model, parameters):
    assert parameters_of(model) == parameters


def test_multiply_accumulates():
    assert nin.cost(models.nin_cifar(), (1, 3, 32, 32)).macs == pytest.approx(222.5e6, rel=2e-4)
    assert nin.cost(models.nin_imagenet(), (1, 3, 224, 224)).macs == pytest.approx(1.10e9, rel=5e-3)
    assert nin.cost(models.nin_cifar(), (1, 3, 32, 32)).fraction_1x1 == pytest.approx(0.308, abs=5e-4)


def test_sizes_of_nin_cifar():
    model, x = models.nin_cifar().eval(), torch.randn(1, 3, 32, 32)
    sizes = [x.shape[-1]]
    for block in model.blocks:
        x = block(x)
        sizes.append(x.shape[-1])
    assert sizes == [32, 16, 8, 8]
    assert x.shape == (1, 10, 8, 8)


def test_the_scores_are_the_means_of_the_maps():
    model, x = models.nin_digits().eval(), torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(model(x), model.maps(x).mean((2, 3)))


def test_on_the_cpu_a_network_computes_in_channels_last():
    model, x = models.nin_digits().eval(), torch.randn(2, 1, 8, 8)
    maps = model.maps(x)
    assert maps.stride(1) == 1
    torch.testing.assert_close(maps, model.maps(x.to(memory_format=torch.channels_last)), rtol=0, atol=0)
    nodes = torch.export.export(model, (x,)).graph.nodes
    assert not any("memory_format" in node.kwargs for node in nodes)  # what is exported runs elsewhere


@pytest.mark.parametrize("name", ["nin_digits", "nin_cifar", "nin_imagenet"])
def test_smallest_input(name):
    model = models.create(name, 5).eval()
    channels, size = model.config.in_channels, model.smallest_input
    assert model(torch.randn(1, channels, size, size)).shape == (1, 5)
    with pytest.raises((RuntimeError, ValueError)):
        model(torch.randn(1, channels, size - 1, size - 1))


def test_googlenet_runs():
    model = models.googlenet(7).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    assert models.create("googlenet", 3, in_channels=1).stem[0].convs[0].in_channels == 1


# -- training -----------------------------------------------------------------------------------------------------


def digits_as_photos():
    """Return 16 digits as (16, 3, 16, 16) with mean 0 and variance 1, and their classes."""
    pixels, classes = load_digits(return_X_y=True)
    images = torch.tensor(pixels[:16], dtype=torch.float32).reshape(-1, 1, 8, 8)
    images = F.interpolate((images - images.mean()) / images.std(), scale_factor=2).expand(-1, 3, -1, -1)
    return images, torch.tensor(classes[:16])


def losses(model, images, classes, *, steps, learning_rate):
    """Return the loss of each step of plain SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    history = []
    for _ in range(steps):
        loss = F.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_the_loss_leaves_ln_10(normalisation, seed):
    torch.manual_seed(seed)
    model = models.nin_cifar(dropout=0.0, normalisation=normalisation)
    history = losses(model, *digits_as_photos(), steps=20, learning_rate=0.005)
    assert min(history) < math.log(10) - 0.5, history


def test_the_original_initialisation_is_stuck_at_ln_10():
    """The complaint that users repeat: small Gaussian weights and a ReLU after the last layer."""
    model = models.nin_cifar(dropout=0.0, last_activation="relu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.01) if parameter.dim() == 4 else torch.nn.init.zeros_(parameter)
    history = losses(model, *digits_as_photos(), steps=20, learning_rate=0.005)
    assert history == pytest.approx([math.log(10)] * 20, abs=0.02)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_values_keep_their_size_through_the_network(normalisation):
    model = models.nin_cifar(normalisation=normalisation).eval()
    sizes, x = [], torch.randn(8, 3, 32, 32)
    for block in model.blocks:
        x = block(x)
        sizes.append(x.square().mean().item())
    assert all(0.1 < size < 20 for size in sizes), sizes


def test_the_last_relu_is_an_option():
    x = torch.randn(4, 3, 32, 32)
    assert (models.nin_cifar().eval().maps(x) < 0).any()
    assert (models.nin_cifar(last_activation="relu").eval().maps(x) >= 0).all()


def test_fold_leaves_plain_convolutions():
    model, x = models.nin_digits(normalisation="weight_standardisation").eval(), torch.randn(2, 1, 8, 8)
    before = model(x)
    assert any(isinstance(m, StandardisedConv2d) for m in model.modules())
    assert model.fold() is model
    assert not any(isinstance(m, StandardisedConv2d) for m in model.modules())
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    # the configuration says so too: it builds a network that takes these weights
    models.NiN(model.config).load_state_dict(model.state_dict())


def test_the_last_layer_is_not_standardised():
    model = models.nin_cifar(normalisation="weight_standardisation")
    convs = [conv for m in model.modules() if isinstance(m, MLPConv) for conv in m.convs]
    assert [isinstance(conv, StandardisedConv2d) for conv in convs] == [True] * 8 + [False]


# -- configuration ------------------------------------------------------------------------------------------------


def test_config_round_trip_through_json():
    config = models.nin_cifar(7, in_channels=1, normalisation="weight_standardisation", activation="silu").config
    again = models.NiNConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert parameters_of(models.NiN(again)) == parameters_of(models.NiN(config))


@pytest.mark.parametrize("change", [{"colour": 1}, {"name": None}, {"blocks": None}])
def test_config_of_other_fields(change):
    values = {**models.nin_digits().config.to_dict(), **change}
    values = {key: value for key, value in values.items() if value is not None or key == "normalisation"}
    with pytest.raises((KeyError, TypeError)):
        models.NiNConfig.from_dict(values)


def test_wrong_arguments_are_named():
    config = models.nin_digits().config
    with pytest.raises(UserError, match=r"model must be one of nin_digits, .*; got 'resnet'"):
        models.create("resnet", 10)
    with pytest.raises(ValueError, match="the last block must give num_classes=9 channels, got 10"):
        models.NiN(dataclasses.replace(config, num_classes=9))
    with pytest.raises(ValueError, match="pool must be 'max', 'average' or None, got 'min'"):
        models.NiN(dataclasses.replace(config, blocks=(models.BlockConfig((10,), 3, pool="min"),)))
    with pytest.raises(ValueError, match="activation must be one of"):
        models.nin_digits(activation="tanh")


def test_average_pooling_is_an_option():
    config = models.nin_cifar().config
    blocks = (config.blocks[0], dataclasses.replace(config.blocks[1], pool="average"), config.blocks[2])
    assert models.NiN(dataclasses.replace(config, blocks=blocks))(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def test_every_model_has_an_image_size():
    assert models.IMAGE_SIZES.keys() == models.MODELS.keys()
    for name, size in models.IMAGE_SIZES.items():
        config = getattr(models.create(name, 10), "config", None)
        assert config is None or config.image_size == size
