"""k×k convolutions with Winograd: values, gradients, which layers, threads."""

import os
import struct
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import nin
from nin.ops import reference
from nin.ops.arguments import ChainArguments
from nin.ops.cpu import abi, conv_backward, dispatch, library, weight_cache
from support.winograd import KINDS, images, in_float64, layer

pytestmark = pytest.mark.skipif(library.LIBRARY is None, reason="nin was installed without a C++ compiler")
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
each_layout = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
each_kind = pytest.mark.parametrize(("size", "kernel"), KINDS)
POINTS = {6: [Fraction(3, 4), Fraction(3, 2)], 8: [Fraction(1, 2), Fraction(1), Fraction(2)]}


def assert_close(got, want, times=1):
    """Compare with float64: about ten times the error of a direct float32 convolution, or one rounding to bfloat16."""
    assert got.shape == want.shape
    bound = (1e-2 if got.dtype == torch.bfloat16 else 3e-4) * times
    assert (got.double() - want).abs().max() <= bound * (want.abs().mean() + want.abs().max())


@each_kind
def test_the_weights_matrix_is_that_of_the_points(size, kernel):
    finite = [Fraction(0), *(sign * p for p in POINTS[size] for sign in (1, -1))]
    rows = []
    for p in finite:
        denominator = Fraction(1)
        for q in finite:
            denominator *= p - q if q != p else 1
        rows.append([p**i / denominator for i in range(kernel)])
    rows.append([Fraction(int(i == kernel - 1)) for i in range(kernel)])
    side = torch.empty(size, kernel, dtype=torch.float64)
    library.LIBRARY.nin_winograd_weights(size, kernel, side.data_ptr())
    torch.testing.assert_close(side.tolist(), [[float(value) for value in row] for row in rows])


@each_kind
@each_dtype
@each_layout
def test_values(isa, force, size, kernel, dtype, layout):
    for count, channels, columns, height, width, padding in (
        (1, 5, 7, kernel, kernel, 0),
        (3, 17, 33, 13, 9, kernel // 2),
        (2, 32, 40, 9, 19, kernel - 1),
        (7, 3, 66, 5, 6, 2),
    ):
        x, chain = (
            images(count, channels, height, width, dtype, layout),
            layer(channels, columns, kernel, padding, dtype),
        )
        force(size)
        result = dispatch.mlpconv(x, chain)
        assert_close(result, reference.mlpconv(x.double(), in_float64(chain)))
        assert result.is_contiguous(memory_format=reference.memory_format_of(x))


@each_dtype
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
def test_chains_after_it(isa, force, dtype, activation):
    x = images(9, 24, 10, 7, dtype)
    chain = layer(24, 31, 5, 2, dtype, activation, 50, 17)
    force(8)
    assert_close(dispatch.mlpconv(x, chain), reference.mlpconv(x.double(), in_float64(chain)), times=2)
    plain = ChainArguments(chain.weights, [None] * 3, *chain[2:])
    assert_close(dispatch.mlpconv(x, plain), reference.mlpconv(x.double(), in_float64(plain)), times=2)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(KINDS),
    st.integers(1, 4),
    st.integers(1, 130),
    st.integers(1, 130),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 6),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1 << 32),
)
def test_random_shapes(force, kind, count, channels, columns, height, width, padding, nchw, bfloat16, seed):
    torch.manual_seed(seed)
    size, kernel = kind
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    assume(min(height, width) + 2 * padding >= kernel and padding < kernel)
    x = images(count, channels, height, width, dtype, torch.contiguous_format if nchw else torch.channels_last)
    chain = layer(channels, columns, kernel, padding, dtype)
    force(size)
    y = dispatch.mlpconv(x, chain)
    exact, grad = in_float64(chain), torch.randn_like(y)
    assert_close(y, reference.mlpconv(x.double(), exact))
    got = dispatch.mlpconv_backward(grad, x, y, chain, [True] * 3)
    want = reference.mlpconv_backward(grad.double(), x.double(), y.double(), exact, [True] * 3)
    assert_close(got[0], want[0])
    assert_close(got[1][0], want[1][0])


def test_images_of_any_strides(isa, force):
    chain = layer(24, 40, 3, 1)
    force(6)
    whole = torch.randn(3, 30, 20, 22)
    for x in (whole[:, 3:27, ::2, 1:-1], whole.transpose(2, 3)[:, :24], whole[:, :24].flip(3)[..., 2:]):
        assert_close(dispatch.mlpconv(x, chain), reference.mlpconv(x.double(), in_float64(chain)))


@each_kind
@each_dtype
@each_layout
def test_gradients(isa, force, size, kernel, dtype, layout):
    for count, channels, columns, height, width, padding in ((3, 17, 33, 13, 9, kernel // 2), (2, 20, 14, 8, 11, 0)):
        x, chain = (
            images(count, channels, height, width, dtype, layout),
            layer(channels, columns, kernel, padding, dtype),
        )
        force(size)
        y = dispatch.mlpconv(x, chain)
        grad = torch.randn_like(y)
        got = dispatch.mlpconv_backward(grad, x, y, chain, [True] * 3)
        exact = in_float64(chain)
        want = reference.mlpconv_backward(grad.double(), x.double(), y.double(), exact, [True] * 3)
        assert_close(got[0], want[0])
        assert_close(got[1][0], want[1][0])
        assert_close(got[2][0], want[2][0])
        assert got[0].is_contiguous(memory_format=reference.memory_format_of(x))
        assert got[1][0].is_contiguous()


def test_only_wanted_gradients_are_computed(force):
    x, chain = images(2, 20, 9, 9), layer(20, 30, 3, 1)
    force(6)
    y = dispatch.mlpconv(x, chain)
    for needs in ([True, False, False], [False, True, False], [False, False, True]):
        grad_x, grad_weights, grad_biases = dispatch.mlpconv_backward(torch.ones_like(y), x, y, chain, needs)
        assert [t.numel() > 0 for t in (grad_x, *grad_weights, *grad_biases)] == needs


def test_a_backward_pass_inside_of_autocast_is_as_exact_as_outside():
    x, chain = images(4, 32, 16, 16), layer(32, 48, 3, 1)
    assert chosen(x, chain) == 6
    weight = chain.weights[0]

    def both(autocast):
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = nin.mlpconv(inputs[0], [inputs[1]], chain.biases, padding=1).square().sum()
        with torch.autocast("cpu", enabled=autocast):
            return torch.autograd.grad(loss, inputs)

    assert all(torch.equal(a, b) for a, b in zip(both(True), both(False), strict=True))


def test_the_precision_of_matrix_products_changes_nothing():
    x, chain = images(4, 32, 16, 16), layer(32, 48, 3, 1)
    y = dispatch.mlpconv(x, chain)
    want = dispatch.mlpconv_backward(y, x, y, chain, [True] * 3)
    weight_cache._copies.clear()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(dispatch.mlpconv(x, chain), y)
        got = dispatch.mlpconv_backward(y, x, y, chain, [True] * 3)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1][0], want[1][0])


def test_a_gradient_of_too_many_sums_is_pytorchs(force, monkeypatch):
    x, chain = images(2, 20, 9, 9), layer(20, 30, 3, 1)
    force(6)
    y = dispatch.mlpconv(x, chain)
    monkeypatch.setattr(conv_backward, "MAX_WINOGRAD_SUMS", 36 * 20 * 30 - 1)
    assert conv_backward.winograd_weight_gradient(dispatch.KERNELS, y, x, chain) is None
    _, (grad,), _ = dispatch.mlpconv_backward(y, x, y, chain, [True] * 3)
    want = reference.mlpconv_backward(y.double(), x.double(), y.double(), in_float64(chain), [True] * 3)
    assert_close(grad, want[1][0])


@pytest.mark.parametrize("channels", [3, 32])
def test_the_default_dtype_changes_nothing(channels):
    x, chain = images(4, channels, 16, 16), layer(channels, 48, 3, 1)
    y = dispatch.mlpconv(x, chain)
    needs = [channels > 3, True, True]
    want = dispatch.mlpconv_backward(y, x, y, chain, needs)
    torch.set_default_dtype(torch.float64)
    try:
        got = dispatch.mlpconv_backward(y, x, y, chain, needs)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip((got[0], *got[1], *got[2]), (want[0], *want[1], *want[2]), strict=True):
        assert torch.equal(a, b)


def test_more_padding_than_the_taps_reach(force):
    x, chain = images(2, 20, 9, 9).requires_grad_(), layer(20, 30, 3, 4)
    force(6)
    y = nin.mlpconv(x, chain.weights, chain.biases, padding=4)
    force(0)
    (want,) = torch.autograd.grad(nin.mlpconv(x, chain.weights, chain.biases, padding=4).sum(), x)
    force(6)
    (got,) = torch.autograd.grad(y.sum(), x)
    assert_close(got, want.double())


# -- which layers ------------------------------------------------------------------------------------------------


def chosen(x, chain):
    y = x.new_empty(chain.output_shape(x)).contiguous(memory_format=reference.memory_format_of(x))
    return abi.choose_winograd(dispatch.KERNELS, abi.pack_chain(x, y, chain), chain)[1]


def test_it_serves_where_it_takes_less_time():
    assert chosen(images(64, 96, 16, 16), layer(96, 192, 5, 2)) == 8
    assert chosen(images(1, 96, 16, 16), layer(96, 192, 5, 2, torch.float32, "relu", 192, 192)) == 8
    assert chosen(images(64, 192, 8, 8), layer(192, 192, 3, 1)) == 6
    assert chosen(images(64, 192, 8, 8), layer(192, 192, 1, 0)) == 0
    assert chosen(images(64, 3, 32, 32), layer(3, 192, 5, 2)) == 0  # the transforms would take most of the time
    assert chosen(images(64, 96, 32, 32), layer(96, 192, 11, 5)) == 0  # larger than a tile
    strided = layer(96, 192, 3, 1)._replace(stride=(2, 2))
    dilated = layer(96, 192, 3, 1)._replace(dilation=(2, 2))
    assert chosen(images(64, 96, 32, 32), strided) == chosen(images(64, 96, 32, 32), dilated) == 0
    uneven = ChainArguments([torch.randn(64, 64, 3, 5)], [None], (1, 1), (1, 2), (1, 1), ["relu"])
    assert chosen(images(4, 64, 32, 32), uneven) == 0


def test_the_environment_turns_it_off():
    code = (
        "import torch, nin\nfrom nin.ops.cpu import abi, dispatch\nfrom nin.ops.arguments import ChainArguments\n"
        "x, w = torch.randn(8, 64, 16, 16), torch.randn(64, 64, 3, 3)\n"
        "chain = ChainArguments([w], [None], (1, 1), (1, 1), (1, 1), ['none'])\n"
        "print(abi.choose_winograd(dispatch.KERNELS, abi.pack_chain(x, x, chain), chain)[1])"
    )
    for value, size in (("0", "0"), ("1", "6")):
        environment = os.environ | {abi.WINOGRAD_VARIABLE: value}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert result.stdout.strip() == size, result.stderr


# -- threads, memory, packed weights -----------------------------------------------------


# images, channels in and out, height and width, of the 1×1 layers: one task by columns, too few columns for that, whole
# images, parts of images
SHARED_OUT = [(1, 96, 192, 16, (160, 96)), (1, 256, 32, 8, ()), (5, 48, 64, 8, (33,)), (3, 24, 40, 21, ())]


@each_dtype
@each_layout
def test_equal_bits_for_any_number_of_threads(isa, force, threads, dtype, layout):
    for count, channels, columns, side, more in (
        (1, 96, 192, 16, (160, 96)),
        (5, 48, 64, 8, (33,)),
        (3, 24, 40, 21, ()),
    ):
        torch.manual_seed(0)
        x = images(count, channels, side, side, dtype, layout)
        chain = layer(channels, columns, 5, 2, dtype, "relu", *more)
        single = chain.subchain(0, 1)
        results = []
        for number in (1, threads):
            torch.set_num_threads(number)
            weight_cache._copies.clear()
            force(8)
            y = dispatch.mlpconv(x, single)
            grads = dispatch.mlpconv_backward(y, x, y, single, [True, True, True])
            results.append([dispatch.mlpconv(x, chain), y, grads[0], grads[1][0]])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_dtype
def test_scratch_is_bounded(dtype):
    def scratch_bytes(images, side, *widths):
        x, y = (torch.empty(1, dtype=dtype).expand(images, widths[i], side, side) for i in (0, -1))
        kernels = [3] + [1] * (len(widths) - 2)
        weights = [torch.empty(o, i, k, k) for i, o, k in zip(widths[:-1], widths[1:], kernels, strict=True)]
        chain = ChainArguments(weights, [None] * len(weights), (1, 1), (1, 1), (1, 1), ["relu"] * len(weights))
        row = abi.pack_chain(x, y, chain)[:-8] + struct.pack("q", 8)
        rows = b"".join(struct.pack("4q", 0, 0, width, 1) for width in widths[1:])
        return library.LIBRARY.nin_forward_scratch_bytes(dispatch.KERNELS.handles[dtype], row, rows, 2)

    assert scratch_bytes(1, 60000, 96, 96) == scratch_bytes(1, 6000, 96, 96) <= 3 << 20
    assert scratch_bytes(64, 16, 512, 512) <= 4 << 20
    assert scratch_bytes(1, 6000, 16, 32, 4096, 16) <= 5 << 20


def test_a_changed_weight_is_transformed_again():
    x, chain = images(4, 32, 16, 16), layer(32, 48, 3, 1)
    assert chosen(x, chain) == 6
    weight = chain.weights[0]
    x.requires_grad_()
    for _ in range(3):
        y = nin.mlpconv(x, [weight], chain.biases, padding=1, activation=None)
        (grad,) = torch.autograd.grad(y.sum(), x)
        want = F.conv2d(x.detach().double(), weight.double(), chain.biases[0].double(), padding=1)
        assert_close(y, want)
        assert_close(grad, F.conv_transpose2d(torch.ones_like(want), weight.double(), padding=1))
        weight[3, 5, 1, 1] += 1


@each_dtype
@pytest.mark.parametrize("for_input_gradient", [False, True])
def test_transformed_weights_do_not_depend_on_their_memory_format(dtype, for_input_gradient):
    weight = torch.randn(40, 24, 5, 5).to(dtype)
    layouts = [
        weight,
        weight.contiguous(memory_format=torch.channels_last),
        weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    ]
    options = {"for_input_gradient": for_input_gradient, "winograd_tile_size": 8}
    packed = [weight_cache.packed_weight(dispatch.KERNELS, w, **options) for w in layouts]
    assert all(torch.equal(packed[0], other) for other in packed[1:])


def test_training_goes_the_same_way():
    """Ten steps of a small network from the same seed with and without, in float32."""

    def losses():
        torch.manual_seed(0)
        network = torch.nn.Sequential(
            nin.MLPConv(24, (32, 24), kernel_size=5, padding=2), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        )
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        x, target = images(8, 24, 16, 16), torch.randint(24, (8,))
        for _ in range(10):
            loss = F.cross_entropy(network(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    with pytest.MonkeyPatch.context() as patch:
        ours = list(losses())
        patch.setattr(abi, "WINOGRAD", False)
        theirs = list(losses())
    assert ours != theirs  # else it did not serve
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-5)
    assert ours[-1] < ours[0]
