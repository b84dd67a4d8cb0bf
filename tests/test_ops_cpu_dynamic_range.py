"""Outliers and numbers that are not finite, in k×k layers with Winograd: they cost others no digits."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

import nin
from nin.ops import reference
from nin.ops.arguments import ChainArguments
from nin.ops.cpu import dispatch, library, weight_cache
from support.winograd import KINDS, images, in_float64, layer

pytestmark = pytest.mark.skipif(library.LIBRARY is None, reason="nin was installed without a C++ compiler")
each_kind = pytest.mark.parametrize(("size", "kernel"), KINDS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
VALUES = (1e3, -1e6, 1e30, float("inf"), float("-inf"), float("nan"))
# Corners, edges, each part of a tile
PLACES = ((0, 0), (0, 7), (3, 4), (5, 11), (8, 9), (12, 0), (12, 16))


def one_value(value, place):
    def put(x):
        x[0, 3, *place] = value

    return put


def half(x):
    x[:, :, :, 8:] *= 1e6


def block(x):
    x[1, :, 4:7, 4:7] *= 1e5


def impulse(x):
    x.zero_()
    x[0, 3, 6, 6] = 1e6


def one_in_three(x):
    x[:, :, ::3, ::3] *= 1e4


def large(x):
    x *= 1e34


def small(x):
    x *= 1e-33


SPREAD = {f.__name__: f for f in (half, block, impulse, one_in_three, large, small)}


def assert_exact(got, want, size):
    """Compare with float64, with a bound for what sums of products of this total size may lose."""
    finite = want.isfinite() & (want.abs() < torch.finfo(got.dtype).max)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~finite & ~want.isnan()].double(), want.to(got.dtype)[~finite & ~want.isnan()].double())
    bound = (4.5e-3 if got.dtype == torch.bfloat16 else 2e-5) * size + 1e-37
    assert ((got.double() - want).abs() <= bound)[finite].all()


def without(x):
    """Return the magnitudes in float64, with zeros for what is not finite."""
    return x.double().abs().nan_to_num(0, 0)


def assert_forward(x, chain, *, by_windows=False):
    """Compare a single layer with no activation.

    Args:
        x: the images.
        chain: the layer.
        by_windows: allow an error for the largest input of a window and weight of a filter, not for each product:
            what the transforms lose without outliers.
    """
    (weight,), (bias,) = chain.weights, chain.biases
    magnitudes, weights = without(x), without(weight)
    if by_windows:
        reach, padding = weight.shape[2] - 1, chain.padding
        magnitudes = F.max_pool2d(F.pad(magnitudes, [reach] * 4), 2 * reach + 1, 1)
        weights = weights.amax((2, 3), keepdim=True).expand_as(weights)
        size = F.conv2d(magnitudes, weights, without(bias), padding=padding)
    else:
        size = F.conv2d(magnitudes, weights, without(bias), padding=chain.padding)
    assert_exact(dispatch.mlpconv(x, chain), reference.mlpconv(x.double(), in_float64(chain)), size)


@each_kind
@each_dtype
def test_an_output_sees_what_its_taps_read(isa, force, size, kernel, dtype):
    chain = layer(19, 33, kernel, kernel // 2, dtype, "none")
    force(size)
    ordinary = images(2, 19, 13, 17, dtype)
    for value, place in itertools.product(VALUES, PLACES):
        x = ordinary.clone()
        one_value(value, place)(x)
        assert_forward(x, chain)


@pytest.mark.parametrize("spread", list(SPREAD.values()), ids=SPREAD)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("size", "kernel"), [(6, 3), (8, 5)])
@each_dtype
def test_values_of_different_size(isa, force, size, kernel, dtype, layout, spread):
    chain = layer(24, 31, kernel, 1, dtype, "none")
    if spread in (large, small):  # a bias would hide them
        chain = ChainArguments(chain.weights, [b * 0 for b in chain.biases], *chain[2:])
    force(size)
    x = images(3, 24, 13, 16, dtype, layout)
    spread(x)
    assert_forward(x, chain, by_windows=spread is impulse)


def test_zeros_give_the_bias_beside_any_value(isa, force):
    for value in (1.0, 1e6, float("nan")):
        x, chain = torch.zeros(1, 24, 16, 16), layer(24, 40, 3, 1, torch.float32, "gelu")
        x[0, 5, 6, 9] = value
        force(6)
        result = dispatch.mlpconv(x, chain)
        far = torch.ones(16, 16, dtype=torch.bool)
        far[5:8, 8:11] = False
        torch.testing.assert_close(result[0, :, far], F.gelu(chain.biases[0])[:, None].expand(-1, 247))


@each_dtype
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_what_is_not_finite_in_a_chain(isa, force, dtype, activation):
    chain = layer(24, 32, 5, 2, dtype, activation, 40, 17)
    force(8)
    for value, place in itertools.product((float("nan"), float("inf")), PLACES):
        x = images(2, 24, 13, 17, dtype)
        one_value(value, place)(x)
        result = dispatch.mlpconv(x, chain)
        line, column = place
        seen = torch.zeros(13, 17, dtype=torch.bool)
        seen[max(0, line - 2) : line + 3, max(0, column - 2) : column + 3] = True
        assert result[:, :, ~seen].isfinite().all()
        assert result[1].isfinite().all()
        without = x.clone()
        without[0, 3, line, column] = 0
        exact = reference.mlpconv(without.double(), in_float64(chain))
        error = (result.double() - exact)[:, :, ~seen].abs().max()
        assert error <= (2e-2 if dtype == torch.bfloat16 else 1e-4)
        if value != value:
            assert result[0][:, seen].isnan().all()


def test_tiles_without_an_outlier_keep_their_bits(isa, force):
    x, chain = images(2, 24, 16, 16), layer(24, 40, 5, 2)
    force(8)
    before = dispatch.mlpconv(x, chain)
    x[0, 3, 5, 5] = 1e6  # in the windows of 3 to 7: of the first two tiles of 4
    after = dispatch.mlpconv(x, chain)
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[0, :, 8:], before[0, :, 8:])
    assert torch.equal(after[0, :, :, 8:], before[0, :, :, 8:])
    assert not torch.equal(after[0, :, :8, :8], before[0, :, :8, :8])


# -- gradients ---------------------------------------------------------------------------------------------------


def gradients(grad, x, chain):
    """Return the gradients of the input and of the weight."""
    y = torch.zeros(chain.output_shape(x), dtype=x.dtype)
    backward = reference.mlpconv_backward if x.dtype == torch.float64 else dispatch.mlpconv_backward
    grad_x, (grad_weight,), _ = backward(grad, x, y, chain, [True, True, False])
    return grad_x, grad_weight


def assert_gradients(grad, x, chain, *, largest=False):
    """Compare with float64; `largest`: with a bound by the gradient's largest value, not for each product."""
    exact = in_float64(chain)
    absolute = ChainArguments([w.abs() for w in exact.weights], *exact[1:])
    sizes = gradients(without(grad), without(x), absolute)
    wants = gradients(grad.double(), x.double(), exact)
    for got, want, size in zip(gradients(grad, x, chain), wants, sizes, strict=True):
        assert_exact(got, want, size.max().expand_as(size) if largest else size)


def problem(size, kernel, dtype, layout=torch.channels_last):
    """Return a layer, inputs and gradients as they are in training: about half of both are zero."""
    chain = layer(19, 33, kernel, kernel // 2, dtype, "none")
    x = images(3, 19, 13, 17, dtype, layout).relu()
    grad = torch.randn(chain.output_shape(x)).to(dtype).contiguous(memory_format=layout)
    return chain, x, grad * (torch.rand(grad.shape) > 0.5)


@pytest.mark.parametrize(("size", "kernel"), [(6, 3), (6, 4), (8, 5), (8, 7)])
@pytest.mark.parametrize("where", ["x", "grad", "both"])
@each_dtype
def test_gradients_of_outliers(isa, force, size, kernel, dtype, where):
    chain, x, grad = problem(size, kernel, dtype)
    force(size)
    for value, place in itertools.product((1e3, 1e6, 1e30), PLACES):
        one, other = x.clone(), grad.clone()
        if where != "grad":
            one[0, 3, *place] = value
        if where != "x":
            other[0, 5, *place] = -value if where == "grad" else 1e3
        assert_gradients(other, one, chain)


@pytest.mark.parametrize("spread", list(SPREAD.values()), ids=SPREAD)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_gradients_of_values_of_different_size(isa, force, layout, spread):
    chain, x, grad = problem(8, 5, torch.float32, layout)
    force(8)
    for tensor in (x, grad):
        before = tensor.clone()
        spread(tensor)
        assert_gradients(grad, x, chain, largest=spread is impulse)
        tensor.copy_(before)


@each_dtype
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_sees_what_its_sum_reads(isa, force, dtype, value):
    for size, kernel in ((6, 3), (8, 4), (8, 5)):
        chain, x, grad = problem(size, kernel, dtype)
        height, width = grad.shape[2:]
        force(size)
        ordinary = gradients(grad, x, chain)[1]
        for line, column in PLACES:
            reads = torch.tensor(  # taps through which an output reads the place
                [
                    [
                        0 <= line + kernel // 2 - a < height and 0 <= column + kernel // 2 - b < width
                        for b in range(kernel)
                    ]
                    for a in range(kernel)
                ]
            )
            one = x.clone()
            one[0, 3, line, column] = value
            got = gradients(grad, one, chain)[1]
            assert got[:, 3, ~reads].isfinite().all()
            assert not got[:, 3, reads].isfinite().any()
            others = [c for c in range(19) if c != 3]
            torch.testing.assert_close(got[:, others], ordinary[:, others], atol=1e-3, rtol=1e-2)
        for line, column in PLACES:
            reads = torch.tensor(  # taps with which this output reads the image and not the padding
                [
                    [0 <= line + a - kernel // 2 < 13 and 0 <= column + b - kernel // 2 < 17 for b in range(kernel)]
                    for a in range(kernel)
                ]
            )
            other = grad.clone()
            other[0, 5, line, column] = value
            grad_x, got = gradients(other, x, chain)
            assert got[5][:, ~reads].isfinite().all()
            assert not got[5][:, reads].isfinite().any()
            assert got[:5].isfinite().all()
            want_x, _ = gradients(other.double(), x.double(), in_float64(chain))
            assert torch.equal(grad_x.isfinite(), want_x.isfinite())


# -- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [300.0, 1e6, 1e30, float("inf"), float("nan")])
@each_kind
@each_dtype
def test_outliers_among_the_weights(isa, force, size, kernel, dtype, value):
    chain = layer(19, 40, kernel, kernel // 2, dtype, "none")
    chain.weights[0][7, 5, 0, 1] = value
    x = images(2, 19, 13, 17, dtype)
    x[:, :, :, 9:] = 0  # seen by other taps of the same filter only
    force(size)
    if value == value and value < 1e38:
        assert_forward(x, chain)
    else:
        result = dispatch.mlpconv(x, chain)
        others = [c for c in range(40) if c != 7]
        want = reference.mlpconv(x.double(), in_float64(chain))
        torch.testing.assert_close(
            result[:, others].double(), want[:, others], atol=2e-5, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5
        )
        assert not result[:, 7, 1:-8, 1:8].isfinite().any()


@pytest.mark.parametrize("kind", ["an identity and noise", "nine tenths are zero", "all zero", "tiny", "huge"])
def test_unusual_weights(isa, force, kind):
    chain = layer(24, 24, 3, 1, torch.float32, "none")
    (weight,) = chain.weights
    if kind == "an identity and noise":
        weight *= 1e-4
        torch.nn.init.dirac_(weight[:12])
    elif kind == "nine tenths are zero":
        weight *= torch.rand_like(weight) < 0.1
    else:
        weight *= {"all zero": 0, "tiny": 1e-36, "huge": 1e35}[kind]
    chain = ChainArguments([weight], [torch.zeros(24)], *chain[2:])
    x = images(2, 24, 13, 17).relu()
    force(6)
    assert_forward(x, chain, by_windows=True)
    assert_gradients(images(2, 24, 13, 17), x, chain, largest=True)


# -- threads, memory ---------------------------------------------------------------------------------------------


@each_dtype
def test_equal_bits_for_any_number_of_threads(isa, force, threads, dtype):
    cases = ((1, 96, 192, 16, (160, 96)), (5, 48, 64, 8, (33,)), (3, 24, 40, 21, ()))
    for count, channels, columns, side, more in cases:  # one task by columns, whole images, parts of images
        torch.manual_seed(0)
        x = images(count, channels, side, side, dtype)
        chain = layer(channels, columns, 5, 2, dtype, "relu", *more)
        single = chain.subchain(0, 1)
        x[0, 3, 2, 5] = 1e6
        x[-1, 5, side - 1, side - 1] = float("nan")
        x[-1, :, : side // 2] = 0
        results = []
        for number in (1, threads):
            torch.set_num_threads(number)
            weight_cache._copies.clear()
            force(8)
            y = dispatch.mlpconv(x, single)
            grads = dispatch.mlpconv_backward(y, x, y, single, [True, True, True])
            results.append([dispatch.mlpconv(x, chain), y, grads[0], grads[1][0]])
        assert all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(*results, strict=True))


def test_training_survives_an_outlier():
    """A network's loss and gradients with one broken pixel are PyTorch's."""
    network = nin.MLPConv(24, (48, 24), kernel_size=3, padding=1)
    x = images(8, 24, 32, 32)
    x[2, 4, 10, 10] = 1e6
    x.requires_grad_()
    inputs = (x, *network.parameters())
    grads = torch.autograd.grad(network(x).square().mean(), inputs)
    exact = copy.deepcopy(network).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "KERNELS", None)
        exact_x = x.detach().double().requires_grad_()
        wants = torch.autograd.grad(exact(exact_x).square().mean(), (exact_x, *exact.parameters()))
    for got, want in zip(grads, wants, strict=True):
        assert (got.double() - want).abs().max() <= 1e-4 * want.abs().max()
