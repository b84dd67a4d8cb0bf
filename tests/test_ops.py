"""nin::mlpconv against chains of F.conv2d, and against everything in PyTorch that looks at an operator."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import nin
from nin.ops import ACTIVATIONS
from nin.ops.cpu import library
from support.chains import (
    CHAINS,
    LAYOUTS,
    PLAIN,
    Chain,
    conv_chain,
    each_chain,
    each_dtype,
    each_layout,
    error_bound,
    random_grads,
    tensors_of,
)

# -- values -----------------------------------------------------------------------------------------------------


@each_chain
@each_layout
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_conv2d_forward_and_backward(chain, layout, activation):
    x, weights, biases = chain.tensors(layout=layout)
    parameters = [t.requires_grad_() for t in tensors_of(x, weights, biases)]
    expected = conv_chain(x, weights, biases, [activation] * len(weights), chain.geometry)
    with torch.no_grad():
        torch.testing.assert_close(
            nin.mlpconv(x, weights, biases, activation=activation, **chain.geometry), expected, rtol=1e-13, atol=1e-13
        )
    result = nin.mlpconv(x, weights, biases, activation=activation, **chain.geometry)
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)
    grads = random_grads(parameters, result)
    torch.testing.assert_close(grads, random_grads(parameters, expected), rtol=1e-11, atol=1e-11)
    assert all(g.shape == p.shape for g, p in zip(grads, parameters, strict=True))


def test_one_activation_per_layer():
    x, weights, biases = Chain((3, 4, 5, 6, 7)).tensors()
    result = nin.mlpconv(x, weights, biases, activation=("relu", None, "gelu", "silu"))
    torch.testing.assert_close(result, conv_chain(x, weights, biases, ("relu", "none", "gelu", "silu"), {}))


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_conv1x1_is_a_chain_of_one(activation):
    x, (weight,), (bias,) = Chain((5, 7)).tensors()
    expected = PLAIN[activation or "none"](F.conv2d(x, weight, bias, 2))
    torch.testing.assert_close(nin.conv1x1(x, weight, bias, stride=2, activation=activation), expected)
    torch.testing.assert_close(nin.conv1x1(x, weight), F.conv2d(x, weight))


@each_chain
@each_layout
@each_dtype
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_every_dtype_is_within_its_bound(chain, layout, dtype, activation):
    arguments = chain.tensors(dtype, layout)
    result = nin.mlpconv(*arguments, activation=activation, **chain.geometry)
    assert result.dtype == dtype
    x, weights, biases = arguments
    exact = x.double(), [w.double() for w in weights], [None if b is None else b.double() for b in biases]
    names = [activation] * len(weights)
    error = (result.double() - conv_chain(*exact, names, chain.geometry)).abs()
    assert (error <= error_bound(*exact, names, chain.geometry, dtype)).all()


@each_dtype
@each_layout
def test_gradients_in_every_dtype(dtype, layout):
    chain = CHAINS["5x5 and three"]
    x, weights, biases = chain.tensors(dtype, layout)
    parameters = [t.requires_grad_() for t in tensors_of(x, weights, biases)]
    grads = random_grads(parameters, nin.mlpconv(x, weights, biases, activation="silu", **chain.geometry))
    exact = [t.detach().double().requires_grad_() for t in parameters]
    count = len(weights)
    expected = random_grads(
        exact, conv_chain(exact[0], exact[1 : 1 + count], exact[1 + count :], ["silu"] * count, chain.geometry)
    )
    for grad, want, parameter in zip(grads, expected, parameters, strict=True):
        assert grad.dtype == dtype
        assert grad.shape == parameter.shape
        # a dozen roundings on the way through four layers, measured against the largest entry
        assert (grad.double() - want).abs().max() <= 12 * torch.finfo(dtype).eps * want.abs().max()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_shapes(data):
    def small(low, high):
        return data.draw(st.integers(low, high))

    chain = Chain(
        tuple(small(1, 5) for _ in range(small(2, 4))),
        (small(1, 3), small(1, 3)),
        (small(1, 3), small(1, 3)),
        (small(0, 2), small(0, 2)),
        (small(1, 2), small(1, 2)),
        bias=data.draw(st.booleans()),
    )
    reach = [d * (k - 1) + 1 for d, k in zip(chain.dilation, chain.kernel_size, strict=True)]
    size = tuple(small(max(1, r - 2 * p), 7) for r, p in zip(reach, chain.padding, strict=True))
    layout = data.draw(st.sampled_from(list(LAYOUTS.values())))
    names = [data.draw(st.sampled_from(list(ACTIVATIONS))) for _ in chain.widths[1:]]
    x, weights, biases = chain.tensors(layout=layout, images=small(0, 3), size=size)
    parameters = [t.requires_grad_() for t in tensors_of(x, weights, biases)]
    result = nin.mlpconv(x, weights, biases, activation=names, **chain.geometry)
    expected = conv_chain(x, weights, biases, names, chain.geometry)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        random_grads(parameters, result), random_grads(parameters, expected), rtol=1e-10, atol=1e-10
    )


# -- shapes and layouts that people forget ----------------------------------------------------------------------


@each_layout
@pytest.mark.parametrize(("images", "size"), [(0, (5, 5)), (3, (1, 1)), (1, (1, 7)), (1, (7, 1))])
def test_small_and_empty_images(images, size, layout):
    chain = CHAINS["no bias"]
    x, weights, biases = chain.tensors(layout=layout, images=images, size=size)
    parameters = [t.requires_grad_() for t in tensors_of(x, weights, biases)]
    result = nin.mlpconv(x, weights, biases, padding=1)
    expected = conv_chain(x, weights, biases, ["relu"] * 2, {"padding": 1})
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(random_grads(parameters, result), random_grads(parameters, expected))


INPUTS = {
    "every second row": lambda x: x[:, :, ::2],
    "every second channel": lambda x: x[:, ::2],
    "a window": lambda x: x[1:, :, 2:7, 3:6],
    "transposed": lambda x: x.transpose(2, 3),
    "one image, many times": lambda x: x[:1].expand(4, -1, -1, -1),
    "one channel, many times": lambda x: x[:, :1].expand(-1, 6, -1, -1),
    "one pixel, everywhere": lambda x: x[:, :, :1, :1].expand(-1, -1, 5, 4),
}


@each_layout
@pytest.mark.parametrize("view", list(INPUTS.values()), ids=INPUTS)
def test_inputs_that_are_views(view, layout):
    whole = torch.randn(3, 6, 9, 8, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    x = view(whole)
    _, weights, biases = Chain((x.shape[1], 4, 3), (3, 3)).tensors()
    result, expected = nin.mlpconv(x, weights, biases), conv_chain(x, weights, biases, ["relu"] * 2, {})
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(random_grads([whole], result), random_grads([whole], expected))


def test_parameters_that_are_views():
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    store = torch.randn(9, 12, 2, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = store[::2, ::3, :1, 1:], store[:5, 0, 0, 0]
    assert not weight.is_contiguous()
    result, expected = nin.conv1x1(x, weight, bias), F.conv2d(x, weight, bias)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(random_grads([store], result), random_grads([store], expected))


def test_tensors_that_share_memory():
    store = torch.randn(6, 6, 6, 6, dtype=torch.float64, requires_grad=True)
    weight, bias = store[:, :, :1, :1], store[0, 0, 0]
    result = nin.mlpconv(store, (weight, weight, weight), (bias, bias, None))
    expected = conv_chain(store, (weight, weight, weight), (bias, bias, None), ["relu"] * 3, {})
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(random_grads([store], result), random_grads([store], expected))


@each_layout
@each_chain
def test_the_result_has_the_layout_of_the_input(chain, layout):
    x, weights, biases = chain.tensors(layout=layout)
    x.requires_grad_()
    result = nin.mlpconv(x, weights, biases, **chain.geometry)
    (grad,) = torch.autograd.grad(result.sum(), x)
    for t in (result, nin.mlpconv(x.detach(), weights, biases, **chain.geometry), grad):
        assert t.is_contiguous(memory_format=layout)


@each_layout
def test_a_hidden_layer_of_one_channel_keeps_the_layout(layout):
    x, weights, biases = Chain((3, 1, 8), (3, 3)).tensors(layout=layout)
    weights[0].requires_grad_()
    assert nin.mlpconv(x, weights, biases).is_contiguous(memory_format=layout)


def mask_name(needs):
    return "".join("nY"[needed] for needed in needs)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=5)), ids=mask_name)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_only_the_gradients_that_are_wanted(needs, kernel_size):
    chain = Chain((3, 5, 4), (kernel_size, kernel_size))
    x, weights, biases = chain.tensors()
    everything = tensors_of(x, weights, biases)
    wanted = [t.requires_grad_() for t, needed in zip(everything, needs, strict=True) if needed]
    result = nin.mlpconv(x, weights, biases, activation="gelu")
    assert result.requires_grad == any(needs)
    if wanted:
        expected = conv_chain(x, weights, biases, ["gelu"] * 2, {})
        torch.testing.assert_close(random_grads(wanted, result), random_grads(wanted, expected))


# -- derivatives ------------------------------------------------------------------------------------------------


@each_layout
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["1x1 1x1", "no bias", "3x2 uneven"])
def test_gradcheck(name, activation, layout):
    chain = dataclasses.replace(CHAINS[name], widths=tuple(min(w, 3) for w in CHAINS[name].widths))
    x, weights, biases = chain.tensors(layout=layout, images=1, size=(5, 4))
    count = len(weights)

    def call(x, *parameters):
        bs = parameters[count:] if chain.bias else [None] * count
        return nin.mlpconv(x, parameters[:count], bs, activation=activation, **chain.geometry)

    parameters = [t.requires_grad_() for t in tensors_of(x, weights, biases)]
    assert torch.autograd.gradcheck(call, parameters, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, parameters, fast_mode=True)


# -- PyTorch's ways to look at an operator -----------------------------------------------------------------------


# opcheck copies tensors that are results and looks for their gradients
opcheck_warns = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def op_arguments(chain, dtype, layout, requires_grad):
    x, weights, biases = chain.tensors(dtype, layout)
    for t in tensors_of(x, weights, biases):
        t.requires_grad_(requires_grad)
    return x, weights, biases, chain.stride, chain.padding, chain.dilation, ["silu"] * len(weights)


@opcheck_warns
@each_dtype
@each_layout
@pytest.mark.parametrize("requires_grad", [False, True], ids=["frozen", "trains"])
def test_opcheck(dtype, layout, requires_grad):
    arguments = op_arguments(CHAINS["no bias"], dtype, layout, requires_grad)
    # torch's own check compares gradients with float32's tolerance, which half a dozen bf16 roundings exceed
    tolerance = {"rtol": 32 * torch.finfo(dtype).eps, "atol": 32 * torch.finfo(dtype).eps}
    torch.library.opcheck(torch.ops.nin.mlpconv.default, arguments, **tolerance)


@opcheck_warns
@each_layout
@pytest.mark.parametrize("name", ["1x1 stride", "3x2 uneven", "5x5 and three"])
def test_opcheck_of_other_chains(name, layout):
    torch.library.opcheck(torch.ops.nin.mlpconv.default, op_arguments(CHAINS[name], torch.float64, layout, True))


@each_dtype
@each_layout
@pytest.mark.parametrize("needs", [[True] * 5, [False, True, False, False, True]], ids=["all", "some"])
def test_opcheck_of_the_backward_op(dtype, layout, needs):
    x, weights, biases, *geometry = op_arguments(CHAINS["1x1 1x1"], dtype, layout, False)
    y = torch.ops.nin.mlpconv(x, weights, biases, *geometry)
    arguments = (torch.ones_like(y), x, y, weights, biases, *geometry, needs)
    utils = ("test_schema", "test_faketensor")  # autograd derives the reference instead, see test_gradcheck
    torch.library.opcheck(torch.ops.nin.mlpconv_backward.default, arguments, test_utils=utils)


def test_flops_are_twice_the_macs_and_counted_once():
    x, weights, biases = Chain((3, 8, 6), (3, 3), padding=(1, 1)).tensors(images=2, size=(10, 10))
    pixels, first, second = 2 * 10 * 10, 3 * 8 * 9, 8 * 6
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        nin.mlpconv(x, weights, biases, padding=1)
    assert counter.get_total_flops() == 2 * pixels * (first + second)
    with FlopCounterMode(display=False) as counter:
        F.conv2d(F.conv2d(x, weights[0], padding=1), weights[1])
    assert counter.get_total_flops() == 2 * pixels * (first + second)


@pytest.mark.parametrize(
    ("needs", "backward_macs"),
    [
        ("x w0 w1", 2 * 3 * 8 + 2 * 8 * 6),  # each layer: once for its weight, once for its input
        ("w0 w1", 3 * 8 + 2 * 8 * 6),
        ("w1", 8 * 6),
        ("x", 3 * 8 + 8 * 6),
        ("b0", 8 * 6),
        ("b1", 0),
    ],
)
def test_flops_of_the_backward_pass(needs, backward_macs):
    x, weights, biases = Chain((3, 8, 6)).tensors(images=2, size=(10, 10))
    names = dict(zip(("x", "w0", "w1", "b0", "b1"), tensors_of(x, weights, biases), strict=True))
    for name in needs.split():
        names[name].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        nin.mlpconv(x, weights, biases).sum().backward()
    assert counter.get_total_flops() == 2 * 200 * (3 * 8 + 8 * 6 + backward_macs)


@each_layout
def test_autocast_equals_casting_by_hand(layout):
    chain = CHAINS["5x5 and three"]
    x, weights, biases = chain.tensors(torch.float32, layout)
    parameters = [t.requires_grad_() for t in tensors_of(x, weights, biases)]
    with torch.autocast("cpu", torch.bfloat16):
        result = nin.mlpconv(x, weights, biases, **chain.geometry)
        mixed = nin.conv1x1(x.bfloat16(), torch.ones(2, 3, 1, 1))
    assert result.dtype == mixed.dtype == torch.bfloat16
    by_hand = [t.bfloat16() for t in parameters]
    count = len(weights)
    expected = nin.mlpconv(by_hand[0], by_hand[1 : 1 + count], by_hand[1 + count :], **chain.geometry)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    grads = random_grads(parameters, result)
    assert {g.dtype for g in grads} == {torch.float32}
    torch.testing.assert_close(grads, random_grads(parameters, expected), rtol=0, atol=0)


def test_inference_mode():
    x, weights, biases = CHAINS["no bias"].tensors()
    expected = nin.mlpconv(x, weights, biases)
    with torch.inference_mode():
        torch.testing.assert_close(nin.mlpconv(x, weights, biases), expected, rtol=0, atol=0)


class TwoChains(nn.Module):
    """A network of one k×k chain and one 1×1 layer."""

    def __init__(self):
        super().__init__()
        self.chain = nin.MLPConv(3, (8, 6), kernel_size=3, padding=1, activation="gelu")
        self.last = nin.Conv1x1(6, 4)

    def forward(self, x):
        return self.last(self.chain(x)).mean((2, 3))


def check_compiled(backend, layout, dtype):
    torch._dynamo.reset()  # there is a limit to how often the same lines are compiled anew
    model = TwoChains().to(dtype)
    compiled_model = torch.compile(model, fullgraph=True, backend=backend)
    for images in (2, 5):
        x = torch.randn(images, 3, 7, 6).to(dtype).contiguous(memory_format=layout).requires_grad_()
        tensors = [x, *model.parameters()]
        expected, result = model(x), compiled_model(x)
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(random_grads(tensors, result), random_grads(tensors, expected))
        with torch.no_grad():
            torch.testing.assert_close(compiled_model(x), expected)


# float64 runs the reference, the others the kernels of the device
each_kernel = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])


@each_layout
@each_kernel
def test_compile_in_one_graph(layout, dtype):
    check_compiled("aot_eager", layout, dtype)


@pytest.mark.slow
@each_layout
@each_kernel
def test_compile_with_inductor(layout, dtype):
    check_compiled("inductor", layout, dtype)


def test_export_keeps_the_op_and_a_free_batch():
    model = TwoChains()
    exported = torch.export.export(model, (torch.randn(2, 3, 7, 6),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    targets = [node.target for node in exported.graph.nodes]
    assert torch.ops.nin.mlpconv.default in targets
    assert not any("conv2d" in str(target) for target in targets)
    for images in (1, 5):
        x = torch.randn(images, 3, 7, 6)
        torch.testing.assert_close(exported.module()(x), model(x))


def _train_one_step(rank, processes, folder):
    """Write the averaged gradients of two images on each process; runs in a process of its own."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes
    )
    torch.manual_seed(0)
    model, x = TwoChains(), torch.randn(4, 3, 7, 6)
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    torch.save([p.grad for p in model.parameters()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_get_the_gradients_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(_train_one_step, (2, str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    model, x = TwoChains(), torch.randn(4, 3, 7, 6)
    model(x).square().mean().backward()
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), [p.grad for p in model.parameters()])


# -- arguments --------------------------------------------------------------------------------------------------


def call(x=None, weights=None, biases=None, **options):
    """A call that is right but for what the test changes."""
    x = torch.zeros(2, 3, 5, 5) if x is None else x
    weights = (torch.zeros(4, 3, 3, 3), torch.zeros(2, 4, 1, 1)) if weights is None else weights
    return nin.mlpconv(x, weights, (None,) * len(weights) if biases is None else biases, **options)


ones = torch.ones
WRONG = [
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"x": ones(3, 5, 5)}, ValueError, "x must have shape (N, C, H, W), got (3, 5, 5)"),
    (
        {"x": ones(2, 3, 5, 5, dtype=torch.int64)},
        ValueError,
        "x must have a floating dtype of 16 bits or more, got torch.int64",
    ),
    ({"x": ones(2, 3, 2, 5)}, ValueError, "padded height of at least 3 (the kernel's reach), got 2 with padding 0"),
    ({"x": ones(2, 3, 5, 5), "dilation": 3}, ValueError, "padded height of at least 7"),
    ({"x": ones(2, 3, 5, 2)}, ValueError, "padded width of at least 3"),
    ({"weights": ()}, ValueError, "weights and biases must be as many, and at least one, got 0 and 0"),
    ({"biases": (None,)}, ValueError, "weights and biases must be as many, and at least one, got 2 and 1"),
    ({"weights": (ones(4, 3, 3, 3), None)}, TypeError, "weight 1 must be a tensor, got NoneType"),
    (
        {"weights": (ones(4, 7, 3, 3),)},
        ValueError,
        "weight must have shape (C_out, 3, kH, kW), got (4, 7, 3, 3): the input has 3 channels",
    ),
    (
        {"weights": (ones(4, 3, 3, 3), ones(2, 5, 1, 1))},
        ValueError,
        "weight 1 must have shape (C_out, 4, 1, 1), got (2, 5, 1, 1): the layer before gives 4 channels",
    ),
    ({"weights": (ones(4, 3, 3, 3), ones(2, 4, 3, 3))}, ValueError, "weight 1 must have shape (C_out, 4, 1, 1)"),
    ({"weights": (ones(4, 3),)}, ValueError, "weight must have shape (C_out, 3, kH, kW), got (4, 3)"),
    ({"weights": (ones(0, 3, 1, 1),)}, ValueError, "weight must have shape (C_out, 3, kH, kW), got (0, 3, 1, 1)"),
    ({"weights": (ones(4, 3, 3, 3).double(),)}, ValueError, "weight must be torch.float32 on cpu as x is"),
    ({"weights": (ones(4, 3, 3, 3, device="meta"),)}, ValueError, "got torch.float32 on meta"),
    ({"biases": (ones(5), None)}, ValueError, "bias 0 must have shape (4,), got (5,)"),
    ({"biases": (None, ones(2).half())}, ValueError, "bias 1 must be torch.float32 on cpu as x is, got torch.float16"),
    ({"biases": (None, 0.5)}, TypeError, "bias 1 must be a tensor, got float"),
    ({"stride": 0}, ValueError, "stride must be a whole number of at least 1, or two of them, got 0"),
    ({"stride": (1, 1, 1)}, ValueError, "stride must be a whole number of at least 1, or two of them, got (1, 1, 1)"),
    ({"padding": -1}, ValueError, "padding must be a whole number of at least 0, or two of them, got -1"),
    ({"padding": "same"}, ValueError, "padding must be a whole number of at least 0, or two of them, got 'same'"),
    ({"stride": 1.5}, ValueError, "stride must be a whole number of at least 1, or two of them, got 1.5"),
    ({"stride": None}, ValueError, "stride must be a whole number of at least 1, or two of them, got None"),
    ({"dilation": (1, 0)}, ValueError, "dilation must be a whole number of at least 1, or two of them, got (1, 0)"),
    ({"stride": True}, ValueError, "stride must be a whole number of at least 1, or two of them, got True"),
    ({"padding": (0, False)}, ValueError, "padding must be a whole number of at least 0, or two of them, got (0, F"),
    ({"activation": 3}, ValueError, "activation must be a name, or one for each of the 2 layers, got 3"),
    ({"activation": [["relu"], "relu"]}, ValueError, "activation must be one of none, relu, gelu, silu, got ['relu']"),
    (
        {"biases": 0.5},
        TypeError,
        "biases must be a list or tuple, one for each layer, each a tensor or None, got float",
    ),
    ({"activation": "tanh"}, ValueError, "activation must be one of none, relu, gelu, silu, got 'tanh'"),
    ({"activation": ["relu"]}, ValueError, "activation must be one name or one for each of the 2 layers, got 1"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[message[:50] for *_, message in WRONG])
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error) as caught:
        call(**change)
    assert message in str(caught.value)


def test_conv1x1_says_where_kernels_belong():
    with pytest.raises(ValueError, match=r"weight must have shape \(C_out, C_in, 1, 1\), got \(4, 3, 3, 3\): use nin"):
        nin.conv1x1(ones(1, 3, 5, 5), ones(4, 3, 3, 3))
    with pytest.raises(TypeError, match="weight must be a tensor, got NoneType"):
        nin.conv1x1(ones(1, 3, 5, 5), None)


def test_weights_that_are_no_list_are_named():
    for weights in (3, torch.tensor(1.0)):
        with pytest.raises(TypeError, match="weights must be a list or tuple, one tensor for each layer, got"):
            nin.mlpconv(ones(1, 3, 5, 5), weights, (None,))


def test_a_right_call_is_not_refused():
    assert call().shape == (2, 2, 3, 3)


def test_backends_say_which_kernels_are_there(monkeypatch):
    assert set(nin.backends()) == {"cpu", "cuda"}
    assert all(isinstance(line, str) and line for line in nin.backends().values())
    monkeypatch.setattr(library, "LIBRARY", None)
    assert "without a C++ compiler" in nin.backends()["cpu"]


def test_a_broken_library_is_an_error_and_not_a_fallback(tmp_path):
    path = tmp_path / library.LIBRARY_NAME
    path.write_bytes(b"no library")
    with pytest.raises(ImportError, match="cannot be loaded"):
        library.load_library(path)


@pytest.mark.skipif(library.LIBRARY is None, reason="nin was installed without a C++ compiler")
def test_a_library_of_other_sources_is_refused(monkeypatch):
    monkeypatch.setattr(library, "INTERFACE", library.INTERFACE + 1)
    with pytest.raises(ImportError, match="built from other sources"):
        library.load_library(library.find_library())
