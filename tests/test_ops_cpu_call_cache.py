"""Calls that were made before compute from the arguments of now, and are checked as the first call was."""

import gc
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import nin
from nin.ops import schema
from nin.ops.cpu import call_cache, dispatch, weight_cache

pytestmark = pytest.mark.skipif(dispatch.KERNELS is None, reason="needs the compiled library")

SHAPES = (64, 24, 3, 3), (32, 64, 1, 1)


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def arguments(request):
    """Return the arguments of a call that is in the cache."""
    weight_cache.calls.clear()
    torch.manual_seed(0)
    x = torch.randn(2, 24, 12, 12, dtype=request.param)
    weights = [torch.randn(shape, dtype=request.param) / 8 for shape in SHAPES]
    arguments = x, weights, [torch.randn(shape[0], dtype=request.param) for shape in SHAPES]
    for _ in range(2):
        is_right(*arguments)
    assert len(weight_cache.calls) == 1
    return arguments


def call(x, weights, biases, **options):
    return nin.mlpconv(x, weights, biases, **{"padding": 1, **options})


def is_right(x, weights, biases, **options):
    geometry = {"padding": 1, **options}
    activation = ACTIVATIONS[geometry.pop("activation", "relu")]
    x64, (first, second), (bias, other) = x.double(), [w.double() for w in weights], [b.double() for b in biases]
    wanted = activation(F.conv2d(activation(F.conv2d(x64, first, bias, **geometry)), second, other))
    got = call(x, weights, biases, **options)
    tolerance = 2e-2 if x.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())
    assert got.is_contiguous(memory_format=torch.channels_last) == (x.stride(1) == 1)


ACTIVATIONS = {"relu": F.relu, "silu": F.silu}

CHANGES = {
    "other images": lambda x, weights, biases: x.copy_(torch.randn_like(x)),
    "a bias": lambda x, weights, biases: biases[1].data.fill_(3),
    "a bias elsewhere": lambda x, weights, biases: biases.__setitem__(0, torch.ones_like(biases[0])),
    "a strided bias": lambda x, weights, biases: biases.__setitem__(0, torch.randn(128, dtype=x.dtype)[::2]),
    "a weight": lambda x, weights, biases: weights[1].data.view(-1)[-1:].fill_(4),
    "a weight elsewhere": lambda x, weights, biases: weights.__setitem__(0, -weights[0]),
    "a weight in another layout": lambda x, weights, biases: weights[0].set_(
        weights[0].to(memory_format=torch.channels_last)
    ),
    "other strides at the address": lambda x, weights, biases: weights.__setitem__(
        1, weights[1].as_strided((32, 64, 1, 1), (1, 32, 1, 1))
    ),
    "a negated view": lambda x, weights, biases: weights.__setitem__(1, torch._neg_view(weights[1])),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_is_seen(arguments, name):
    for _ in range(3):
        CHANGES[name](*arguments)
        for _ in range(2):
            is_right(*arguments)


def test_other_options_are_other_calls(arguments):
    x, *parameters = arguments
    for options in ({"padding": 0}, {"stride": 2}, {"dilation": 2}, {"activation": "silu"}, {"padding": (1, 0)}):
        for _ in range(2):
            is_right(x, *parameters, **options)
    for other in (x[:1], x[..., :7], x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[:, :, ::2]):
        for _ in range(2):
            is_right(other, *parameters)
    is_right(*arguments)


MISTAKES = {
    "stride": (ValueError, lambda x, weights, biases: call(x, weights, biases, stride=1.0)),
    "activation": (ValueError, lambda x, weights, biases: call(x, weights, biases, activation="tanh")),
    "no images": (TypeError, lambda x, weights, biases: call(None, weights, biases)),
    "no weight": (TypeError, lambda x, weights, biases: call(x, [weights[0], None], biases)),
    "nested images": (
        ValueError,
        lambda x, weights, biases: call(torch.nested.nested_tensor(list(x.float())), weights, biases),
    ),
    "a list of numbers": (TypeError, lambda x, weights, biases: call(x, weights, [biases[0], biases[1].tolist()])),
    "too few biases": (ValueError, lambda x, weights, biases: call(x, weights, biases[:1])),
    "channels": (ValueError, lambda x, weights, biases: call(x[:, :20], weights, biases)),
    "dtype": (ValueError, lambda x, weights, biases: call(x.double(), weights, biases)),
    "device": (ValueError, lambda x, weights, biases: call(x, [weights[0], weights[1].to("meta")], biases)),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_mistakes_are_seen_after_a_right_call(arguments, name):
    error, mistake = MISTAKES[name]
    for _ in range(2):
        with pytest.raises(error):
            mistake(*arguments)


def test_gradients_after_calls_without(arguments):
    x, weights, biases = arguments
    leaf = weights[1].requires_grad_()
    call(x, weights, biases).sum().backward()
    assert leaf.grad is not None
    with torch.no_grad():
        assert not call(x, weights, biases).requires_grad
    is_right(x.detach(), [w.detach() for w in weights], biases)


def test_transforms_and_modes_after_plain_calls(arguments):
    x, weights, biases = arguments
    single = call(x, weights, biases)
    tolerance = {"rtol": 0.05, "atol": 0.1}
    batched = torch.vmap(lambda image: call(image[None], weights, biases)[0])(x)
    torch.testing.assert_close(batched, single, **tolerance)
    traced = torch.jit.trace(lambda images: call(images, weights, biases), x, check_trace=False)
    torch.testing.assert_close(traced(x), single, **tolerance)
    _, tangent = torch.func.jvp(lambda images: call(images, weights, biases), (x,), (torch.ones_like(x),))
    assert tangent.any()
    with torch.autocast("cpu", torch.bfloat16):
        assert call(x, weights, biases).dtype == torch.bfloat16
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(x, weights, biases)
    assert any(event.key == "nin::mlpconv" for event in profile.key_averages())


def test_a_call_is_checked_and_packed_once(arguments, monkeypatch):
    x, weights, biases = arguments

    def fail(*_):
        raise AssertionError("packed again")

    monkeypatch.setattr(dispatch, "mlpconv", fail)
    is_right(x.clone(), weights, biases)
    weights[0].data[5] += 1
    with pytest.raises(AssertionError, match="packed again"):
        call(x, weights, biases)


FORMATS = {
    "contiguous": lambda *size: torch.randn(size),
    "channels_last": lambda *size: torch.randn(size).to(memory_format=torch.channels_last),
    "both": lambda *size: torch.randn(size).contiguous(memory_format=torch.channels_last),
    "transposed": lambda n, c, h, w: torch.randn(n, c, w, h).to(memory_format=torch.channels_last).transpose(2, 3),
    "half of the channels": lambda n, c, h, w: torch.randn(n, 2 * c, h, w).to(memory_format=torch.channels_last)[
        :, ::2
    ],
    "half of the columns": lambda n, c, h, w: torch.randn(n, c, h, 2 * w)[..., ::2],
    "one image": lambda n, c, h, w: torch.randn(1, c, h, w).expand(n, c, h, w),
    "permuted": lambda n, c, h, w: torch.randn(n, h, w, c).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("served", ["compiled", "PyTorch"])
def test_the_result_has_the_strides_of_conv2d(name, served, monkeypatch):
    monkeypatch.setattr(dispatch, "is_faster_in_pytorch", lambda *_: served == "PyTorch")
    weight_cache.calls.clear()
    weights = {channels: torch.randn(3, channels, 3, 3) for channels in (1, 4)}
    for images, channels, height, width in itertools.product((1, 2), (1, 4), (1, 3), (1, 3)):
        x, weight = FORMATS[name](images, channels, height, width), weights[channels]
        for weight_, padding in ((weight, 1), (weight, 2), (weight[:, :, :1, :1].contiguous(), 0)):
            wanted = F.conv2d(x, weight_, padding=padding)
            for _ in range(3):
                got = nin.mlpconv(x, (weight_,), (None,), padding=padding, activation="none")
                assert got.stride() == wanted.stride(), (x.shape, x.stride(), weight_.shape)
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    empty = F.conv2d(FORMATS[name](0, 4, 3, 3), weights[4])
    for _ in range(2):
        got = nin.mlpconv(FORMATS[name](0, 4, 3, 3), (weights[4],), (None,), activation="none")
        assert (got.shape, got.stride()) == (empty.shape, empty.stride())


def test_small_layers_stay_with_pytorch(monkeypatch):
    weight_cache.calls.clear()
    weight, x = torch.randn(4, 3, 1, 1), torch.randn(1, 3, 4, 4)
    for _ in range(2):
        torch.testing.assert_close(nin.conv1x1(x, weight), F.conv2d(x, weight))
        weight.data[2] += 1
    monkeypatch.setattr(schema, "call_kernel", None)
    torch.testing.assert_close(nin.conv1x1(x, weight), F.conv2d(x, weight))


def test_calls_die_with_their_weights_and_are_few(monkeypatch):
    weight_cache.calls.clear()
    monkeypatch.setattr(call_cache, "MAX_CALLS", 5)
    layer = nin.MLPConv(8, (16, 8), kernel_size=3).eval()
    with torch.no_grad():
        for size in range(9, 19):
            layer(torch.randn(1, 8, size, size))
            assert len(weight_cache.calls) <= 5
    assert weight_cache.calls
    del layer
    gc.collect()
    assert not weight_cache.calls


def test_a_layer_whose_weights_are_computed():
    layer, x = nin.MLPConv(8, (16, 8), kernel_size=3).eval(), torch.randn(1, 8, 9, 9)
    nn.utils.parametrize.register_parametrization(layer.convs[0], "weight", nn.Identity())
    prune.l1_unstructured(layer.convs[1], "weight", 0.5)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(layer(x), layer.to_sequential()(x), rtol=1e-4, atol=1e-4)
            layer.convs[0].parametrizations.weight.original.mul_(1.5)
