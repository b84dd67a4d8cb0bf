"""The Triton kernels against the reference in float64: in Triton's interpreter here, on the GPU where there is one."""

import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import nin
from nin.ops import reference
from nin.ops.arguments import ChainArguments
from nin.ops.gpu import dispatch, tile_sizes

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"  # on the CPU the kernels run in the interpreter, see conftest.py
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ONE = ((1, 1), (0, 0), (1, 1))  # stride, padding, dilation

each_layout = pytest.mark.parametrize("layout", list(LAYOUTS.values()), ids=LAYOUTS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _kernels_only(monkeypatch, tmp_path):
    """Every step by a Triton kernel, whatever the roofline says; no kept tiles of this machine's user."""
    monkeypatch.setenv("NIN_GPU", "triton")
    monkeypatch.setenv("NIN_GPU_CACHE", str(tmp_path / "tiles.json"))


@pytest.fixture(autouse=True)
def _plain_float32():
    """No TF32, so that float32's own bounds hold on a GPU too."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: widths[0] is the input's."""

    widths: tuple[int, ...]
    activations: tuple[str, ...]
    kernel_size: tuple[int, int] = (1, 1)
    geometry: tuple = ONE
    images: int = 2
    size: tuple[int, int] = (5, 7)
    bias: bool = True

    def tensors(self, dtype=torch.float32, layout=torch.contiguous_format):
        x = torch.randn(self.images, self.widths[0], *self.size)
        kernels = [self.kernel_size] + [(1, 1)] * (len(self.widths) - 2)
        weights = [
            torch.randn(o, i, *k) * (i * k[0] * k[1]) ** -0.5
            for (i, o), k in zip(itertools.pairwise(self.widths), kernels, strict=True)
        ]
        biases = [torch.randn(o) if self.bias else None for o in self.widths[1:]]
        on = {"device": DEVICE, "dtype": dtype}
        return (
            x.to(**on).contiguous(memory_format=layout),
            [w.to(**on) for w in weights],
            [None if b is None else b.to(**on) for b in biases],
        )

    def arguments(self, weights, biases):
        return ChainArguments(weights, biases, *self.geometry, list(self.activations))


def chain(*widths, activation="silu", **options):
    return Case(widths, (activation,) * (len(widths) - 1), **options)


# Every tail: widths that no chunk divides, pixels that no tile divides; each activation; each geometry.
CASES = {
    "one pixel, one channel": chain(1, 1, 1, images=1, size=(1, 1), activation="none"),
    "3 17 33": chain(3, 17, 33, activation="relu"),
    "65 33 17 1": chain(65, 33, 17, 1, activation="gelu"),
    "one layer": chain(17, 65),
    "no bias": Case((33, 3, 17), ("gelu", "none"), bias=False),
    "four layers": Case((4, 5, 6, 7, 8), ("relu", "silu", "gelu", "none")),
    "strided pixels": Case((18, 20, 4), ("silu", "relu"), geometry=((2, 3), (0, 0), (1, 1))),
    "1x1 padded": chain(3, 4, 2, geometry=((1, 1), (1, 2), (1, 1))),
    "5x5 and two": chain(3, 20, 33, 10, kernel_size=(5, 5), geometry=((1, 1), (2, 2), (1, 1)), images=1),
    "3x3 stride 2": chain(32, 20, kernel_size=(3, 3), geometry=((2, 2), (1, 1), (1, 1)), activation="relu"),
    "3x2 uneven": chain(5, 3, 4, kernel_size=(3, 2), geometry=((2, 1), (1, 0), (1, 2)), activation="gelu"),
    "rows of one": chain(5, 6, 7, size=(4, 1)),
}
each_case = pytest.mark.parametrize("case", list(CASES.values()), ids=CASES)


def exact(t):
    return None if t is None else t.detach().cpu().double()


def forward(case, x, weights, biases):
    return dispatch.mlpconv(x, case.arguments(weights, biases))


def backward(case, grad, x, y, weights, biases, needs=None):
    needs = [True] * (1 + 2 * len(weights)) if needs is None else needs
    return dispatch.mlpconv_backward(grad, x, y, case.arguments(weights, biases), needs)


def expected(case, grad, x, weights, biases):
    """Return the result, and the gradients as `backward` does, in float64 by PyTorch's convolutions."""
    arguments = case.arguments([exact(w) for w in weights], [exact(b) for b in biases])
    y = reference.mlpconv(exact(x), arguments)
    needs = [True] * (1 + 2 * len(weights))
    return y, reference.mlpconv_backward(exact(grad), exact(x), y, arguments, needs)


def assert_near(got, want, eps):
    """Compare with what ``eps`` roundings allow, against the largest entry."""
    assert got.shape == want.shape
    if want.numel():
        assert (exact(got) - want).abs().max() <= eps * want.abs().max() + 1e-12


def check(case, dtype, layout):
    x, weights, biases = case.tensors(dtype, layout)
    y = forward(case, x, weights, biases)
    grad = torch.randn(y.shape, device=DEVICE).to(dtype)
    want_y, (want_x, want_weights, want_biases) = expected(case, grad, x, weights, biases)
    eps = 16 * torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=layout)
    assert_near(y, want_y, eps)
    grad_x, grad_weights, grad_biases = backward(case, grad, x, y, weights, biases)
    assert grad_x.dtype == dtype
    assert reference.memory_format_of(grad_x) == reference.memory_format_of(x)
    assert_near(grad_x, want_x, eps)
    for got, want, weight in zip(grad_weights, want_weights, weights, strict=True):
        assert got.dtype == dtype
        assert got.stride() == torch.empty(weight.shape).stride()
        assert_near(got, want, eps)
    # together: the only entry of a layer of one channel is a sum that may cancel to next to nothing
    assert [got.shape for got in grad_biases] == [want.shape for want in want_biases]
    assert_near(torch.cat(grad_biases), torch.cat(want_biases), eps)


@each_case
@each_layout
def test_float32_equals_the_reference_forward_and_backward(case, layout):
    # backward, a k×k layer is the library's, and so is a 1×1 layer with padding
    spatial = case.kernel_size != (1, 1) or case.geometry[1] != (0, 0)
    assert [group.fused for group in plans(case)].count(False) == spatial
    check(case, torch.float32, layout)


def plans(case):
    x, weights, biases = case.tensors()
    arguments = case.arguments(weights, biases)
    return [*dispatch.forward_plan(x, arguments), *dispatch.backward_plan(x, arguments)]


# A 16-bit hidden value near zero may fall on the other side of a ReLU's edge than in float64, and then the gradient
# differs by as much as it is; smooth activations have no edge.
@each_layout
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["65 33 17 1", "5x5 and two", "3x2 uneven"])
def test_half_precision_is_within_a_few_roundings(name, dtype, layout):
    check(CASES[name], dtype, layout)


@pytest.mark.slow
@each_case
@each_layout
@each_dtype
@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
def test_every_case_in_every_dtype(case, layout, dtype, activation):
    check(dataclasses.replace(case, activations=(activation,) * len(case.activations)), dtype, layout)


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(192, 160, 96), (96, 384, 96), (300, 17), (17, 300), (192, 192, 10)])
@each_layout
def test_wide_layers(widths, layout):
    check(chain(*widths, images=1, size=(13, 11)), torch.float32, layout)


@each_layout
@each_dtype
@pytest.mark.parametrize(
    "case",
    [chain(9, 20, 5, size=(9, 11)), chain(20, 5, size=(9, 11), activation="gelu"), chain(4, 5, 6, 7, size=(9, 11))],
    ids=["pair", "one layer", "one and a pair"],
)
def test_gradients_are_summed_over_pieces_of_the_pixels(case, dtype, layout, monkeypatch):
    from nin.ops.gpu import backward as launcher

    monkeypatch.setattr(tile_sizes.DeviceLimits, "scratch_bytes", lambda _: 1)  # a tile a piece
    monkeypatch.setattr(dispatch, "_calls", {})  # kept calls know the sizes of their pieces
    x, weights, biases = case.tensors(dtype, layout)
    with mock.patch.object(launcher, "write_product", wraps=launcher.write_product) as products:
        check(case, dtype, layout)
    assert products.call_count >= len(weights) * 2  # 198 pixels: two tiles or four
    y = forward(case, x, weights, biases)
    first, again = (backward(case, torch.ones_like(y), x, y, weights, biases) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(flat(first), flat(again), strict=True))


def test_pieces_are_whole_tiles_and_fit_the_scratch():
    from nin.ops.gpu.backward import split_pixels

    for pixels, tile, most in itertools.product((1, 63, 64, 65, 1000, 524_288), (64, 128), (1, 100, 5000, 10**6)):
        pieces = split_pixels(pixels, tile, most)
        assert [first for first, _ in pieces] == list(itertools.accumulate((n for _, n in pieces[:-1]), initial=0))
        assert sum(n for _, n in pieces) == pixels
        assert all(n <= max(most, tile) for _, n in pieces)
        assert all(n % tile == 0 for _, n in pieces[:-1])


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, of the interpreter: infinities
def test_gelu_and_its_derivative_are_exact_on_both_sides():
    z = torch.cat([torch.linspace(-14, 14, 4001), torch.tensor([1e30, -1e30, 1e-30, float("inf")])])
    x = z[None, None, None, :].to(DEVICE)
    case = Case((1, 1), ("gelu",), bias=False)
    one = torch.ones(1, 1, 1, 1, device=DEVICE)
    y = forward(case, x, [one], [None])
    tail = 0.5 * torch.special.erfc(z.double().abs() / 2**0.5)
    want = z.double().clamp(min=0) - torch.where(tail == 0, 0.0, z.double().abs() * tail)
    torch.testing.assert_close(exact(y)[0, 0, 0], want, rtol=7e-5, atol=3e-7)
    grad_x, *_ = backward(case, torch.ones_like(y), x[..., :-1], y[..., :-1], [one], [None], [True, False, False])
    z = z[:-1].double()
    slope = torch.where(z < 0, tail[:-1], 1 - tail[:-1]) + z * torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5
    torch.testing.assert_close(exact(grad_x)[0, 0, 0], slope, rtol=1e-6, atol=3e-7)


@pytest.mark.parametrize(
    ("name", "size"), [("3 17 33", (15, 18)), ("5x5 and two", (23, 24)), ("3x3 stride 2", (30, 35))]
)
def test_two_runs_give_the_same_bits(name, size):
    case = dataclasses.replace(CASES[name], size=size)
    x, weights, biases = case.tensors()
    y = forward(case, x, weights, biases)
    grad = torch.randn_like(y)
    first, again = (backward(case, grad, x, y, weights, biases) for _ in range(2))
    for a, b in zip(flat(first), flat(again), strict=True):
        assert torch.equal(a, b)
    _, want = expected(case, grad, x, weights, biases)
    for got, wanted in zip(flat(first), flat(want), strict=True):
        assert_near(got, wanted, 1e-5)


def flat(grads):
    return [grads[0], *grads[1], *grads[2]]


@each_layout
def test_an_empty_batch(layout):
    case = chain(3, 5, 4, images=0)
    x, weights, biases = case.tensors(layout=layout)
    y = forward(case, x, weights, biases)
    assert y.shape == (0, 4, 5, 7)
    grads = backward(case, torch.empty_like(y), x, y, weights, biases)
    assert all((g == 0).all() for g in flat(grads))


@pytest.mark.parametrize("needs", ["nnYnn", "Ynnnn", "nnnYn", "nnYnY", "nYnnn"])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_only_the_gradients_that_are_wanted(needs, kernel_size):
    case = chain(3, 5, 4, kernel_size=(kernel_size,) * 2)
    wanted = [letter == "Y" for letter in needs]
    x, weights, biases = case.tensors()
    y = forward(case, x, weights, biases)
    grad = torch.randn_like(y)
    got = flat(backward(case, grad, x, y, weights, biases, wanted))
    want = flat(expected(case, grad, x, weights, biases)[1])
    for g, w, need in zip(got, want, wanted, strict=True):
        assert g.shape == (w.shape if need else (0,))
        assert_near(g, w if need else w.new_empty(0), 1e-5)


VIEWS = {
    "every second row": lambda x: x[:, :, ::2],
    "every second channel": lambda x: x[:, ::2],
    "a window": lambda x: x[1:, :, 2:7, 3:6],
    "transposed": lambda x: x.transpose(2, 3),
    "one image, many times": lambda x: x[:1].expand(3, -1, -1, -1),
    "one channel, many times": lambda x: x[:, :1].expand(-1, 6, -1, -1),
}


@pytest.mark.parametrize("view", list(VIEWS.values()), ids=VIEWS)
@pytest.mark.parametrize("kernel_size", [1, 2])
def test_views_are_read_where_they_lie(view, kernel_size):
    x = view(torch.randn(3, 6, 9, 8, device=DEVICE))
    case = chain(x.shape[1], 4, 3, kernel_size=(kernel_size,) * 2)
    _, weights, biases = case.tensors()
    y = forward(case, x, weights, biases)
    grad = torch.ones((), device=DEVICE).expand(y.shape)  # what a sum's backward gives: all strides zero
    want_y, want = expected(case, grad, x, weights, biases)
    assert_near(y, want_y, 1e-5)
    for got, wanted in zip(flat(backward(case, grad, x, y, weights, biases)), flat(want), strict=True):
        assert_near(got, wanted, 1e-5)


def test_weights_that_are_views():
    case = Case((4, 5, 3), ("relu", "none"))
    store = torch.randn(9, 12, 2, 2, device=DEVICE)
    weights = [store[:5, :4, :1, 1:], store[::2, ::3, 1:, :1][:3, :1].expand(3, 5, 1, 1)]
    biases = [store[:5, 0, 0, 0], None]
    x, _, _ = case.tensors()
    y = forward(case, x, weights, biases)
    want, grads = expected(case, torch.ones_like(y), x, weights, biases)
    assert_near(y, want, 1e-5)
    for got, wanted in zip(flat(backward(case, torch.ones_like(y), x, y, weights, biases)), flat(grads), strict=True):
        assert_near(got, wanted, 1e-5)


def test_nan_passes_relu_and_its_gate():
    case = chain(2, 3, activation="relu", images=1)
    x, weights, biases = case.tensors()
    x[0, 0, 0, 0] = float("nan")
    y = forward(case, x, weights, biases)
    assert torch.isnan(y[0, :, 0, 0]).all()
    assert torch.isfinite(y[0, :, 1:]).all()
    grad_x, *_ = backward(case, torch.ones_like(y), x, y, weights, biases)
    arguments = case.arguments(weights, biases)
    (want, *_) = reference.mlpconv_backward(torch.ones_like(y), x, y, arguments, [True, False, False])
    assert_near(grad_x[0, :, 0, 0], exact(want[0, :, 0, 0]), 1e-5)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_images_that_lie_more_than_32_bits_apart(kernel_size):
    # memory that is not touched is not taken: two images, one at either end of 8.6 GB
    far, case = (1 << 31) + 64, chain(3, 5, 4, kernel_size=(kernel_size,) * 2, images=2, size=(4, 5))
    try:
        store = torch.empty(far + 60, device=DEVICE)
    except RuntimeError:
        pytest.skip("8.6 GB of address space are not to be had")
    x = store.as_strided((2, 3, 4, 5), (far, 20, 5, 1))
    x.copy_(torch.randn(2, 3, 4, 5))
    _, weights, biases = case.tensors()
    y = forward(case, x, weights, biases)
    grad = torch.randn_like(y)
    want_y, want = expected(case, grad, x, weights, biases)
    assert_near(y, want_y, 1e-5)
    assert_near(backward(case, grad, x, y, weights, biases)[1][0], want[1][0], 1e-5)


def test_float64_is_the_references():
    case = chain(3, 5)
    x, weights, biases = case.tensors(torch.float64)
    arguments = case.arguments(weights, biases)
    assert dispatch.forward_plan(x, arguments) == ()
    torch.testing.assert_close(dispatch.mlpconv(x, arguments), reference.mlpconv(x, arguments))


# -- tiles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shared_bytes", [232_448, 166_912, 101_376], ids=["Hopper", "A100", "consumer"])
def test_tiles_fit_the_chip_for_every_width(itemsize, shared_bytes):
    device = tile_sizes.DeviceLimits(shared_bytes, 132)
    widths = (1, 17, 65, 160, 192, 300, 1025, 4097)
    fitting = 0
    for a, b, c in itertools.product(widths, repeat=3):
        for cut in tile_sizes.chain_tiles((a, b, c), itemsize, device):
            fitting += 1
            assert tile_sizes.chain_shared_bytes((a, b, c), cut, itemsize) <= shared_bytes
            assert all(n * size >= w for n, size, w in zip(counts((a, b, c), cut), cut.chunks, (a, b, c), strict=True))
        assert not tile_sizes.chain_tiles((4097, 4097, 4097), itemsize, device)
    assert fitting > 50
    for a, b in itertools.product(widths, repeat=2):
        for cut in tile_sizes.layer_tiles(a, b, 1, itemsize):
            assert cut.stages * (cut.pixels + cut.columns) * cut.summands * itemsize <= 101_376


def counts(widths, cut):
    return [tile_sizes.round_up(width, size) // size for width, size in zip(widths, cut.chunks, strict=True)]


def test_the_networks_own_chains_run_in_one_piece():
    device = tile_sizes.H200
    assert tile_sizes.chain_tiles((192, 160, 96), 2, device)[0].resident
    assert tile_sizes.chain_tiles((75, 192, 160, 96), 2, device)[0].resident
    assert tile_sizes.pair_tiles((192, 160, 96), 2, device)


# -- the dispatcher and the compiler ----------------------------------------------------------------------------


TRACE = """
import os, sys
sys.path.insert(0, {tests!r})
import torch, nin
from nin.ops.gpu import engine_plan
from support.fake_gpu import traced
planner, plans = engine_plan.plan_forward, []
engine_plan.plan_forward = lambda problem, choose: plans.append(problem) or planner(problem, choose)
x, w1, w2 = torch.empty(8, 192, 32, 32), torch.empty(160, 192, 1, 1), torch.empty(96, 160, 1, 1)
geometry = ([1, 1], [0, 0], [1, 1], ["relu", "relu"])
def forward(x, a, b):
    return torch.ops.nin.mlpconv(x, [a, b], [None, None], *geometry)
def backward(g, x, y, a, b):
    return torch.ops.nin.mlpconv_backward(g, x, y, [a, b], [None, None], *geometry, [True] * 3 + [False] * 2)
y = torch.empty(8, 96, 32, 32)
print(traced(forward, x, w1, w2))
print(len(plans))
print(traced(backward, y, x, y, w1, w2))
os.environ["NIN_GPU"] = "reference"
print(traced(forward, x, w1, w2))
"""


def run_python(code, **environment):
    """Run code in a process of its own, where Triton compiles and does not interpret."""
    import os

    given = {**os.environ, "TRITON_INTERPRET": "0", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=given, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_compiler_sees_the_kernels():
    output = run_python(TRACE.format(tests=str(Path(__file__).parent)), NIN_GPU="triton")
    first, plans, second, third = output.splitlines()
    assert "triton_kernel_wrapper" in first
    assert "mlpconv" not in first
    assert plans == "1"  # made while the operator is traced
    assert second.count("triton_kernel_wrapper") == 1
    assert second.count("convolution_backward") == 2  # float32: a weight's gradient each
    assert "triton_kernel_wrapper" not in third
    assert "convolution" in third


def test_backends_say_what_serves_cuda(monkeypatch):
    monkeypatch.setenv("NIN_GPU", "auto")
    line = nin.backends()["cuda"]
    assert "Triton" in line
    assert HAS_GPU or line.startswith("no GPU here")


@pytest.mark.skipif(not HAS_GPU, reason="no GPU")
@each_layout
def test_the_operator_takes_the_kernels_on_a_gpu(layout):
    layer = nin.MLPConv(192, (160, 96), activation="gelu").to("cuda", torch.bfloat16)
    x = torch.randn(8, 192, 16, 16, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=layout)
    x.requires_grad_()
    with torch.profiler.profile() as profile:
        layer(x).float().square().sum().backward()
    names = {event.name for event in profile.events()}
    assert any("chain_forward" in name for name in names)
    assert any("pair_gradients" in name for name in names)


@pytest.mark.skipif(not HAS_GPU, reason="no GPU")
def test_a_compiled_network_gives_the_same_on_a_gpu():
    torch.manual_seed(0)
    network = nin.models.nin_cifar(normalisation="weight_standardisation", dropout=0.0).to("cuda")
    x = torch.randn(64, 3, 32, 32, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        plain, compiled = network(x), torch.compile(network)(x)
    torch.testing.assert_close(compiled, plain, rtol=0.05, atol=0.05)


CHECK = Path(__file__).parents[1] / "benchmarks/gpu/compile_check.py"


@pytest.mark.slow
def test_main_kernels_compile_and_fit_hopper(tmp_path):
    out = tmp_path / "compiled.json"
    code = f"import sys; sys.argv[1:] = ['--case', 'chain 192→160', '--json', {str(out)!r}]; " \
        f"sys.path.insert(0, {str(CHECK.parent)!r}); import compile_check; sys.exit(compile_check.main())"  # fmt: skip
    run_python(code)
    kernels = json.loads(out.read_text())["kernels"]
    assert {k["kernel"] for k in kernels} == {"chain_forward", "pair_gradients"}
    for kernel in kernels:
        assert kernel["shared_bytes"] <= tile_sizes.H200.shared_bytes, kernel
        assert kernel["matrix_instructions"] > 0, kernel
        assert kernel["spilled_bytes"] <= 1024, kernel
