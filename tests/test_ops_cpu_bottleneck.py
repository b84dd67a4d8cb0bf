"""The compiled kernel of nin::inverted_bottleneck with every instruction set, against float64."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nin
from nin.ops.cpu import bottleneck as cpu_bottleneck
from nin.ops.cpu import dispatch, library
from support.bottlenecks import ACTIVATIONS, BLOCKS, CONVNEXT, GATES, Block, plain_block
from support.chains import LAYOUTS, each_layout

# Shapes that reach each way through the kernel: whole strips and chunks of lines, panels and their tails.
LARGE = {
    "one chunk": Block(24, 144, 24, (14, 14), residual=True),
    "lines kept from chunk to chunk": Block(8, 160, 12, (70, 61)),
    "lines kept with stride 2": Block(8, 160, 12, (71, 61), stride=(2, 2)),
    "lines kept with a gap between taps": Block(8, 160, 12, (72, 61), (3, 3), (5, 4), (2, 1)),
    "lines kept, dilated": Block(8, 160, 12, (70, 50), (5, 3), padding=(6, 2), dilation=(3, 2)),
    "no first layer": Block(150, None, 16, (60, 66), activation=("none", "relu6", "none")),
    "groups of lines in chunks": Block(24, 1030, 24, (29, 20), residual=True, images=1),
    "the same with stride 2": Block(9, 1030, 8, (61, 15), (5, 3), (2, 1), (2, 1), images=1),
    "the same with skipped lines": Block(9, 1030, 8, (61, 15), (2, 3), (3, 1), (0, 1), images=1),
    "squeezed, several images a round": Block(24, 144, 24, (7, 7), residual=True, images=9, squeezed=36),
    "squeezed, many lines": Block(8, 70, 12, (70, 61), residual=False, squeezed=20, stride=(2, 1)),
    "normed, lines kept from chunk to chunk": Block(
        *(40, 160, 40, (60, 61), (7, 7)),
        **CONVNEXT,
    ),
    "normed, large weights": Block(
        *(320, 900, 320, (7, 7), (7, 7)),
        **CONVNEXT,
    ),
}
# of float32: the other sets have the kernels of avx512
each_isa = pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"], indirect=True)
# of bfloat16
BF16_ISAS = ["portable", "avx2", "avx512", "avx512_bf16", "avx512_amx"]
each_block = pytest.mark.parametrize("block", [*BLOCKS.values(), *LARGE.values()], ids=[*BLOCKS, *LARGE])


@pytest.fixture(autouse=True)
def kernels():
    if dispatch.KERNELS is None:
        pytest.skip("NIN_CPU_ISA=reference, or installed without a compiler")


def errors(block, x, weights, biases):
    """Return the kernel's largest error, of the largest value of the block in float64."""
    result = nin.inverted_bottleneck(x, weights, biases, **block.options)
    exact = [None if b is None else b.double() for b in biases]
    expected = plain_block(x.double(), [w.double() for w in weights], exact, block.options)
    assert result.shape == expected.shape
    return ((result - expected).abs().max() / expected.abs().max().clamp_min(0.1)).item() if expected.numel() else 0.0


@each_isa
@each_block
@each_layout
def test_values(isa, block, layout):
    assert errors(block, *block.tensors(torch.float32, layout)) <= 2e-6


@each_isa
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(isa, name):
    block = Block(4, 70, 6, (9, 13), activation=(name,) * 3)
    x, weights, biases = block.tensors(torch.float32)
    assert errors(block, 3 * x, weights, biases) <= 4e-6


@each_isa
@pytest.mark.parametrize("name", GATES)
def test_gates(isa, name):
    block = Block(4, 70, 6, (9, 13), squeezed=18, excitation=("none", name))
    x, weights, biases = block.tensors(torch.float32)
    weights[2] *= 9  # factors over the whole range
    assert errors(block, x, weights, biases) <= 4e-6


@each_isa
@each_layout
def test_any_number_of_channels_and_columns(isa, layout):
    """Half vectors share registers in pairs of pixels; a depthwise line is cut into blocks of several widths."""
    for channels in range(1, 41):
        block = Block(channels, channels + 24, channels, (3, channels), residual=True, images=1)
        assert errors(block, *block.tensors(torch.float32, layout)) <= 2e-6, channels


@pytest.mark.parametrize("isa", BF16_ISAS, indirect=True)
@each_block
@each_layout
def test_bfloat16(isa, block, layout):
    """Half a unit in the last place for the result and the residual; where pairs are multiplied, for operands too."""
    roundings = 6 if isa in ("avx512_bf16", "avx512_amx") else 2
    assert errors(block, *block.tensors(torch.bfloat16, layout)) <= roundings / 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("isa", ["avx2", "avx512_bf16"], indirect=True)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_in_bfloat16(isa, name):
    for norm_eps in (None, 0.1):
        block = Block(4, 70, 6, (9, 13), activation=(name,) * 3, norm_eps=norm_eps)
        assert errors(block, *block.tensors(torch.bfloat16)) <= 3 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("isa", ["avx2", "avx512_bf16"], indirect=True)
@pytest.mark.parametrize("name", GATES)
def test_gates_in_bfloat16(isa, name):
    block = Block(4, 70, 6, (9, 13), squeezed=18, excitation=("none", name))
    assert errors(block, *block.tensors(torch.bfloat16)) <= 3 * torch.finfo(torch.bfloat16).eps


@each_isa
def test_a_norm_subtracts_the_mean_first(isa):
    """A mean a thousand times the deviation leaves three digits fewer, not six."""
    block = Block(40, 20, 5, (5, 6), (1, 1), padding=(0, 0), activation=("none",) * 3, norm_eps=0)
    x, weights, biases = block.tensors(torch.float32)
    weights[0].fill_(1.0)
    biases[0].fill_(1000.0)
    assert errors(block, x.round(decimals=3), weights, biases) <= 3e-4


@settings(max_examples=75, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_blocks(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    pairs = [(draw(1, 7), draw(1, 7)), (draw(1, 4), draw(1, 4)), (draw(0, 5), draw(0, 5)), (draw(1, 3), draw(1, 3))]
    kernel_size, _, padding, dilation = pairs
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel_size, strict=True)]
    size = tuple(draw(max(1, r - 2 * p), max(1, r - 2 * p) + 30) for r, p in zip(reach, padding, strict=True))
    hidden = data.draw(st.sampled_from([None, 1, 5, 16, 31, 33, 64, 150]))
    names = tuple(data.draw(st.sampled_from(list(ACTIVATIONS))) for _ in range(3))
    block = Block(draw(1, 40), hidden, draw(1, 40), size, *pairs, names, data.draw(st.booleans()), images=draw(1, 3))
    if data.draw(st.booleans()):
        excitation = data.draw(st.sampled_from(list(ACTIVATIONS))), data.draw(st.sampled_from(list(GATES)))
        block = dataclasses.replace(block, squeezed=data.draw(st.sampled_from([1, 4, 17, 40])), excitation=excitation)
    elif hidden and data.draw(st.booleans()):  # an epsilon that lets no error grow a hundredfold
        block = dataclasses.replace(block, norm_eps=data.draw(st.sampled_from([0.1, 1.0])))
    dtype, bound = data.draw(st.sampled_from([(torch.float32, 1e-5), (torch.bfloat16, 0.03)]))
    x, weights, biases = block.tensors(dtype, data.draw(st.sampled_from(list(LAYOUTS.values()))))
    assert errors(block, x, weights, biases) <= bound


@pytest.mark.parametrize("images", [1, 2, 5])
@pytest.mark.parametrize(
    "name",
    [
        *("3x3", "one chunk", "lines kept from chunk to chunk", "lines kept, dilated", "groups of lines in chunks"),
        *("no first layer", "squeezed", "squeezed, several images a round", "squeezed, many lines"),
        *("squeezed, no first layer", "normed, 7x7", "normed, lines kept from chunk to chunk"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_bits_for_any_number_of_threads(name, images, dtype):
    block = {**BLOCKS, **LARGE}[name]
    x, weights, biases = block.tensors(dtype)
    x = x[:1].repeat(images, 1, 1, 1) + torch.arange(images)[:, None, None, None]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for layout in LAYOUTS.values():
                with torch.inference_mode():
                    results.append(
                        nin.inverted_bottleneck(x.contiguous(memory_format=layout), weights, biases, **block.options)
                    )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
    alone = nin.inverted_bottleneck(x[:1], weights, biases, **block.options)
    assert torch.equal(results[0][:1], alone)


def test_views_and_expanded_tensors():
    block = BLOCKS["3x3"]
    x, weights, biases = block.tensors(torch.float32)
    wide = torch.randn(2, 9, 8, 30)
    views = {
        "every second column": wide.permute(0, 3, 1, 2)[:, :12:2],
        "transposed": x.transpose(2, 3),
        "expanded": x[:, :1].expand(-1, 6, -1, -1),
        "flipped batch": x[1:].expand(3, -1, -1, -1),
    }
    for name, view in views.items():
        assert errors(block, view, weights, biases) <= 2e-6, name
    strided = [torch.randn(2 * w.shape[0], *w.shape[1:])[::2].mul_(0.3) for w in weights]
    assert errors(block, x, strided, [b.repeat(2)[::2] for b in biases]) <= 2e-6


def test_a_written_weight_is_seen():
    block = BLOCKS["squeezed"]
    x, weights, biases = block.tensors(torch.float32)
    for place in range(5):
        for _ in range(3):  # the second call is kept, the third repeats it
            assert errors(block, x, weights, biases) <= 2e-6
        weights[place].data.mul_(-0.5)
        assert errors(block, x, weights, biases) <= 2e-6
        biases[place].numpy()[:] += 1
        assert errors(block, x, weights, biases) <= 2e-6


def test_the_kernel_serves_float32_and_bfloat16(monkeypatch):
    calls = []
    reference = cpu_bottleneck.reference.inverted_bottleneck
    monkeypatch.setattr(cpu_bottleneck.reference, "inverted_bottleneck", lambda *a: calls.append(a) or reference(*a))
    served = {torch.float32: 0, torch.bfloat16: 0, torch.float16: 1, torch.float64: 1}
    for dtype, name in itertools.product(served, ("3x3", "squeezed", "normed")):
        calls.clear()
        block = BLOCKS[name]
        x, weights, biases = block.tensors(dtype)
        nin.inverted_bottleneck(x, weights, biases, **block.options)
        torch.ops.nin.inverted_bottleneck(x, weights, biases, *block.op_options)
        assert len(calls) == 2 * served[dtype]


def test_a_repeated_call_computes_again():
    block = BLOCKS["stride 2"]
    x, weights, biases = block.tensors(torch.float32)
    first = nin.inverted_bottleneck(x, weights, biases, **block.options)
    second = nin.inverted_bottleneck(x, weights, biases, **block.options)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
    other = {**block.options, "activation": ("none", "none", "none")}
    assert not torch.equal(nin.inverted_bottleneck(x, weights, biases, **other), first)


def test_each_epsilon_is_a_call_of_its_own():
    block = BLOCKS["normed"]
    x, weights, biases = block.tensors(torch.float32)
    for eps in (0.01, 0.01, 1.0, 1.0, 0.0, None) * 2:
        options = {**block.options, "norm_eps": eps}
        if eps is None:  # three weights without a norm are 1×1, depthwise, 1×1
            with pytest.raises(ValueError, match="weight 0 must have shape"):
                nin.inverted_bottleneck(x, weights, biases, **options)
        else:
            assert errors(dataclasses.replace(block, norm_eps=eps), x, weights, biases) <= 1e-5


def test_with_and_without_residual_are_different_calls():
    block = BLOCKS["3x3"]
    x, weights, biases = block.tensors(torch.float32)
    options = {**block.options, "residual": False}
    plain = [nin.inverted_bottleneck(x, weights, biases, **options) for _ in range(2)]
    added = [nin.inverted_bottleneck(x, weights, biases, **block.options) for _ in range(2)]
    for a, b in zip(plain, added, strict=True):
        torch.testing.assert_close(a + x, b)


@each_isa
@each_layout
def test_nan_stays_where_it_belongs(isa, layout):
    block = Block(5, 20, 5, (9, 9), bias=False, activation=("relu6", "hardswish", "relu"), images=1)
    x, weights, biases = block.tensors(torch.float32, layout)
    x[0, 2, 4, 4] = float("nan")
    result = nin.inverted_bottleneck(x, weights, biases, **block.options)
    reached = torch.zeros(9, 9, dtype=torch.bool)
    reached[3:6, 3:6] = True
    assert torch.equal(result.isnan(), reached.expand_as(result))


@each_layout
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_weight_that_is_not_finite_meets_no_padding(value, layout):
    block = Block(20, None, 6, (9, 9), padding=(1, 1), activation=("none", "relu", "none"), images=1)
    x, weights, biases = block.tensors(torch.float32, layout)
    for _ in range(3):  # the second call is kept, the third repeats it
        assert errors(block, x, weights, biases) <= 2e-6
    weights[0][3, 0, 0, 0] = value
    result = nin.inverted_bottleneck(x, weights, biases, **block.options)
    torch.testing.assert_close(result, plain_block(x, weights, biases, block.options), equal_nan=True)
    weights[0][3, 0, 0, 0] = 1.0
    assert errors(block, x, weights, biases) <= 2e-6


def test_mismatched_tensors_of_a_direct_call_are_an_error():
    block = BLOCKS["3x3"]
    x, weights, biases = block.tensors(torch.float32)
    with pytest.raises(RuntimeError):
        torch.ops.nin.inverted_bottleneck(x[:, :4], weights, biases, *block.op_options)
    with pytest.raises(RuntimeError):
        torch.ops.nin.inverted_bottleneck(x, [weights[0], weights[1][:7], weights[2]], biases, *block.op_options)


def test_out_of_memory_is_an_error(monkeypatch):
    monkeypatch.setattr(library.loaded(), "nin_inverted_bottleneck", lambda *_: 1)
    block = Block(6, 22, 6, (5, 5))
    with pytest.raises(MemoryError, match="not enough memory for its scratch"):
        nin.inverted_bottleneck(*block.tensors(torch.float32), **block.options)
