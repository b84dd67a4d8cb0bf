"""The layers against torch.nn, and the numbers that they promise."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import nin
from nin.layers import VARIANCE_GAIN, StandardisedConv2d


def random_images(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2, (1, 3)])
def test_conv1x1_is_conv2d(stride, bias):
    layer = nin.Conv1x1(5, 7, stride=stride, bias=bias).double()
    conv = nn.Conv2d(5, 7, 1, stride=stride, bias=bias).double()
    conv.load_state_dict(layer.state_dict())  # the same names and shapes
    x = random_images(2, 5, 6, 7)
    torch.testing.assert_close(layer(x), conv(x))


@pytest.mark.parametrize("normalisation", [None, "weight_standardisation"])
@pytest.mark.parametrize(("activation", "module"), [("relu", nn.ReLU), ("gelu", nn.GELU), ("silu", nn.SiLU)])
def test_mlpconv_is_a_sequence_of_convolutions(activation, module, normalisation):
    layer = nin.MLPConv(
        3, (8, 6, 4), kernel_size=3, stride=2, padding=1, activation=activation, normalisation=normalisation
    ).double()
    sequence = nn.Sequential(*itertools.chain.from_iterable((conv, module()) for conv in layer.convs))
    x = random_images(2, 3, 9, 9).requires_grad_()
    tensors = [x, *layer.parameters()]
    result, expected = layer(x), sequence(x)
    torch.testing.assert_close(result, expected)
    grads, expected_grads = (torch.autograd.grad(y.square().sum(), tensors) for y in (result, expected))
    torch.testing.assert_close(grads, expected_grads)


def test_mlpconv_takes_one_value_per_layer():
    layer = nin.MLPConv(3, (8, 6), activation=("relu", None), normalisation=("weight_standardisation", None))
    assert layer.activations == ["relu", "none"]
    assert [type(conv) for conv in layer.convs] == [StandardisedConv2d, nn.Conv2d]
    assert (layer(random_images(4, 3, 8, 8, dtype=torch.float32)) < 0).any()  # no ReLU at the end


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 5])
def test_bottleneck_keeps_the_size(kernel_size, expand):
    layer = nin.Bottleneck(6, 2, 5, kernel_size=kernel_size, expand=expand)
    assert layer(torch.randn(2, 6, 7, 9)).shape == (2, 5, 7, 9)


def test_bottleneck_has_the_multiplications_of_the_notes():
    narrow = nin.cost(nin.Bottleneck(256, 64, 256, kernel_size=4), (1, 256, 28, 28))
    wide = nin.cost(nn.Sequential(nn.ZeroPad2d((1, 2, 1, 2)), nn.Conv2d(256, 256, 4)), (1, 256, 28, 28))
    assert narrow.macs == 28 * 28 * (256 * 64 + 64 * 256 * 4 * 4)
    assert wide.macs == 28 * 28 * 256 * 256 * 4 * 4
    assert wide.macs / narrow.macs == pytest.approx(3.76, abs=0.01)


def test_bottleneck_of_an_even_kernel_equals_conv2d():
    layer = nin.Bottleneck(6, 3, 5, kernel_size=4, activation=None).double()
    reduce, conv = layer[0], layer[-1].convs[0]
    x = random_images(2, 6, 7, 7)
    reduced = F.pad(F.conv2d(x, reduce.weight, reduce.bias), (1, 2, 1, 2))  # one more at the right and the bottom
    expected = F.conv2d(reduced, conv.weight, conv.bias)
    torch.testing.assert_close(layer(x), expected)


def test_inception_puts_its_branches_side_by_side():
    layer = nin.Inception(192, 64, 96, 128, 16, 32, 32)
    x = torch.randn(2, 192, 6, 5)
    y = layer(x)
    assert y.shape == (2, 64 + 128 + 32 + 32, 6, 5)
    for part, branch in zip(y.split((64, 128, 32, 32), 1), layer.children(), strict=True):
        torch.testing.assert_close(part, branch(x))
    # table 1 of Szegedy et al., row "inception (3a)": 159 K weights
    assert sum(p.numel() for p in layer.parameters() if p.dim() == 4) == 163_328


def test_global_average_pooling_is_the_mean_of_each_map():
    maps = random_images(3, 4, 5, 6)
    torch.testing.assert_close(nin.GlobalAveragePooling()(maps), maps.mean((2, 3)))


# -- weight standardisation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", VARIANCE_GAIN)
def test_standardised_weights_have_mean_0_and_the_variance_of_the_activation(activation):
    conv = StandardisedConv2d(16, 8, 3, activation=activation).double()
    nn.init.normal_(conv.weight, mean=3, std=5)  # whatever they are
    weight = conv.standardised_weight().detach()
    torch.testing.assert_close(weight.mean((1, 2, 3)), torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-12)
    variance = weight.var((1, 2, 3), correction=0) * 16 * 9
    torch.testing.assert_close(variance, torch.full_like(variance, VARIANCE_GAIN[activation] ** 2), rtol=1e-5, atol=0)
    # the gain makes the variance after the activation that of a standard normal before it
    after = nin.ops.ACTIVATIONS[activation](torch.randn(1_000_000)).std() * VARIANCE_GAIN[activation]
    assert after == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"groups": 2}, {"padding": 1, "padding_mode": "reflect"}])
def test_folding_a_standardised_convolution(options):
    conv = StandardisedConv2d(4, 6, 3, stride=2, **options)
    with torch.no_grad():
        conv.gain.uniform_(0.5, 2)
    plain = conv.eval().fold()
    assert type(plain) is nn.Conv2d
    assert not plain.training
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(plain(x), conv(x), rtol=1e-6, atol=1e-6)


def test_folding_a_layer_leaves_plain_convolutions():
    layer = nin.MLPConv(3, (8, 6), kernel_size=3, normalisation="weight_standardisation")
    x = torch.randn(2, 3, 9, 9)
    before = layer(x)
    assert layer.fold() is layer
    assert [type(conv) for conv in layer.convs] == [nn.Conv2d, nn.Conv2d]
    torch.testing.assert_close(layer(x), before, rtol=1e-6, atol=1e-6)


def test_gradcheck_of_a_standardised_convolution():
    conv = StandardisedConv2d(2, 3, 3).double()

    def call(x, *parameters):
        return torch.func.functional_call(conv, dict(zip(("weight", "bias", "gain"), parameters, strict=True)), (x,))

    parameters = [conv.weight, conv.bias, conv.gain]
    assert torch.autograd.gradcheck(call, (random_images(1, 2, 4, 4).requires_grad_(), *parameters), fast_mode=True)


# -- keeping and checking -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: nin.Conv1x1(3, 4),
        lambda: nin.MLPConv(3, (4, 5), kernel_size=3),
        lambda: nin.MLPConv(3, (4, 5), kernel_size=3, normalisation="weight_standardisation"),
        lambda: nin.Bottleneck(3, 2, 4, kernel_size=4, expand=True),
        lambda: nin.Inception(3, 1, 2, 3, 4, 5, 6),
    ],
    ids=["Conv1x1", "MLPConv", "MLPConv standardised", "Bottleneck", "Inception"],
)
def test_state_dict_round_trip(make):
    first, second, x = make(), make(), torch.randn(2, 3, 8, 8)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(first(x), second(x), rtol=0, atol=0)


WRONG = [
    (lambda: nin.Conv1x1(0, 4), "in_channels must be a whole number of at least 1, got 0"),
    (lambda: nin.Conv1x1(3, 2.5), "out_channels must be a whole number of at least 1, got 2.5"),
    (lambda: nin.Conv1x1(3, 4, activation="tanh"), "activation must be one of none, relu, gelu, silu, got 'tanh'"),
    (lambda: nin.MLPConv(3, ()), "channels must hold at least one width, got none"),
    (lambda: nin.MLPConv(3, (8, 0)), "channels[1] must be a whole number of at least 1, got 0"),
    (lambda: nin.MLPConv(-3, (8,)), "in_channels must be a whole number of at least 1, got -3"),
    (lambda: nin.MLPConv(3, (8, 4), activation="tanh"), "activation must be one of none, relu, gelu, silu"),
    (lambda: nin.MLPConv(3, (8, 4), activation=["relu"]), "activation must be one value or one for each of the 2"),
    (lambda: nin.MLPConv(3, (8, 4), normalisation="batch"), "normalisation must be one of (None, 'weight_standardis"),
    (lambda: nin.MLPConv(3, (8, 4), normalisation=(None,)), "normalisation must be one value or one for each of the"),
    (lambda: nin.Bottleneck(8, 0, 8), "mid_channels must be a whole number of at least 1, got 0"),
    (lambda: nin.Bottleneck(8, 4, 8, kernel_size=0), "kernel_size must be a whole number of at least 1, got 0"),
    (lambda: StandardisedConv2d(3, 4, 3, activation="tanh"), "activation must be one of none, relu, gelu, silu"),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[message[:50] for _, message in WRONG])
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        make()
    assert message in str(caught.value)


def test_a_filter_of_one_weight_cannot_be_standardised():
    with pytest.raises(ValueError, match="at least 2 weights in a filter, got 1"):
        nin.MLPConv(1, (4, 4), normalisation="weight_standardisation")


def test_mlpconv_lets_hooks_and_other_modules_in():
    layer, x = nin.MLPConv(3, (4, 5), kernel_size=3, padding=1), torch.randn(2, 3, 6, 6)
    plain = layer.to_sequential()
    prune.l1_unstructured(layer.convs[0], "weight", 0.5)
    with torch.no_grad():
        layer.convs[0].weight_orig.mul_(-3)  # the weight is computed by a hook before the forward
    torch.testing.assert_close(layer(x), plain(x))
    layer.convs[1].register_forward_hook(lambda _, args, out: out + 1)
    torch.testing.assert_close(layer(x), plain(x))
    assert not torch.equal(layer(x), torch.relu(F.conv2d(plain[1](plain[0](x)), layer.convs[1].weight)))


def test_mlpconv_takes_the_geometry_of_its_convolutions():
    layer, x = nin.MLPConv(4, (4, 6), kernel_size=3), torch.randn(2, 4, 7, 7)
    others = [
        nn.Conv2d(4, 4, 5, stride=2, padding=2, dilation=2),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.Tanh()),
    ]
    for first in others:
        layer.convs[0] = first
        torch.testing.assert_close(layer(x), torch.relu(layer.convs[1](torch.relu(first(x)))))


def plain_inverted_bottleneck(layer, x):
    convs, norms = list(layer.convs), layer.norms or [nn.Identity()] * len(layer.convs)
    *up, depthwise = range(len(convs) % 2 + 1)  # of three or five the second is the depthwise one
    y = x
    for i in (*up, depthwise):
        y = F.hardswish(norms[i](convs[i](y)))
    if len(convs) >= 4:
        y = y * torch.sigmoid(convs[-2](F.silu(convs[-3](F.adaptive_avg_pool2d(y, 1)))))
    y = norms[-1](convs[-1](y))
    return y + x if layer.residual else y


@pytest.mark.parametrize("normalisation", [None, "batch_norm"])
@pytest.mark.parametrize(
    ("options", "residual"), [({}, True), ({"stride": (2, 1)}, False), ({"kernel_size": (3, 5), "dilation": 2}, True)]
)
@pytest.mark.parametrize(("hidden", "squeezed"), [(20, None), (None, None), (20, 5), (None, 1)])
def test_inverted_bottleneck_is_a_sequence_of_convolutions(hidden, squeezed, options, residual, normalisation):
    squeeze = {"squeeze_channels": squeezed, "squeeze_activations": ("silu", "sigmoid")}
    layer = nin.InvertedBottleneck(
        6, hidden, 6, activation="hardswish", normalisation=normalisation, **squeeze, **options
    ).double()
    assert layer.residual == residual
    x = random_images(3, 6, 9, 8).requires_grad_()
    tensors = [x, *layer.parameters()]
    result, expected = layer(x), plain_inverted_bottleneck(layer, x)
    torch.testing.assert_close(result, expected)
    grads, expected_grads = (torch.autograd.grad(y.square().sum(), tensors) for y in (result, expected))
    torch.testing.assert_close(grads, expected_grads)
    layer.eval()
    before = layer(x)
    fused = nin.fuse(layer).model
    torch.testing.assert_close(fused(x), before)
    folded = layer.fold()
    assert folded is layer
    assert not any(isinstance(module, nn.BatchNorm2d) for module in layer.modules())
    torch.testing.assert_close(layer(x), before)
    layer.convs[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    assert not torch.allclose(layer(x), before)


def test_inverted_bottleneck_adds_only_what_has_its_shape():
    assert not nin.InvertedBottleneck(6, 20, 8).residual
    layer = nin.InvertedBottleneck(6, 20, 6, kernel_size=4)
    assert not layer.residual
    assert layer(torch.randn(1, 6, 8, 8)).shape == (1, 6, 7, 7)


def test_inverted_bottlenecks_with_batch_norm_are_found_and_others_are_operators_already():
    fused = nin.fuse(nn.Sequential(nin.InvertedBottleneck(6, 20, 6, normalisation="batch_norm").eval()))
    assert [chain.layers for chain in fused.chains] == [("0.convs.0", "0.convs.1", "0.convs.2")]
    fused = nin.fuse(nn.Sequential(nin.InvertedBottleneck(6, 20, 6)))
    assert (fused.chains, fused.left) == ((), {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "mish"}, "activation must be one of none, relu"),
        ({"activation": ["relu"]}, "activation must be one of none, relu"),
        ({"in_channels": True}, "in_channels must be a whole number of at least 1, got True"),
        ({"squeeze_channels": 4, "squeeze_activations": 3}, "squeeze_activations must be one of none, .*, got 3"),
        ({"normalisation": "layer"}, "normalisation must be None or 'batch_norm', got 'layer'"),
        ({"hidden_channels": 0}, "hidden_channels must be"),
        ({"squeeze_channels": 0}, "squeeze_channels must be"),
        ({"squeeze_channels": 4, "squeeze_activations": ("relu", "relu")}, "squeeze_activations must be one of none"),
        ({"kernel_size": 0}, "kernel_size must be a whole number of at least 1"),
    ],
)
def test_inverted_bottleneck_names_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        nin.InvertedBottleneck(**{"in_channels": 6, "hidden_channels": 20, "out_channels": 6, **options})


def test_an_inverted_bottleneck_takes_none_for_no_activation_as_the_function_does():
    layer, x = nin.InvertedBottleneck(6, 20, 6, activation=None), torch.randn(2, 6, 5, 5)
    weights, biases = ([getattr(conv, name) for conv in layer.convs] for name in ("weight", "bias"))
    y = nin.inverted_bottleneck(x, weights, biases, activation=None, padding=1, residual=True)
    torch.testing.assert_close(layer(x), y)


def test_the_cost_of_an_inverted_bottleneck_is_that_of_its_convolutions():
    cost = nin.cost(nin.InvertedBottleneck(6, 20, 8, stride=2), (1, 6, 8, 8))
    assert cost.macs == 64 * 6 * 20 + 16 * (20 * 9 + 20 * 8)
    cost = nin.cost(nin.InvertedBottleneck(6, 20, 8, stride=2, squeeze_channels=5), (1, 6, 8, 8))
    assert cost.macs == 64 * 6 * 20 + 16 * (20 * 9 + 20 * 8) + 2 * 20 * 5
