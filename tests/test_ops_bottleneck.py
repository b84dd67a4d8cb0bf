"""nin::inverted_bottleneck against PyTorch's convolutions in float64, and what PyTorch does with an operator."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import nin
from nin.exporters import portable_program
from support.bottlenecks import ACTIVATIONS, BLOCKS, GATES, Block, plain_block
from support.chains import LAYOUTS, each_layout, random_grads, tensors_of

each_block = pytest.mark.parametrize("block", list(BLOCKS.values()), ids=BLOCKS)
# opcheck copies tensors that are results and looks for their gradients
opcheck_warns = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def apply(block, x, parameters):
    """Return the operator's result for the parameters in one list: weights, then biases."""
    biases = parameters[block.count :] if block.bias else [None] * block.count
    return nin.inverted_bottleneck(x, parameters[: block.count], biases, **block.options)


@each_block
@each_layout
def test_equals_conv2d_forward_and_backward(block, layout):
    x, weights, biases = block.tensors(layout=layout)
    parameters = [t.requires_grad_() for t in tensors_of(x, weights, biases)]
    expected = plain_block(x, weights, biases, block.options)
    with torch.no_grad():
        result = nin.inverted_bottleneck(x, weights, biases, **block.options)
    torch.testing.assert_close(result, expected.detach(), rtol=1e-13, atol=1e-13)
    result = nin.inverted_bottleneck(x, weights, biases, **block.options)
    torch.testing.assert_close(
        random_grads(parameters, result), random_grads(parameters, expected), rtol=1e-11, atol=1e-11
    )


@each_layout
@pytest.mark.parametrize(
    "name",
    ["3x3", "stride 2", "no first layer", "dilated", "squeezed", "squeezed, no first layer", "normed", "normed, 7x7"],
)
def test_float32_trains_with_the_right_gradients(name, layout):
    block = BLOCKS[name]
    x, weights, biases = block.tensors(torch.float32, layout)
    parameters = [t.requires_grad_() for t in tensors_of(x, weights, biases)]
    exact = [t.detach().double().requires_grad_() for t in parameters]
    grads = random_grads(parameters, apply(block, parameters[0], parameters[1:]))
    for grad, want in zip(grads, random_grads(exact, apply(block, exact[0], exact[1:])), strict=True):
        assert (grad.double() - want).abs().max() <= 2e-6 * want.abs().max()


@pytest.mark.parametrize("frozen", [(0,), (1, 4), (1, 2, 4, 5), (3, 6), (0, 1, 2, 3, 4, 5)])
def test_gradients_of_some(frozen):
    x, weights, biases = BLOCKS["3x3"].tensors()
    tensors = tensors_of(x, weights, biases)
    wanted = [t.requires_grad_() for i, t in enumerate(tensors) if i not in frozen]
    expected = plain_block(x, weights, biases, BLOCKS["3x3"].options)
    result = nin.inverted_bottleneck(x, weights, biases, **BLOCKS["3x3"].options)
    torch.testing.assert_close(random_grads(wanted, result), random_grads(wanted, expected))


SOME_OF_SQUEEZED = [(0,), (3, 8), (4, 9), (1, 2, 3, 6, 7, 8), (0, 1, 2, 3, 4, 6, 7, 8, 9, 10)]
SOME_OF_NORMED = [(0,), (1, 4), (2, 3, 5, 6), (0, 1, 4), (0, 1, 2, 4, 5)]


@pytest.mark.parametrize(
    ("name", "frozen"),
    [*(("squeezed", some) for some in SOME_OF_SQUEEZED), *(("normed", some) for some in SOME_OF_NORMED)],
)
def test_gradients_of_some_in_blocks_with_more_inside(name, frozen):
    block = BLOCKS[name]
    x, weights, biases = block.tensors()
    wanted = [t.requires_grad_() for i, t in enumerate(tensors_of(x, weights, biases)) if i not in frozen]
    expected = plain_block(x, weights, biases, block.options)
    result = nin.inverted_bottleneck(x, weights, biases, **block.options)
    torch.testing.assert_close(random_grads(wanted, result), random_grads(wanted, expected))


GRADCHECKED = {name: Block(2, 4, 2, (4, 3), activation=(name,) * 3, residual=True, images=1) for name in ACTIVATIONS}
GRADCHECKED |= {
    gate: Block(2, 3, 2, (3, 3), activation=("silu",) * 3, images=2, squeezed=2, excitation=("silu", gate))
    for gate in GATES
}
GRADCHECKED["norm"] = Block(3, 4, 3, (4, 3), activation=("gelu", "silu", "none"), residual=True, images=1, norm_eps=0.1)


@pytest.mark.parametrize("block", GRADCHECKED.values(), ids=GRADCHECKED)
def test_gradcheck(block):
    x, weights, biases = block.tensors()
    parameters = [t.requires_grad_() for t in tensors_of(x, weights, biases)]
    call = functools.partial(lambda x, *parameters: apply(block, x, list(parameters)))
    assert torch.autograd.gradcheck(call, parameters, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, parameters, fast_mode=True)


@pytest.mark.parametrize(("squeezed", "norm_eps"), [(None, None), (2, None), (None, 0.1)])
def test_forward_mode_and_batched_gradients(squeezed, norm_eps):
    names = {"activation": ("silu", "hardswish", "none"), "excitation": ("silu", "hardsigmoid")}
    block = Block(2, 3, 2, (3, 3), images=1, squeezed=squeezed, norm_eps=norm_eps, **names)
    x, weights, biases = block.tensors()
    parameters = [t.requires_grad_() for t in tensors_of(x, weights, biases)]
    call = functools.partial(lambda x, *parameters: apply(block, x, list(parameters)))
    assert torch.autograd.gradcheck(
        call,
        parameters,
        fast_mode=True,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@opcheck_warns
@pytest.mark.parametrize(
    ("name", "dtype", "layout", "trains"),
    [  # the kernel and the reference: seconds each
        ("3x3", torch.float32, "nhwc", True),
        ("3x3", torch.bfloat16, "nchw", False),
        ("squeezed", torch.float32, "nchw", True),
        ("normed", torch.float32, "nhwc", True),
    ],
)
def test_opcheck(name, dtype, layout, trains):
    block = BLOCKS[name]
    x, weights, biases = block.tensors(dtype, LAYOUTS[layout])
    for t in tensors_of(x, weights, biases):
        t.requires_grad_(trains)
    # torch's own check compares gradients with float32's tolerance, which half a dozen bf16 roundings exceed
    tolerance = {"rtol": 32 * torch.finfo(dtype).eps, "atol": 32 * torch.finfo(dtype).eps}
    torch.library.opcheck(
        torch.ops.nin.inverted_bottleneck.default, (x, weights, biases, *block.op_options), **tolerance
    )


@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["stride 2", "squeezed, stride 2", "normed, stride 2"])
def test_layout_and_dtype_of_the_result(name, dtype, layout):
    block = BLOCKS[name]
    x, weights, biases = block.tensors(dtype, layout)
    result = nin.inverted_bottleneck(x, weights, biases, **block.options)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=layout)
    exact = plain_block(x.double(), [w.double() for w in weights], [b.double() for b in biases], block.options)
    assert (result.double() - exact).abs().max() <= 16 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("name", ["3x3", "squeezed", "normed"])
def test_autocast_casts_as_conv2d_does(name):
    block = BLOCKS[name]
    x, weights, biases = block.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = nin.inverted_bottleneck(x, weights, biases, **block.options)
    x, weights, biases = x.bfloat16(), [w.bfloat16() for w in weights], [b.bfloat16() for b in biases]
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, nin.inverted_bottleneck(x, weights, biases, **block.options))


@pytest.mark.parametrize("name", ["3x3", "squeezed", "normed"])
def test_vmap_and_grad_of_torch_func(name):
    block = BLOCKS[name]
    x, weights, biases = block.tensors(torch.float32)
    images = torch.stack([x, x.flip(0), 2 * x], 1)  # (N, 3, C, H, W)
    call = functools.partial(nin.inverted_bottleneck, weights=weights, biases=biases, **block.options)
    mapped = torch.vmap(call, in_dims=1, out_dims=1)(images)
    torch.testing.assert_close(mapped, torch.stack([call(part) for part in images.unbind(1)], 1))
    many = torch.stack([weights[0], 2 * weights[0]])
    mapped = torch.vmap(lambda w: nin.inverted_bottleneck(x, [w, *weights[1:]], biases, **block.options))(many)
    torch.testing.assert_close(
        mapped,
        torch.stack([nin.inverted_bottleneck(x, [w, *weights[1:]], biases, **block.options) for w in many]),
        rtol=1e-4,
        atol=1e-5,
    )
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(
        torch.func.grad(lambda z: call(z).square().sum())(x),
        torch.autograd.grad(call(leaf).square().sum(), leaf)[0],
        rtol=1e-4,
        atol=1e-4,
    )


class Module(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block
        _, weights, biases = block.tensors(torch.float32)
        self.parameters_ = nn.ParameterList([*weights, *biases])

    def forward(self, x):
        return apply(self.block, x, list(self.parameters_))


@pytest.mark.parametrize("name", ["3x3", "squeezed", "normed"])
def test_compile_export_and_jit_trace(name):
    model = Module(BLOCKS[name])
    x = BLOCKS[name].tensors(torch.float32)[0]
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    result = compiled(x)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(
        random_grads([*model.parameters()], result), random_grads([*model.parameters()], expected), rtol=1e-4, atol=1e-5
    )
    program = torch.export.export(model, (x,))
    assert "nin.inverted_bottleneck" in program.graph_module.code
    torch.testing.assert_close(program.module()(x), expected)
    traced = torch.jit.trace(model, (x,))
    torch.testing.assert_close(traced(x[:1]), model(x[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["3x3", "squeezed", "normed"])
def test_an_exported_program_has_pytorchs_operators_only(name):
    model = Module(BLOCKS[name]).eval()
    x = BLOCKS[name].tensors(torch.float32)[0]
    program = portable_program(model, x)
    assert "nin." not in program.graph_module.code
    torch.testing.assert_close(program.module()(x), model(x))


def test_flops_are_twice_the_macs():
    block = Block(3, 8, 6, (10, 10), stride=(2, 2))
    x, weights, biases = block.tensors()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        nin.inverted_bottleneck(x, weights, biases, **block.options)
    assert counter.get_total_flops() == 2 * 2 * (100 * 3 * 8 + 25 * (8 * 9 + 8 * 6))


def test_flops_with_squeeze_and_excitation():
    block = Block(3, 8, 6, (10, 10), stride=(2, 2), squeezed=2)
    x, weights, biases = block.tensors()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        nin.inverted_bottleneck(x, weights, biases, **block.options)
    assert counter.get_total_flops() == 2 * 2 * (100 * 3 * 8 + 2 * 8 * 2 + 25 * (8 * 9 + 8 * 6))


def test_flops_with_a_norm():
    block = Block(3, 8, 6, (10, 10), stride=(2, 2), norm_eps=0.1)
    x, weights, biases = block.tensors()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        nin.inverted_bottleneck(x, weights, biases, **block.options)
    assert counter.get_total_flops() == 2 * 2 * 25 * (3 * 9 + 3 * 8 + 8 * 6)


def test_one_activation_with_a_norm_is_for_the_layer_behind_it():
    block = BLOCKS["normed"]
    x, weights, biases = block.tensors()
    result = nin.inverted_bottleneck(x, weights, biases, padding=1, activation="silu", norm_eps=0)
    names = {"activation": ("none", "silu", "none"), "residual": False, "norm_eps": 0}
    torch.testing.assert_close(result, plain_block(x, weights, biases, {**block.options, **names}))


def test_one_activation_is_for_all_but_the_last_and_squeeze_and_excitation():
    x, weights, biases = BLOCKS["squeezed"].tensors()
    result = nin.inverted_bottleneck(x, weights, biases, padding=1, activation="silu")
    names = {"activation": ("silu", "silu", "relu", "sigmoid", "none"), "residual": False}
    torch.testing.assert_close(result, plain_block(x, weights, biases, {**BLOCKS["squeezed"].options, **names}))


def test_one_activation_is_for_all_but_the_last():
    x, weights, biases = BLOCKS["3x3"].tensors()
    result = nin.inverted_bottleneck(x, weights, biases, padding=1, activation="silu")
    names = {"activation": ("silu", "silu", "none"), "residual": False}
    expected = plain_block(x, weights, biases, {**BLOCKS["3x3"].options, **names})
    torch.testing.assert_close(result, expected)
    assert torch.equal(
        nin.inverted_bottleneck(x, weights, biases, padding=1, activation=("silu", "silu", None)), result
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x, w[:1], b[:1], {}), "weights and biases must be two to five each, got 1 and 1"),
        (lambda x, w, b: (x, w, b[:2], {}), "weights and biases must be two to five each, got 3 and 2"),
        (
            lambda x, w, b: (x[:, :4], w, b, {}),
            r"weight 0 must have shape \(C_out, 4, 1, 1\), got \(20, 6, 1, 1\): the in",
        ),
        (
            lambda x, w, b: (x, [w[0], w[1][:10], w[2]], b, {}),
            r"weight 1 must have shape \(20, 1, kH, kW\), got \(10, 1, 3, 3\): the layer before gives 20 channels",
        ),
        (lambda x, w, b: (x, w, [b[0], b[0][:3], b[2]], {}), r"bias 1 must have shape \(20,\), got \(3,\)"),
        (
            lambda x, w, b: (x, w, b, {"activation": "mish"}),
            "activation must be one of none, relu, gelu, silu, relu6",
        ),
        (lambda x, w, b: (x, w, b, {"activation": ("relu", "relu")}), "one for each of the 3 layers, got 2"),
        (lambda x, w, b: (x, w, b, {"activation": 3}), "a name, or one for each of the 3 layers, got 3"),
        (lambda x, w, b: (x, w, b, {"activation": ["relu", ["relu"], None]}), r"one of none, .*, got \['relu'\]"),
        (lambda x, w, b: (x, w, b, {"residual": "no"}), "residual must be True or False, got 'no'"),
        (lambda x, w, b: (x, w, b, {"residual": 1}), "residual must be True or False, got 1"),
        (lambda x, w, b: (x, w, b, {"stride": True}), "stride must be a whole number of at least 1, .* got True"),
        (lambda x, w, b: (x, w, b, {"dilation": (1, True)}), r"dilation must be .* got \(1, True\)"),
        (lambda x, w, b: (x, w, b, {"residual": True, "stride": 2}), "residual needs a result of the shape of x, got"),
        (lambda x, w, b: (x[:, :, :1, :1], w, b, {"padding": 0}), "padded height of at least 3"),
        (lambda x, w, b: (x, [w[0].float(), *w[1:]], b, {}), "weight 0 must be torch.float64 on cpu as x is"),
        (lambda x, w, b: (x[0], w, b, {}), r"x must have shape \(N, C, H, W\)"),
        (lambda x, w, b: (x.int(), w, b, {}), "x must have a floating dtype"),
    ],
)
def test_one_line_for_each_mistake(change, message):
    x, weights, biases, options = change(*BLOCKS["3x3"].tensors())
    with pytest.raises(ValueError, match=message):
        nin.inverted_bottleneck(x, weights, biases, **{"padding": 1, **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w, b: (w, b, {"activation": ("relu",) * 5}),
            "activation of the second layer of squeeze-and-excitation must be one of sigmoid, hardsigmoid, got 'relu'",
        ),
        (
            lambda w, b: (w, b, {"activation": ("relu", "sigmoid", "relu", "sigmoid", None)}),
            "must be one of none, relu",
        ),
        (
            lambda w, b: ([*w[:3], w[3][:7], w[4]], b, {}),
            r"weight 3 must have shape \(20, 5, 1, 1\), got \(7, 5, 1, 1\): the layer before gives 5 channels",
        ),
        (
            lambda w, b: ([*w[:2], w[2][:, :7], *w[3:]], b, {}),
            r"weight 2 must have shape \(C_out, 20, 1, 1\), got \(5, 7, 1, 1\)",
        ),
    ],
)
def test_one_line_for_each_mistake_with_squeeze_and_excitation(change, message):
    x, weights, biases = BLOCKS["squeezed"].tensors()
    weights, biases, options = change(weights, biases)
    with pytest.raises(ValueError, match=message):
        nin.inverted_bottleneck(x, weights, biases, **{"padding": 1, **options})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w, b: (w[:2], b[:2], {}),
            r"weights must be three with norm_eps \(depthwise, .*\), got 2",
        ),
        (lambda w, b: (w, b, {"norm_eps": -1e-6}), "norm_eps must be None or a number of at least 0, got -1e-06"),
        (lambda w, b: (w, b, {"norm_eps": float("nan")}), "norm_eps must be None or a number of at least 0, got nan"),
        (lambda w, b: (w, b, {"norm_eps": "1e-6"}), "norm_eps must be None or a number of at least 0, got '1e-6'"),
        (lambda w, b: (w, b, {"norm_eps": True}), "norm_eps must be None or a number of at least 0, got True"),
        (
            lambda w, b: ([w[1], w[0], w[2]], [b[1], b[0], b[2]], {}),
            r"weight 0 must have shape \(6, 1, kH, kW\), got \(20, 6, 1, 1\): the input has 6 channels",
        ),
        (lambda w, b: (w, b, {"activation": ("gelu", "none")}), "one for each of the 3 layers, got 2"),
    ],
)
def test_one_line_for_each_mistake_with_a_norm(change, message):
    x, weights, biases = BLOCKS["normed"].tensors()
    weights, biases, options = change(weights, biases)
    with pytest.raises(ValueError, match=message):
        nin.inverted_bottleneck(x, weights, biases, **{"padding": 1, "norm_eps": 1e-6, **options})


def test_what_is_no_tensor():
    x, weights, biases = BLOCKS["3x3"].tensors()
    with pytest.raises(TypeError, match="weight 2 must be a tensor, got list"):
        nin.inverted_bottleneck(x, [*weights[:2], [1]], biases)
    with pytest.raises(TypeError, match=r"weights must be a list or tuple, one tensor for each layer, got NoneType"):
        nin.inverted_bottleneck(x, None, biases)
    with pytest.raises(
        TypeError, match=r"biases must be a list or tuple, one for each layer, each a tensor or None, got"
    ):
        nin.inverted_bottleneck(x, (weight for weight in weights), 0)
