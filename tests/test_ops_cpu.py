"""The compiled CPU kernels: every instruction set, every tail, threads, memory, the cache of packed weights."""

import ctypes
import gc
import os
import struct
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import nin
from nin.ops import ACTIVATIONS, reference
from nin.ops.arguments import ChainArguments
from nin.ops.cpu import abi, conv_backward, dispatch
from nin.ops.cpu import library as compiled
from nin.ops.cpu.weight_cache import packed_weight
from support.chains import LAYOUTS, PLAIN, Chain, conv_chain, error_bound
from support.native import INSTRUCTION_SETS, build_native

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

pytestmark = pytest.mark.skipif(compiled.LIBRARY is None, reason="nin was installed without a C++ compiler")
each_layout = pytest.mark.parametrize("layout", list(LAYOUTS.values()), ids=LAYOUTS)
each_dtype = pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=DTYPES)


@pytest.fixture(autouse=True)
def all_to_the_kernel(monkeypatch, request):
    """Compute small layers with the compiled kernel too, but where the rule itself is tested; k×k layers directly."""
    monkeypatch.setattr(abi, "WINOGRAD", False)  # see test_ops_cpu_winograd.py
    if "rule" not in request.node.name:
        monkeypatch.setattr(dispatch, "is_faster_in_pytorch", lambda *_: False)


def assert_within_bound(x, weights, biases, activation, geometry):
    """Compare with the chain in float64; the bound follows from the length of the sums."""
    result = nin.mlpconv(x, weights, biases, activation=activation, **geometry)
    exact = x.double(), [w.double() for w in weights], [None if b is None else b.double() for b in biases]
    names = [activation] * len(weights) if isinstance(activation, str) else activation
    error = (result.double() - conv_chain(*exact, names, geometry)).abs()
    assert (error <= error_bound(*exact, names, geometry, x.dtype)).all()
    assert result.is_contiguous(memory_format=reference.memory_format_of(x))


def gradients(x, weights, biases, activation, geometry, grad, *, kernel):
    """Return the result and all gradients, of the compiled kernel or of the reference in the given dtype."""
    count = len(weights)
    names = [activation] * count if isinstance(activation, str) else activation
    options = [(value, value) if isinstance(value, int) else value for value in geometry.values()]
    arguments = ChainArguments(weights, biases, *options, names)
    needs = [True] * (1 + count) + [b is not None for b in biases]
    if kernel == "compiled":
        y = torch.ops.nin.mlpconv(x, *arguments)
        grad_x, grad_weights, grad_biases = torch.ops.nin.mlpconv_backward(grad, x, y, *arguments, needs)
    else:
        y = reference.mlpconv(x, arguments)
        grad_x, grad_weights, grad_biases = reference.mlpconv_backward(grad, x, y, arguments, needs)
    return [grad_x, *grad_weights, *(g for g, b in zip(grad_biases, biases, strict=True) if b is not None)]


def assert_gradients_agree(x, weights, biases, activation, geometry):
    """Compare with the float64 reference: as far from it as PyTorch's layer by layer backward at most, and a bit.

    The bit is what is lost in sums over all pixels, of terms of order 1 that may cancel each other.
    """
    plain = [torch.randn_like(nin.mlpconv(x, weights, biases, activation=activation, **geometry))]
    ours = gradients(x, weights, biases, activation, geometry, *plain, kernel="compiled")
    theirs = gradients(x, weights, biases, activation, geometry, *plain, kernel="reference")
    exact = gradients(
        x.double(),
        [w.double() for w in weights],
        [None if b is None else b.double() for b in biases],
        activation,
        geometry,
        plain[0].double(),
        kernel="reference",
    )
    for got, other, want in zip(ours, theirs, exact, strict=True):
        assert got.shape == want.shape
        size = want.norm() + torch.finfo(x.dtype).tiny
        pixels = plain[0].numel() / plain[0].shape[1]
        noise = 2 * torch.finfo(x.dtype).eps * (2 + (want.numel() * pixels) ** 0.5 / size)
        assert (got.double() - want).norm() / size <= 2 * (other.double() - want).norm() / size + noise


PLAIN_GEOMETRY = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
CHAINS = {
    "tails everywhere": Chain((19, 33, 7, 21)),
    "whole vectors": Chain((64, 96, 32)),
    "one channel": Chain((1, 1)),
    "wide": Chain((300, 17, 130)),
    "3 channels 5x5": Chain((3, 50, 33), (5, 5), padding=(2, 2)),
    "odd 3x3 dilated strided": Chain((5, 18, 3), (3, 3), (2, 1), (2, 3), (2, 2)),
    "24 channels 3x3": Chain((24, 40), (3, 3), padding=(1, 1), bias=False),
    "11x11 stride 4": Chain((3, 20, 20), (11, 11), (4, 4)),
    "1x1 strided": Chain((18, 15), stride=(3, 2)),
    "all taps in the padding": Chain((4, 6), (1, 1), (1, 1), (3, 3)),
}
each_chain = pytest.mark.parametrize("chain", list(CHAINS.values()), ids=CHAINS)


# -- values -----------------------------------------------------------------------------------------------------


@each_chain
@each_layout
@each_dtype
def test_values(isa, chain, layout, dtype):
    for activation in ("relu", "gelu"):
        assert_within_bound(*chain.tensors(dtype, layout, size=(13, 17)), activation, chain.geometry)


@each_layout
@each_dtype
def test_values_for_any_number_of_channels_and_pixels(isa, layout, dtype):
    """Up to two vectors of columns, of which the second may be half empty, and odd numbers of rows."""
    for columns in range(1, 41):
        chain = Chain((3, columns, 70 - columns))
        assert_within_bound(*chain.tensors(dtype, layout, images=1, size=(1, columns)), "relu", chain.geometry)


@each_chain
@each_layout
@each_dtype
def test_gradients(isa, chain, layout, dtype):
    for activation in ("relu", "silu"):
        assert_gradients_agree(*chain.tensors(dtype, layout, size=(13, 17)), activation, chain.geometry)


@each_layout
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize(
    ("widths", "kernel_size", "stride", "padding"),
    [((3, 40), (5, 5), (1, 1), (2, 2)), ((8, 33), (3, 1), (2, 3), (0, 4)), ((5, 70), (2, 7), (3, 1), (1, 0))],
)
def test_gradients_of_a_first_layers_weights(
    isa, layout, activation, widths, kernel_size, stride, padding, monkeypatch
):
    served = []
    kernel = conv_backward.direct_weight_gradient
    monkeypatch.setattr(conv_backward, "direct_weight_gradient", lambda *them: served.append(1) or kernel(*them))
    chain = Chain(widths, kernel_size, stride, padding)
    for size in ((13, 17), (8, 300), (71, 30)):
        x, weights, biases = chain.tensors(torch.float32, layout, images=5, size=size)
        arguments = ChainArguments(weights, biases, stride, padding, (1, 1), [activation])
        y = dispatch.mlpconv(x, arguments)
        grad, needs = torch.randn_like(y), [False, True, True]
        _, (weight,), (bias,) = dispatch.mlpconv_backward(grad, x, y, arguments, needs)
        exact = ChainArguments([weights[0].double()], [biases[0].double()], *arguments[2:])
        _, wants, want_biases = reference.mlpconv_backward(grad.double(), x.double(), y.double(), exact, needs)
        torch.testing.assert_close(weight.double(), wants[0], rtol=1e-5, atol=1e-5 * wants[0].std().item())
        torch.testing.assert_close(bias.double(), want_biases[0], rtol=1e-5, atol=1e-5 * wants[0].std().item())
        assert weight.is_contiguous()
    assert len(served) == 3


@pytest.mark.parametrize("names", [["gelu", "none", "silu"], ["none", "silu", "relu"], ["relu", "none", "none"]])
@pytest.mark.parametrize("kernel_size", [(1, 1), (3, 3)])
@each_dtype
def test_an_activation_of_its_own_for_each_layer(isa, dtype, kernel_size, names):
    chain = Chain((19, 33, 7, 21), kernel_size)
    assert_within_bound(*chain.tensors(dtype), names, chain.geometry)
    assert_gradients_agree(*chain.tensors(dtype), names, chain.geometry)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_their_derivatives(isa, activation):
    z = torch.cat((torch.linspace(-12, 12, 4001), torch.linspace(-0.01, 0.01, 999), torch.tensor([-100.0, 100.0])))
    x = z.reshape(1, 1, 1, -1)
    one = [torch.ones(1, 1, 1, 1)]
    result = nin.mlpconv(x, one, [None], activation=activation)
    exact = x.double().requires_grad_()
    want = PLAIN[activation](exact)
    # 1 + erf(z) loses the digits of a large negative z, here as in PyTorch
    assert ((result - want).abs() <= 3e-7 * (1 + exact.abs())).all()
    (grad,) = torch.autograd.grad(want.sum(), exact)
    ours = gradients(x, one, [None], activation, PLAIN_GEOMETRY, torch.ones_like(x), kernel="compiled")[0]
    assert ((ours - grad).abs() <= 1e-6 * (1 + exact.abs())).all()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_random_shapes(data):
    torch.manual_seed(data.draw(st.integers(0, 1 << 32), "seed"))
    widths = tuple(data.draw(st.lists(st.integers(1, 300), min_size=2, max_size=5), "widths"))
    kernel_size = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)), "kernel size")
    stride = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)), "stride")
    padding = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3)), "padding")
    dilation = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 3)), "dilation")
    size = data.draw(st.tuples(st.integers(7, 19), st.integers(10, 19)), "size")  # as far as the dilated taps reach
    bias = data.draw(st.booleans(), "bias")
    chain = Chain(widths, kernel_size, stride, padding, dilation=dilation, bias=bias)
    dtype = data.draw(st.sampled_from(list(DTYPES.values())), "dtype")
    layout = data.draw(st.sampled_from(list(LAYOUTS.values())), "layout")
    tensors = chain.tensors(dtype, layout, images=data.draw(st.integers(1, 3), "images"), size=size)
    assert_within_bound(*tensors, "relu", chain.geometry)
    assert_gradients_agree(*tensors, "gelu", chain.geometry)


@each_dtype
def test_4097_channels(isa, dtype):
    x, weights, biases = Chain((4097, 3, 4097)).tensors(dtype, size=(1, 2))
    assert_within_bound(x, weights, biases, "relu", PLAIN_GEOMETRY)
    assert_gradients_agree(x, weights, biases, "relu", PLAIN_GEOMETRY)


@each_dtype
def test_no_images(dtype):
    x, weights, biases = Chain((3, 4)).tensors(dtype, images=0)
    assert nin.mlpconv(x, weights, biases).shape == (0, 4, 9, 8)
    grads = gradients(x, weights, biases, "relu", PLAIN_GEOMETRY, x.new_empty(0, 4, 9, 8), kernel="compiled")
    assert all((g == 0).all() for g in grads)


VIEWS = {
    "misaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "transposed": lambda x: x.transpose(2, 3),
    "every second": lambda x: x[:, :, ::2, 1::2],
    "some channels": lambda x: x[:, 3:16],
    "some channels, NHWC": lambda x: x.contiguous(memory_format=torch.channels_last)[:, 3:16],
    "expanded": lambda x: x[:1, :, :1].expand(4, -1, 7, -1),
    "N last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "flipped": lambda x: x.flip(2),
}


@each_dtype
@pytest.mark.parametrize("view", list(VIEWS.values()), ids=VIEWS)
def test_views(isa, view, dtype):
    x = view(torch.randn(4, 20, 12, 12).to(dtype))
    _, weights, biases = Chain((x.shape[1], 9, 18)).tensors(dtype)
    assert_within_bound(x, weights, biases, "relu", PLAIN_GEOMETRY)
    assert_gradients_agree(x, weights, biases, "relu", PLAIN_GEOMETRY)
    _, weights, biases = Chain((x.shape[1], 9, 18), (3, 3)).tensors(dtype)
    assert_within_bound(x, weights, biases, "relu", PLAIN_GEOMETRY | {"padding": (1, 1)})


def test_past_2_to_the_31_elements():
    # only the pixels that are looked at are ever touched, the rest stays an untouched mapping
    width = (1 << 31) + 64
    x = torch.empty(1, 2, 1, width, dtype=torch.bfloat16)
    x[..., 0], x[..., (width - 64) // 2], x[..., width - 64] = 1.0, 2.0, 3.0
    weight = torch.tensor([[1.0, 10.0]], dtype=torch.bfloat16).reshape(1, 2, 1, 1)
    result = nin.conv1x1(x[..., : width - 63], weight, stride=(1, (width - 64) // 2))
    assert result.flatten().tolist() == [11.0, 22.0, 33.0]


# -- NaN and infinity --------------------------------------------------------------------------------------------


@each_dtype
@each_layout
@pytest.mark.parametrize("width", [5, 16, 33])
def test_nan_and_infinity_stay_where_they_belong(isa, dtype, layout, width):
    x, weights, biases = Chain((width, width, width)).tensors(dtype, layout)
    x[0, 1, 2, 3], x[1, 0, 4, 4] = float("nan"), float("inf")
    result = nin.mlpconv(x, weights, biases)
    # PyTorch's own bfloat16 convolution makes a NaN of infinity at odd numbers of channels; float64 does not
    exact = x.double(), [w.double() for w in weights], [b.double() for b in biases]
    expected = conv_chain(*exact, ["relu", "relu"], {})
    assert result[0, :, 2, 3].isnan().all()
    assert (result.isnan() == expected.isnan()).all()
    assert (result.isinf() == expected.isinf()).all()


def test_nan_of_a_neighbour_stays_outside(isa):
    for dtype in DTYPES.values():
        x, weights, biases = Chain((30, 24)).tensors(dtype, torch.channels_last)  # 24: pairs of pixels share a register
        x[0, 7, 2, 3] = float("nan")
        result = nin.mlpconv(x, weights, biases)
        assert result[0, :, 2, 3].isnan().all()
        assert result.isnan().sum() == 24
        x, weights, biases = Chain((3, 4), (3, 3), padding=(1, 1)).tensors(dtype)
        x[0, 2, 4, 4] = float("nan")
        result = nin.mlpconv(x, weights, biases, padding=1, activation=None)
        touched = torch.zeros(9, 8, dtype=torch.bool)
        touched[3:6, 3:6] = True
        assert (result[0].isnan().all(0) == touched).all()
        assert not result[1].isnan().any()


# -- threads and memory ------------------------------------------------------------------------------------------


def test_equal_bits_for_any_number_of_threads(isa, threads):
    for dtype in DTYPES.values():
        for shape in (Chain((40, 33, 50)), Chain((3, 20, 30), (5, 5), padding=(2, 2))):
            torch.manual_seed(0)
            x, weights, biases = shape.tensors(dtype, images=5, size=(23, 19))
            torch.set_num_threads(1)
            expected = nin.mlpconv(x, weights, biases, **shape.geometry)
            grad = torch.randn_like(expected)
            wanted = gradients(x, weights, biases, "relu", shape.geometry, grad, kernel="compiled")
            torch.set_num_threads(threads)
            assert torch.equal(nin.mlpconv(x, weights, biases, **shape.geometry), expected)
            if shape.kernel_size == (1, 1):  # a k×k backward is PyTorch's own
                got = gradients(x, weights, biases, "relu", shape.geometry, grad, kernel="compiled")
                assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_equal_bits_of_a_first_layers_gradients(isa, threads):
    x, weights, biases = Chain((3, 40), (5, 5)).tensors(torch.float32, images=5, size=(23, 19))
    arguments = ChainArguments(weights, biases, (1, 1), (2, 2), (1, 1), ["relu"])
    y = dispatch.mlpconv(x, arguments)
    both = []
    for number in (1, threads):
        torch.set_num_threads(number)
        _, grad_weights, grad_biases = dispatch.mlpconv_backward(y, x, y, arguments, [False, True, True])
        both.append(torch.cat((grad_weights[0].flatten(), grad_biases[0])))
    assert torch.equal(*both)


@pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(), reason="the processor has no AMX, whose tile registers PyTorch would share"
)
def test_tile_registers_are_shared_with_pytorch():
    x, weights, biases = Chain((192, 160, 96)).tensors(torch.bfloat16, size=(16, 16))
    a = torch.randn(256, 512).bfloat16()
    wanted, product = nin.mlpconv(x, weights, biases), a @ a.T
    for _ in range(20):
        assert torch.equal(nin.mlpconv(x, weights, biases), wanted)
        assert torch.equal(a @ a.T, product)


def test_few_pixels_and_many_weights_are_split_by_columns(isa, threads):
    for dtype in DTYPES.values():
        for chain, size in (Chain((640, 801, 640)), (5, 5)), (Chain((130, 700, 33), (3, 3), padding=(1, 1)), (6, 4)):
            for layout in LAYOUTS.values():
                x, weights, biases = chain.tensors(dtype, layout, images=1, size=size)
                assert_within_bound(x, weights, biases, "relu", chain.geometry)
                result = nin.mlpconv(x, weights, biases, **chain.geometry)
                torch.set_num_threads(1)
                assert torch.equal(nin.mlpconv(x, weights, biases, **chain.geometry), result)
                torch.set_num_threads(threads)


@pytest.mark.parametrize("columns", [64, 40], ids=["whole lines", "tails"])
@each_dtype
def test_a_large_output_is_written_with_non_temporal_stores(isa, threads, dtype, columns):
    x, weights, biases = Chain((3, columns)).tensors(dtype, torch.channels_last, images=1, size=(700, 301))
    result = nin.mlpconv(x, weights, biases)
    assert result.numel() * result.element_size() >= 16 << 20
    torch.testing.assert_close(
        result, F.conv2d(x, *weights, *biases).relu(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6
    )


def test_threads_of_its_own_where_pytorch_has_none(monkeypatch):
    monkeypatch.setattr(compiled, "PARALLEL_FOR", 0)
    x, weights, biases = Chain((40, 33, 50)).tensors(torch.float32, images=5)
    torch.set_num_threads(3)
    try:
        result = nin.mlpconv(x, weights, biases)
    finally:
        torch.set_num_threads(1)
    monkeypatch.undo()
    assert torch.equal(result, nin.mlpconv(x, weights, biases))


@each_dtype
def test_scratch_does_not_grow_with_the_images(dtype):
    def scratch_bytes(images, size):
        x = torch.empty(1, dtype=dtype).expand(images, 192, size, size)
        y = torch.empty(1, dtype=dtype).expand(images, 96, size, size)
        weights = [torch.empty(160, 192, 1, 1), torch.empty(96, 160, 1, 1)]
        row = abi.pack_chain(x, y, ChainArguments(weights, [None] * 2, (1, 1), (0, 0), (1, 1), ["relu"] * 2))
        rows = struct.pack("8q", 0, 0, 160, 1, 0, 0, 96, 1)
        return compiled.LIBRARY.nin_forward_scratch_bytes(dispatch.KERNELS.handles[dtype], row, rows, 2)

    assert scratch_bytes(1, 65536) == scratch_bytes(64, 32) <= 512 << 10  # 4 gigapixels, and 65,536


def test_a_chains_hidden_layers_are_not_kept_for_the_backward_pass():
    x, weights, biases = Chain((64, 512, 32)).tensors(torch.float32, images=4, size=(16, 16))
    for tensor in (*weights, *biases):
        tensor.requires_grad_()
    kept: dict[int, int] = {}

    def note(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = nin.mlpconv(x, weights, biases)
    parameters = sum(t.numel() for t in (*weights, *biases))
    assert sum(kept.values()) <= x.numel() + y.numel() + parameters < 4 * 512 * 16 * 16


def test_failures_of_the_library_are_exceptions():
    compiled.check(0)
    with pytest.raises(MemoryError):
        compiled.check(1)
    with pytest.raises(RuntimeError, match="thread pool"):
        compiled.check(2)


OUT_OF_MEMORY = """
import resource, torch, nin
torch.set_num_threads(1)
width = 1 << 20
weights = torch.ones(width, 1, 1, 1), torch.ones(1, width, 1, 1)
x = torch.ones(1, 1, 1, 64)
packed = nin.mlpconv(x[..., :1], weights, (None, None))
with open("/proc/self/statm") as pages:
    used = int(pages.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), -1))
try:
    nin.mlpconv(x, weights, (None, None))  # 14 pixels of the hidden layer are 56 MB
except MemoryError as error:
    print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its own memory as Linux does")
def test_out_of_memory_is_an_exception():
    run = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True)
    assert run.stdout == "nin's CPU kernel: not enough memory for its scratch\n", run.stderr


# -- packed weights ----------------------------------------------------------------------------------------------


def changes():
    yield "in place", lambda w: w.mul_(2)
    yield "optimiser step", lambda w: torch.optim.SGD([w], lr=1.0).step()
    yield "copied into", lambda w: w.copy_(torch.ones_like(w))
    yield "a view of it", lambda w: w[0].zero_()
    yield "in place, past the version counter", lambda w: w.data.mul_(2)
    yield "its data", lambda w: setattr(w, "data", torch.ones_like(w))


@pytest.mark.parametrize("change", [c for _, c in changes()], ids=[name for name, _ in changes()])
def test_a_changed_weight_is_packed_again(change):
    weight = torch.nn.Parameter(torch.randn(8, 6, 1, 1))
    weight.grad = torch.ones_like(weight)
    x = torch.randn(1, 6, 5, 5)
    with torch.no_grad():
        before = nin.conv1x1(x, weight)
        assert torch.equal(before, nin.conv1x1(x, weight))
        change(weight)
        torch.testing.assert_close(nin.conv1x1(x, weight), F.conv2d(x, weight))


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_that_changes_a_single_value_is_seen(make, options):
    weight = torch.nn.Parameter(torch.randn(64, 64, 1, 1))  # of which 64 values are sampled
    optimizer = make([weight], lr=0.5, weight_decay=0, **options)
    x = torch.randn(1, 64, 5, 5)
    with torch.no_grad():
        nin.conv1x1(x, weight)
        weight.grad = torch.zeros_like(weight)
        weight.grad[0, 1] = 1
        optimizer.step()
        torch.testing.assert_close(nin.conv1x1(x, weight), F.conv2d(x, weight), atol=1e-4, rtol=1e-4)


def test_an_optimiser_compiles_with_the_packed_weights_watched():
    weight = torch.nn.Parameter(torch.randn(8, 6, 1, 1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    x = torch.randn(1, 6, 5, 5)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        step()
        with torch.no_grad():
            torch.testing.assert_close(nin.conv1x1(x, weight), F.conv2d(x, weight), atol=1e-4, rtol=1e-4)


def test_packed_weights_are_kept_and_die_with_the_weight():
    weight = torch.randn(8, 6, 1, 1)
    packed = packed_weight(dispatch.KERNELS, weight)
    assert packed_weight(dispatch.KERNELS, weight) is packed
    kept = weakref.ref(packed)
    del weight, packed
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_made_in_inference_mode_are_kept_until_one_of_their_values_changes(dtype):
    with torch.inference_mode():  # they have no version counter
        weight, x = torch.randn(8, 101, 3, 3, dtype=dtype), torch.randn(1, 101, 5, 5, dtype=dtype)
        packed = packed_weight(dispatch.KERNELS, weight)
        assert packed_weight(dispatch.KERNELS, weight) is packed
        for place in [(0, 0, 0, 0), (3, 50, 1, 1), (7, 100, 2, 2)]:
            weight[place] += 1
            packed, before = packed_weight(dispatch.KERNELS, weight), packed
            assert packed is not before
            wanted = F.conv2d(x, weight)
            torch.testing.assert_close(nin.mlpconv(x, [weight], [None], activation=None), wanted, atol=0.3, rtol=0.02)
        part = weight[:, :2]  # not contiguous: packed in every call
        assert packed_weight(dispatch.KERNELS, part) is not packed_weight(dispatch.KERNELS, part)


def in_memory_layouts(shape, dtype):
    """Yield equal weights in different memory layouts."""
    weight = torch.randn(shape).to(dtype)
    yield weight
    yield weight.contiguous(memory_format=torch.channels_last)
    yield weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)  # contiguous columns
    yield torch.randn(shape[0], shape[1] + 3, *shape[2:]).to(dtype)[:, 1:-2].copy_(weight)


@pytest.mark.parametrize("for_input_gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 32, 1, 1), (70, 33, 3, 3), (5, 1, 2, 3), (16, 7, 1, 1), (40, 48, 5, 5)])
def test_packed_weights_do_not_depend_on_their_memory_layout(isa, shape, dtype, for_input_gradient):
    weights = in_memory_layouts(shape, dtype)
    packed = [packed_weight(dispatch.KERNELS, w, for_input_gradient=for_input_gradient) for w in weights]
    assert all(torch.equal(packed[0], other) for other in packed[1:])


def test_every_instruction_set_is_tested():
    assert INSTRUCTION_SETS == compiled.INSTRUCTION_SETS


# -- which kernels -----------------------------------------------------------------------------------------------


def backends_in_a_process(value):
    code = "import nin; print(nin.backends()['cpu'])"
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {compiled.ISA_VARIABLE: value}, capture_output=True, text=True
    )


def test_the_environment_forces_an_instruction_set():
    names = {name: backends_in_a_process(name).stdout for name in ("portable", "avx512_bf16", "reference")}
    assert names["portable"].startswith("nin portable (compiled")
    # one that the machine lacks gives way to the next one down
    best = compiled.find_kernels(compiled.LIBRARY, "avx512_bf16").name
    assert names["avx512_bf16"].startswith(f"nin {best} (compiled")
    assert names["reference"].startswith("reference (PyTorch): NIN_CPU_ISA=reference")


def test_an_unknown_instruction_set_is_an_error():
    run = backends_in_a_process("avx1024")
    assert run.returncode != 0
    names = ", ".join([*compiled.INSTRUCTION_SETS, "reference"])
    assert f"NIN_CPU_ISA must be one of {names}, got 'avx1024'" in run.stderr


def test_other_dtypes_stay_with_the_reference(monkeypatch):
    def refuse(*_):
        raise AssertionError("the compiled kernel was called")

    monkeypatch.setattr(compiled, "thread_pool", refuse)
    for dtype in (torch.float64, torch.float16):
        x, weights, biases = Chain((5, 6)).tensors(dtype)
        torch.testing.assert_close(nin.mlpconv(x, weights, biases), F.conv2d(x, *weights, *biases).relu())


@pytest.mark.parametrize(
    ("widths", "kernel_size", "size", "dtype", "layout", "kernel"),
    [
        ((8, 8), 1, 7, "float32", "nhwc", "reference"),  # 3,136 multiply-accumulates
        ((8, 8), 3, 7, "float32", "nhwc", "reference"),
        ((64, 64), 1, 7, "float32", "nhwc", "compiled"),
        ((8, 8), 1, 7, "bfloat16", "nhwc", "compiled"),
        ((8, 8, 8), 1, 7, "float32", "nhwc", "compiled"),
        ((3, 8), 1, 64, "float32", "nchw", "reference"),
        ((3, 8), 1, 64, "float32", "nhwc", "compiled"),
        ((3, 16), 1, 64, "float32", "nchw", "compiled"),
        ((17, 8), 1, 64, "float32", "nchw", "compiled"),
        ((3, 8), 1, 64, "bfloat16", "nchw", "compiled"),
    ],
)
def test_the_rule_sends_to_pytorch_what_it_computes_faster(widths, kernel_size, size, dtype, layout, kernel):
    chain = Chain(widths, (kernel_size, kernel_size))
    x, weights, biases = chain.tensors(getattr(torch, dtype), LAYOUTS[layout], images=1, size=(size, size))
    arguments = ChainArguments(weights, biases, (1, 1), (0, 0), (1, 1), ["relu"] * len(weights))
    assert dispatch.is_faster_in_pytorch(x, arguments) == (kernel == "reference")
    if kernel == "reference":
        assert torch.equal(nin.mlpconv(x, weights, biases), reference.mlpconv(x, arguments))


def test_the_library_exports_nothing_but_its_interface():
    library = ctypes.CDLL(str(compiled.find_library()))
    with pytest.raises(AttributeError):
        _ = library.portable_kernels


def test_mismatched_tensors_of_a_direct_call_are_an_error():
    x, weights, biases = Chain((5, 6)).tensors(torch.float32)
    with pytest.raises(RuntimeError):
        torch.ops.nin.mlpconv(x[:, :4], weights, biases, (1, 1), (0, 0), (1, 1), ["relu"])


# -- memory errors -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_byte_outside_is_touched(tmp_path):
    """AddressSanitizer, and buffers that end at a page which may not be read, on every instruction set."""
    emulate = compiled.find_kernels(compiled.LIBRARY).name != "avx512_amx"
    build_native(tmp_path, "guard_test", "-DNIN_NATIVE_TESTS=ON", f"-DNIN_EMULATE_AMX={'ON' if emulate else 'OFF'}")
    run = subprocess.run([str(tmp_path / "guard_test")], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_with_the_kernel_and_with_the_reference_goes_the_same_way(monkeypatch, dtype):
    def losses():
        torch.manual_seed(0)
        model = nin.models.nin_digits().eval()  # without dropout
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        images, target = torch.randn(64, 1, 8, 8), torch.randint(0, 10, (64,))
        found = []
        for _ in range(20):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = F.cross_entropy(model(images), target)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            found.append(loss.item())
        return torch.tensor(found)

    ours = losses()
    monkeypatch.setattr(dispatch, "KERNELS", None)
    theirs = losses()
    assert theirs[-1] < 0.8 * theirs[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-3 if dtype == torch.float32 else 0.05, atol=1e-3)
