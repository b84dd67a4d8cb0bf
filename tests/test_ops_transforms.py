"""nin::mlpconv under PyTorch's transforms, modes and subclasses, against chains of F.conv2d under the same."""

import copy
import functools
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad, functional
from torch.func import (
    functional_call,
    functionalize,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import nin
from nin.errors import UserError
from nin.models.nin import BlockConfig, NiNConfig
from nin.ops.transforms import is_plain
from support.chains import CHAINS, DTYPES, Chain, conv_chain, each_layout
from support.random_models import in_plain_pytorch

# PyTorch's forward mode itself scripts a few functions when it is used first
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")

ALL = range(5)  # of the arguments: image, two weights, two biases
CHAIN = Chain((3, 4, 2), (3, 2), (1, 2), (1, 0))


def ours(x, w, v, b, c, activation="gelu"):
    return nin.mlpconv(x, (w, v), (b, c), activation=activation, **CHAIN.geometry)


def plain(x, w, v, b, c, activation="gelu"):
    return conv_chain(x, (w, v), (b, c), (activation, activation), CHAIN.geometry)


def arguments(dtype=torch.float64, layout=torch.contiguous_format, size=(4, 3)):
    x, weights, biases = CHAIN.tensors(dtype, layout, images=2, size=size)
    return (x, *weights, *biases)


def like(args):
    return tuple(torch.randn_like(t) for t in args)


def three(t):
    return torch.stack([t, 2 * t, t - 1])


def trained(args):
    return [t.clone().requires_grad_() for t in args]


def scalar(f):
    return lambda *args: f(*args).sin().sum()


def same(result, expected, **tolerance):
    assert_same_missing(result, expected)
    torch.testing.assert_close(
        [t for t in flat(result) if t is not None], [t for t in flat(expected) if t is not None], **tolerance
    )


def flat(tree):
    return torch.utils._pytree.tree_leaves(tree)


def assert_same_missing(result, expected):
    assert [t is None for t in flat(result)] == [t is None for t in flat(expected)]


# -- derivatives ------------------------------------------------------------------------------------------------


def forward_ad_of(f, args, tangents, which=ALL, mode=torch.enable_grad):
    with forward_ad.dual_level():
        dual = [
            forward_ad.make_dual(*both) if i in which else both[0]
            for i, both in enumerate(zip(args, tangents, strict=True))
        ]
        with mode():
            result = f(*dual)
        value, tangent = forward_ad.unpack_dual(result)
        return value.clone(), None if tangent is None else tangent.clone()


def forward_over_recorded(f, args):
    """The tangent of a gradient whose forward pass was recorded before the level was entered."""
    parameters = trained(args)
    y = scalar(f)(*parameters)
    with forward_ad.dual_level():
        seed = forward_ad.make_dual(torch.ones_like(y), torch.full_like(y, 2.0))
        grads = torch.autograd.grad(y, parameters, seed)
        return [forward_ad.unpack_dual(g).tangent.clone() for g in grads]


def forward_over_reverse(f, args, tangents):
    parameters = trained(args)
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(*both) for both in zip(parameters, tangents, strict=True)]
        grads = torch.autograd.grad(scalar(f)(*dual), dual, create_graph=True)
        return [forward_ad.unpack_dual(g).tangent.clone() for g in grads]


def batched_grads(f, args, create_graph):
    parameters = trained(args)
    y = f(*parameters)
    seeds = torch.stack([torch.ones_like(y), y.detach(), y.detach().sin()])
    grads = torch.autograd.grad(y, parameters, seeds, is_grads_batched=True, create_graph=create_graph)
    return torch.autograd.grad(sum(g.sin().sum() for g in grads), parameters) if create_graph else grads


def vmap_of_recorded(f, args):
    parameters = trained(args)
    y = f(*parameters)
    seeds = torch.stack([torch.ones_like(y), y.detach()])
    return vmap(lambda seed: torch.autograd.grad(y, parameters, seed, retain_graph=True))(seeds)


def derivatives_to_order(f, args, order):
    parameters = trained(args)
    y = scalar(f)(*parameters)
    for _ in range(order - 1):
        y = sum(g.sin().sum() for g in torch.autograd.grad(y, parameters, create_graph=True))
    return torch.autograd.grad(y, parameters)


def autograd_through(transform, args):
    parameters = trained(args)
    return torch.autograd.grad(sum(t.sin().sum() for t in flat(transform(*parameters))), parameters)


DERIVATIVES = {
    "jvp": lambda f, args: jvp(f, args, like(args)),
    "jacfwd": lambda f, args: jacfwd(f, argnums=tuple(ALL))(*args),
    "jacrev": lambda f, args: jacrev(f, argnums=tuple(ALL))(*args),
    "hessian": lambda f, args: hessian(scalar(f), argnums=tuple(ALL))(*args),
    "jacrev of jacrev": lambda f, args: jacrev(jacrev(scalar(f), argnums=(0, 1)), argnums=(1, 3))(*args),
    "jacfwd of jacfwd": lambda f, args: jacfwd(jacfwd(scalar(f), argnums=(0, 1)), argnums=(1, 3))(*args),
    "jacrev of jacfwd": lambda f, args: jacrev(jacfwd(scalar(f), argnums=(0, 2)), argnums=(1, 4))(*args),
    "grad": lambda f, args: grad(scalar(f), argnums=tuple(ALL))(*args),
    "grad under no_grad": lambda f, args: torch.no_grad()(grad(scalar(f), argnums=tuple(ALL)))(*args),
    "grad of no_grad": lambda f, args: grad(lambda x: scalar(torch.no_grad()(f))(x, *args[1:]) + x.sum())(args[0]),
    "grad_and_value": lambda f, args: grad_and_value(scalar(f))(*args),
    "grad of grad": lambda f, args: grad(lambda w: grad(lambda x: scalar(f)(x, w, *args[2:]))(args[0]).sin().sum())(
        args[1]
    ),
    "vjp": lambda f, args: vjp(f, *args)[1](torch.ones_like(plain(*args))),
    "vmap of vjp": lambda f, args: vmap(vjp(f, *args)[1])(three(plain(*args))),
    "linearize": lambda f, args: linearize(f, *args)[1](*like(args)),
    "functional.jvp": lambda f, args: functional.jvp(f, args, like(args)),
    "functional.vjp": lambda f, args: functional.vjp(f, args, torch.ones_like(plain(*args))),
    "functional.hvp": lambda f, args: functional.hvp(scalar(f), args, like(args)),
    "functional.vhp": lambda f, args: functional.vhp(scalar(f), args, like(args)),
    "functional.jacobian": lambda f, args: functional.jacobian(f, args),
    "functional.jacobian, batched": lambda f, args: functional.jacobian(f, args, vectorize=True),
    "functional.jacobian, forward": lambda f, args: functional.jacobian(
        f, args, vectorize=True, strategy="forward-mode"
    ),
    "functional.hessian, batched": lambda f, args: functional.hessian(scalar(f), args, vectorize=True),
    "functional.hessian, forward": lambda f, args: functional.hessian(
        scalar(f), args, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "forward_ad": lambda f, args: forward_ad_of(f, args, like(args)),
    "forward_ad under no_grad": lambda f, args: forward_ad_of(f, args, like(args), mode=torch.no_grad),
    "forward_ad of parameters": lambda f, args: forward_ad_of(f, [args[0], *trained(args[1:])], like(args)),
    "forward over reverse": lambda f, args: forward_over_reverse(f, args, like(args)),
    "batched gradients": lambda f, args: batched_grads(f, args, create_graph=False),
    "derivatives of batched gradients": lambda f, args: batched_grads(f, args, create_graph=True),
    "vmap of a recorded gradient": vmap_of_recorded,
    "third derivatives": lambda f, args: derivatives_to_order(f, args, 3),
    "autograd of jvp": lambda f, args: autograd_through(lambda *a: jvp(f, a, tuple(map(torch.ones_like, a))), args),
    "autograd of vmap": lambda f, args: autograd_through(lambda x, *rest: vmap(lambda q: f(q[None], *rest))(x), args),
    "autograd of grad": lambda f, args: autograd_through(grad(scalar(f), argnums=(0, 1)), args),
}


def check(transform, activation, args):
    torch.manual_seed(1)
    expected = transform(lambda *a: plain(*a, activation), args)
    torch.manual_seed(1)
    same(transform(lambda *a: ours(*a, activation), args), expected)
    assert any(t is not None and t.abs().max() > 0 for t in flat(expected))  # nothing is zero by mistake of the test


@pytest.mark.parametrize("transform", list(DERIVATIVES.values()), ids=DERIVATIVES)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # PyTorch's linearize
def test_derivatives(transform, activation):
    check(transform, activation, arguments(size=(3, 2)))


@each_layout
@pytest.mark.parametrize("name", ["jvp", "hessian", "forward over reverse", "batched gradients", "vmap of vjp"])
def test_derivatives_in_both_layouts(name, layout):
    check(DERIVATIVES[name], "silu", arguments(layout=layout, size=(3, 2)))


def test_forward_mode_of_gradients_recorded_before():
    args = arguments()
    for activation in ("gelu", "relu"):
        check(forward_over_recorded, activation, args)
    # PyTorch's silu has no forward-mode derivative of its gradient, nin's has
    silu = [functools.partial(f, activation="silu") for f in (ours, plain)]
    same(forward_over_recorded(silu[0], args), [2 * g for g in derivatives_to_order(silu[1], args, 1)])


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (3,), (4,), (0, 3), (2, 4), ()], ids=str)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_forward_mode_of_any_mix(which, mode):
    args = arguments()
    tangents = like(args)
    same(forward_ad_of(ours, args, tangents, which, mode), forward_ad_of(plain, args, tangents, which, mode))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_layout
def test_forward_mode_in_every_dtype(dtype, layout):
    args = arguments(dtype, layout)
    tangents = like(args)
    result = forward_ad_of(ours, args, tangents)
    expected = forward_ad_of(plain, [t.double() for t in args], [t.double() for t in tangents])
    for got, want in zip(result, expected, strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= 12 * torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.parametrize("chain", [CHAINS[n] for n in ("1x1", "1x1 stride", "5x5 and three", "3x3 dilated")], ids=str)
def test_jvp_of_other_chains(chain):
    x, weights, biases = chain.tensors()
    names = ["silu"] * len(weights)
    both = (x, tuple(weights)), (torch.randn_like(x), like(weights))
    same(
        jvp(lambda x, w: nin.mlpconv(x, w, biases, activation=names, **chain.geometry), *both),
        jvp(lambda x, w: conv_chain(x, w, biases, names, chain.geometry), *both),
    )


def test_gradcheck_of_every_mode():
    parameters = trained(arguments(size=(3, 2)))
    assert torch.autograd.gradcheck(
        ours, parameters, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(ours, parameters, check_fwd_over_rev=True, check_batched_grad=True)


def test_the_operators_themselves_under_transforms():
    args = arguments()
    options = (*CHAIN.geometry.values(), ["relu", "gelu"])

    def op(x, w, v, b, c):
        return torch.ops.nin.mlpconv(x, [w, v], [b, c], *options)

    def conv(x, w, v, b, c):
        return conv_chain(x, (w, v), (b, c), ("relu", "gelu"), CHAIN.geometry)

    y = conv(*args)

    def backward_op(g, x, w, v, b, c):
        return torch.ops.nin.mlpconv_backward(g, x, y, [w, v], [b, c], *options, [True] * 5)

    def gradients(g, *args):
        x_grad, *rest = vjp(conv, *args)[1](g)
        return x_grad, rest[:2], rest[2:]

    tangents = like(args)
    same(jvp(op, args, tangents), jvp(conv, args, tangents))
    same(forward_ad_of(op, args, tangents), forward_ad_of(conv, args, tangents))
    same(vmap(op)(*map(three, args)), vmap(conv)(*map(three, args)))
    seeds = y.cos(), *args
    same(jvp(backward_op, seeds, (y, *tangents)), jvp(gradients, seeds, (y, *tangents)))
    same(vmap(backward_op, (0,) + (None,) * 5)(three(y), *args), vmap(gradients, (0,) + (None,) * 5)(three(y), *args))
    parameters = trained(args)
    second = [torch.autograd.grad(f(y, *parameters)[1][0].sin().sum(), parameters[0]) for f in (backward_op, gradients)]
    same(*second)


# -- vmap -------------------------------------------------------------------------------------------------------


def over(*names, dim=0):
    """Return in_dims that map over some of the arguments."""
    return tuple(dim if name in names else None for name in "xwvbc")


VMAPS = {
    "images": lambda f, a: vmap(f, over("x"))(three(a[0]), *a[1:]),
    "single images": lambda f, a: vmap(lambda x: f(x[None], *a[1:]))(a[0]),
    "dimension 2 into 3": lambda f, a: vmap(f, over("x", dim=2), out_dims=3)(three(a[0]).movedim(0, 2), *a[1:]),
    "last dimension": lambda f, a: vmap(f, over("x", dim=-1), out_dims=-1)(three(a[0]).movedim(0, -1), *a[1:]),
    "first weights": lambda f, a: vmap(f, over("w"))(a[0], three(a[1]), *a[2:]),
    "second weights": lambda f, a: vmap(f, over("v"))(*a[:2], three(a[2]), *a[3:]),
    "weights, dimension 1": lambda f, a: vmap(f, over("w", dim=1))(a[0], three(a[1]).movedim(0, 1), *a[2:]),
    "a bias": lambda f, a: vmap(f, over("b"))(*a[:3], three(a[3]), a[4]),
    "images and a bias": lambda f, a: vmap(f, over("x", "c"))(three(a[0]), *a[1:4], three(a[4])),
    "everything": lambda f, a: vmap(f)(*map(three, a)),
    "nothing of the operator's": lambda f, a: vmap(lambda t: t * f(*a))(torch.arange(3.0)),
    "images in images": lambda f, a: vmap(vmap(lambda x: f(x[None], *a[1:])))(three(a[0])),
    "images in weights": lambda f, a: vmap(lambda w: vmap(lambda x: f(x, w, *a[2:]))(three(a[0])))(three(a[1])),
    "weights in images": lambda f, a: vmap(lambda x: vmap(lambda w: f(x, w, *a[2:]))(three(a[1])))(three(a[0])),
    "chunks": lambda f, a: vmap(lambda x: f(x, *a[1:]), chunk_size=2)(three(a[0])),
    "random, different": lambda f, a: vmap(lambda x: f(x, *a[1:]), randomness="different")(three(a[0])),
    "no images": lambda f, a: vmap(lambda x: f(x[:0], *a[1:]))(three(a[0])),
    "functionalize": lambda f, a: vmap(functionalize(f))(*map(three, a)),
    "grad": lambda f, a: vmap(grad(scalar(f), argnums=tuple(ALL)), over("x"))(three(a[0]), *a[1:]),
    "per-sample gradients": lambda f, a: vmap(grad(lambda w, x: scalar(f)(x[None], w, *a[2:])), (None, 0))(a[1], a[0]),
    "inside grad": lambda f, a: grad(lambda w: vmap(lambda x: f(x[None], w, *a[2:]))(a[0]).sin().sum())(a[1]),
    "inside jvp": lambda f, a: jvp(lambda w: vmap(lambda x: f(x[None], w, *a[2:]))(a[0]), a[1:2], like(a[1:2])),
    "jvp": lambda f, a: vmap(lambda x, t: jvp(lambda q: f(q[None], *a[1:]), (x,), (t,)))(a[0], like(a)[0]),
    "hessian": lambda f, a: vmap(hessian(lambda x: scalar(f)(x[None], *a[1:])))(a[0]),
}


def where_pytorch_can(call):
    """Call with our operator; skip what this version of PyTorch cannot do with its own convolutions either."""
    try:
        return call(ours)
    except RuntimeError as error:  # those of Dynamo and of a transform that an operator lacks are of this type
        try:
            call(plain)
        except type(error) as same_error:
            pytest.skip(f"PyTorch's own convolutions cannot: {str(same_error).splitlines()[0]}")
        raise


@pytest.mark.parametrize("mapped", list(VMAPS.values()), ids=VMAPS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_vmap(mapped, mode):
    args = arguments(size=(3, 2))
    with mode():
        torch.manual_seed(1)
        result = where_pytorch_can(lambda f: mapped(f, args))
        torch.manual_seed(1)
        same(result, mapped(plain, args))


@pytest.mark.parametrize("name", ["images", "single images", "everything", "per-sample gradients"])
def test_vmap_over_channels_last(name):
    args = arguments(layout=torch.channels_last)
    same(VMAPS[name](ours, args), VMAPS[name](plain, args))


def test_vmap_over_images_keeps_the_kernels():
    args = arguments(torch.float32)
    with DispatchLog() as log, torch.no_grad():
        VMAPS["images"](ours, args)
    assert log.calls.count(torch.ops.nin.mlpconv.default) == 1
    assert torch.ops.aten.convolution.default not in log.calls


# -- layers and models ------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Chains, layers of their own and BatchNorm in evaluation."""

    def __init__(self):
        super().__init__()
        self.chain = nin.MLPConv(3, (5, 4), kernel_size=3, padding=1, activation="gelu")
        self.norm = nn.BatchNorm2d(4)
        self.inception = nin.Inception(4, 2, 2, 3, 1, 2, 2, activation="silu")
        self.bottleneck = nin.Bottleneck(9, 3, 6, kernel_size=2, expand=True)
        self.standard = nin.MLPConv(6, (5, 3), normalisation="weight_standardisation")
        self.last = nin.Conv1x1(3, 2)
        self.eval().double()

    def forward(self, x):
        return self.last(self.standard(self.bottleneck(self.inception(self.norm(self.chain(x)))))).mean((2, 3))


def per_sample_gradients(model, x):
    parameters = dict(model.named_parameters())
    return vmap(grad(lambda p, q: functional_call(model, p, (q[None],)).sin().sum()), (None, 0))(parameters, x)


def ensemble(model, x):
    models = [copy.deepcopy(model) for _ in range(3)]
    with torch.no_grad():
        for i, other in enumerate(models):
            for parameter in other.parameters():
                parameter.mul_(1 + i / 8)
    parameters, buffers = stack_module_state(models)
    return vmap(lambda p, b: functional_call(model, (p, b), (x,)))(parameters, buffers)


def hessian_vector_product(model, x):
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    loss = grad(lambda p: functional_call(model, p, (x,)).sin().sum())
    return jvp(loss, (parameters,), ({name: torch.ones_like(p) for name, p in parameters.items()},))[1]


def saved_on_cpu(model, x):
    x = x.clone().requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        y = model(x)
    return torch.autograd.grad(y.sin().sum(), [x, *model.parameters()])


def checkpointed(model, x, use_reentrant):
    x = x.clone().requires_grad_()
    y = checkpoint(model, x, use_reentrant=use_reentrant).sin().sum()
    for p in model.parameters():
        p.grad = None
    y.backward()
    return [x.grad, *(p.grad.clone() for p in model.parameters())]


def hooked(model, x):
    """Gradients that hooks on tensors have changed and seen, in anomaly mode."""
    x, seen = x.clone().requires_grad_(), []
    handles = [p.register_hook(lambda g: 2 * g) for p in model.parameters()]
    with torch.autograd.detect_anomaly(check_nan=True):
        y = model(x)
        y.register_hook(seen.append)
        grads = torch.autograd.grad(y.sin().sum(), [x, *model.parameters()])
    for handle in handles:
        handle.remove()
    return grads, seen


def frozen_in_turn(model, x):
    results = []
    for frozen in model.parameters():
        frozen.requires_grad_(False)
        trainable = [p for p in model.parameters() if p.requires_grad]
        results += torch.autograd.grad(model(x).sin().sum(), trainable)
        frozen.requires_grad_()
    return results


def parametrised(model, x):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight.sin()

    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if "weight" in module._parameters and module.weight.dim() == 4:
            nn.utils.parametrize.register_parametrization(module, "weight", Doubled())
    return model(x), torch.autograd.grad(model(x).sin().sum(), list(model.parameters()))


MODEL_ACTIONS = {
    "values": lambda m, x: m(x),
    "inference mode": lambda m, x: torch.inference_mode()(m)(x),
    "per-sample gradients": per_sample_gradients,
    "ensemble": ensemble,
    "Hessian-vector product": hessian_vector_product,
    "jacfwd": lambda m, x: jacfwd(m)(x),
    "vmap": lambda m, x: vmap(lambda q: m(q[None]))(x),
    "save_on_cpu": saved_on_cpu,
    "checkpoint": lambda m, x: checkpointed(m, x, use_reentrant=False),
    "reentrant checkpoint": lambda m, x: checkpointed(m, x, use_reentrant=True),
    "hooks and anomaly mode": hooked,
    "frozen in turn": frozen_in_turn,
    "parametrised": parametrised,
    "deepcopy": lambda m, x: copy.deepcopy(m)(x),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.filterwarnings("ignore:Anomaly mode has been enabled")
@pytest.mark.parametrize("action", list(MODEL_ACTIONS.values()), ids=MODEL_ACTIONS)
def test_models(action):
    model, x = Network(), torch.randn(3, 3, 6, 5, dtype=torch.float64)
    same(action(model, x), action(in_plain_pytorch(model), x))


@pytest.mark.parametrize("action", ["values", "per-sample gradients", "ensemble", "jacfwd", "vmap"])
@pytest.mark.parametrize("channels", [1, 3])
def test_networks_in_their_own_layout(action, channels):
    blocks = (BlockConfig((5, 4), 3, padding=1, pool="max"), BlockConfig((6, 3), 3, padding=1))
    model = nin.models.NiN(NiNConfig("small", channels, 3, 6, blocks)).double().eval()
    x = torch.randn(3, channels, 6, 5, dtype=torch.float64)
    same(MODEL_ACTIONS[action](model, x), MODEL_ACTIONS[action](in_plain_pytorch(model), x))


def test_a_network_of_a_batch_of_batches_compiles():
    model, x = nin.models.nin_digits().eval(), torch.randn(3, 1, 8, 8)
    compiled = torch.compile(lambda x: vmap(lambda q: model(q[None])[0])(x), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_models_pickle():
    model, x = Network(), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    same(pickle.loads(pickle.dumps(model))(x), model(x))


# -- tracing and compiling --------------------------------------------------------------------------------------


def test_jit_trace_gives_pytorch_operators_of_any_size():
    model, file = Network(), io.BytesIO()
    torch.jit.save(torch.jit.trace(model, torch.randn(1, 3, 6, 5, dtype=torch.float64)), file)
    file.seek(0)
    traced = torch.jit.load(file)  # in a process without nin, too
    assert "nin::" not in str(traced.inlined_graph)
    x = torch.randn(3, 3, 9, 8, dtype=torch.float64)
    same(traced(x), model(x))
    grads = [torch.autograd.grad(m(x).sum(), next(iter(m.parameters()))) for m in (traced, model)]
    same(*grads)


@pytest.mark.parametrize("layer", [nin.Conv1x1(3, 4), nin.MLPConv(3, (4, 2)), nin.Inception(3, 1, 1, 1, 1, 1, 1)])
def test_jit_script_says_what_works(layer):
    before = list(layer.state_dict())
    with pytest.raises(UserError, match=r"cannot compile nin\.\w+: use torch\.jit\.trace or torch\.export"):
        torch.jit.script(nn.Sequential(layer))
    assert list(layer.state_dict()) == before


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_make_fx_sees_the_operator(tracing_mode, pre_dispatch, mode):
    args = arguments()
    with mode():
        graph = make_fx(lambda *a: ours(*a), tracing_mode=tracing_mode, pre_dispatch=pre_dispatch)(*args)
    assert torch.ops.nin.mlpconv.default in [node.target for node in graph.graph.nodes]
    changed = [t + 1 for t in args]
    same(graph(*changed), plain(*changed))


GRAPHS = {
    "jvp": lambda f: lambda *a: jvp(f, a, tuple(t.cos() for t in a)),
    "grad": lambda f: grad(scalar(f), argnums=(0, 1, 3)),
    "hessian": lambda f: hessian(scalar(f), argnums=(0, 3)),
    "vmap": lambda f: lambda *a: vmap(f, over("x", "c"))(three(a[0]), *a[1:4], three(a[4])),
    "per-sample gradients": lambda f: vmap(grad(lambda x, *a: scalar(f)(x[None], *a)), over("x")),
}
each_graph = pytest.mark.parametrize("transform", list(GRAPHS.values()), ids=GRAPHS)


@each_graph
def test_make_fx_of_transforms(transform):
    args = arguments(size=(3, 2))
    graph = where_pytorch_can(lambda f: make_fx(transform(f), tracing_mode="symbolic")(*args))
    changed = [t + 1 for t in args]
    same(graph(*changed), transform(plain)(*changed))


@each_graph
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_compile_around_transforms(transform, mode):
    torch._dynamo.reset()
    args = arguments(size=(3, 2))
    with mode():
        compiled = where_pytorch_can(lambda f: torch.compile(transform(f), backend="aot_eager", fullgraph=True)(*args))
        same(compiled, transform(plain)(*args))


@each_graph
def test_transforms_around_compiled_calls(transform):
    torch._dynamo.reset()
    args = arguments(size=(3, 2))
    same(transform(torch.compile(ours, backend="aot_eager"))(*args), transform(plain)(*args))


def test_forward_mode_through_a_compiled_call():
    torch._dynamo.reset()
    args = arguments()
    compiled = torch.compile(ours, backend="aot_eager")
    compiled(*args)  # the graph of plain tensors must not serve dual ones
    tangents = like(args)
    same(forward_ad_of(compiled, args, tangents), forward_ad_of(plain, args, tangents))


def test_exported_programs_under_transforms():
    model, x = Network(), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    program = torch.export.export(model, (x,))
    assert torch.ops.nin.mlpconv.default in [node.target for node in program.graph.nodes]
    for exported in (program.module(), program.run_decompositions().module()):
        same(jvp(exported, (x,), (x.cos(),)), jvp(in_plain_pytorch(model), (x,), (x.cos(),)))
    same(vmap(program.module())(three(x)), vmap(in_plain_pytorch(model))(three(x)))


# -- modes and subclasses ---------------------------------------------------------------------------------------


class DispatchLog(TorchDispatchMode):
    """Note every operator."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


class FunctionLog(TorchFunctionMode):
    """Note every function; where ``scale`` is given, replace the operator's input by its product with it."""

    def __init__(self, scale=None):
        super().__init__()
        self.scale, self.calls = scale, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        if self.scale is not None and func is torch.ops.nin.mlpconv.default:
            return func(args[0] * self.scale, *args[1:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("log", [DispatchLog, FunctionLog])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_modes_see_the_call(log, mode):
    args = arguments()
    with mode(), log() as seen:
        result = ours(*args)
    assert seen.calls.count(torch.ops.nin.mlpconv.default) == 1
    same(result, plain(*args))


def test_a_function_mode_may_bring_in_what_needs_gradients():
    args, scale = arguments(), torch.ones(3, 1, 1, dtype=torch.float64, requires_grad=True)
    with FunctionLog(scale):
        result = ours(*args)
    same(torch.autograd.grad(result.sum(), scale), torch.autograd.grad(plain(args[0] * scale, *args[1:]).sum(), scale))


class Wrapper(torch.Tensor):
    """A tensor with operators of its own, as DTensor and quantised tensors are, that knows PyTorch's alone."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.namespace != "aten":
            return NotImplemented
        unwrap = torch.utils._pytree.tree_map
        args, kwargs = unwrap(lambda t: t.inner if isinstance(t, cls) else t, (args, kwargs or {}))
        return unwrap(lambda t: cls(t) if isinstance(t, torch.Tensor) else t, func(*args, **kwargs))


class Named(torch.Tensor):
    """A tensor that only goes by another name, as fastai's and torchvision's images do."""


@pytest.mark.parametrize("which", [(0,), (1,), (2, 4), tuple(ALL)], ids=str)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_subclasses_with_operators_of_their_own(which, mode):
    args = arguments()
    with mode():
        result = ours(*(Wrapper(t) if i in which else t for i, t in enumerate(args)))
    assert type(result) is Wrapper
    same(result.inner, plain(*args))


def test_gradients_of_subclasses():
    args = arguments()
    parameters = [Wrapper(t).requires_grad_() for t in args]
    grads = torch.autograd.grad(scalar(ours)(*parameters), parameters)
    same([g.inner for g in grads], derivatives_to_order(plain, args, 1))
    layer = nin.Conv1x1(3, 2).double()
    layer.weight = nn.Parameter(Wrapper(layer.weight.detach()))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        same(layer(x).inner, F.conv2d(x, layer.weight.inner, layer.bias))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_subclasses_by_name_keep_it(mode):
    args = arguments(torch.float32)
    with mode(), DispatchLog() as log:
        result = ours(args[0].as_subclass(Named), *args[1:])
    assert type(result) is Named
    assert torch.ops.nin.mlpconv.default in log.calls
    same(result.as_subclass(torch.Tensor), plain(*args), rtol=1e-4, atol=1e-5)


def test_what_is_plain():
    args = arguments()
    assert is_plain((*args, None, nn.Parameter(args[1])))
    assert not is_plain((args[0].as_subclass(Named),))
    for entered in (forward_ad.dual_level(), DispatchLog(), FunctionLog()):
        with entered:
            assert not is_plain(args)
        assert is_plain(args)
    for transform in (lambda f: vmap(f)(args[0]), lambda f: grad(f)(args[0]), lambda f: jvp(f, args[:1], args[:1])):
        seen = []
        transform(lambda x, seen=seen: seen.append(is_plain(args)) or x.sum())
        assert seen == [False]


REFUSED = {
    "nested": (lambda x: torch.nested.nested_tensor([x[0], x[1]]), "got a nested one: torch.nested.to_padded_tensor"),
    "jagged": (
        lambda x: torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged),
        "got a nested one: torch.nested.to_padded_tensor",
    ),
    "sparse": (lambda x: x.to_sparse(), "must be dense, got one of layout torch.sparse_coo: use its to_dense"),
    "complex": (lambda x: x.to(torch.complex64), "must have a floating dtype of 16 bits or more, got torch.complex64"),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "must have a floating dtype of 16 bits or more, got torch.float8"),
    "one image": (lambda x: x[0], r"must have shape \(N, C, H, W\), got \(3, 4, 3\)"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize(("convert", "message"), list(REFUSED.values()), ids=REFUSED)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_what_is_refused_is_named(convert, message, mode):
    x, *rest = arguments()
    with mode(), pytest.raises(ValueError, match=message):
        ours(convert(x), *rest)


def escaped(transform):
    """Return a function that lets a tensor out of a transform, whose wrapper stays around it."""

    def convert(t):
        kept = []
        transform(lambda wrapped: kept.append(wrapped) or wrapped.sum())(t)
        return kept[0]

    return convert


# tensors of PyTorch's own class whose values do not lie at their address, and what gives the values
ELSEWHERE = {
    "functional": torch._to_functional_tensor,
    "zeros": lambda t: torch._efficientzerotensor(tuple(t.shape), dtype=t.dtype),
    "grad": escaped(grad),
    "jvp": escaped(lambda f: lambda t: jvp(f, (t,), (t,))),
    "functionalised": escaped(torch.func.functionalize),
    "negated": torch._neg_view,
    "conjugated": lambda t: torch.complex(t, t).conj().imag,
}


def values_of(t):
    if torch._is_functional_tensor(t):
        torch._sync(t)
        t = torch._from_functional_tensor(t)
    return torch.empty(t.shape, dtype=t.dtype).copy_(t)


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("size", [(4, 3), (20, 20)], ids=str)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_values_that_lie_elsewhere(name, size, mode):
    args = arguments(torch.float32, size=size)
    plain_args = [t.detach() for t in args]
    for _ in range(2):
        ours(*plain_args)  # kept by the cache of calls
    for place in range(len(args)):
        mixed = [ELSEWHERE[name](t) if i == place else t for i, t in enumerate(plain_args)]
        with mode():
            got, again, wanted = ours(*mixed), ours(*mixed), plain(*mixed)
        for result in (got, again):
            torch.testing.assert_close(values_of(result), values_of(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["functional", "zeros"])
def test_gradients_that_lie_elsewhere(name):
    args = arguments(torch.float32, size=(20, 20))
    tensors = [t.detach().requires_grad_() for t in args]
    grads = []
    for f in (ours, plain):
        y = f(*tensors)
        grads.append(torch.autograd.grad(y, tensors, ELSEWHERE[name](torch.ones_like(y))))
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(values_of(got), values_of(wanted), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("size", [(4, 3), (20, 20)], ids=str)
def test_what_has_lost_its_values_is_refused(place, size):
    args = [t.detach().clone() for t in arguments(torch.float32, size=size)]
    ours(*args)
    one_of_a_batch = escaped(lambda f: lambda t: vmap(f)(t[None]))(args[place])
    empty = args[place].clone()
    empty.untyped_storage().resize_(0)
    for lost, error, message in (
        (one_of_a_batch, RuntimeError, "escaped from inside"),
        (empty, ValueError, "must have memory"),
    ):
        with pytest.raises(error, match=message):
            ours(*(lost if i == place else t for i, t in enumerate(args)))


def test_a_weight_that_loses_its_memory_before_the_backward_pass():
    args = trained(arguments(torch.float32, size=(20, 20)))
    y = ours(*args)
    args[1].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="must have memory"):
        y.sum().backward()


def test_the_older_vmap():
    from torch._vmap_internals import _vmap

    args = [t.detach() for t in arguments(torch.float32)]
    images = torch.stack((args[0], 2 * args[0]))
    got = _vmap(lambda x: ours(x, *args[1:]))(images)
    same(got, torch.stack([plain(x, *args[1:]) for x in images]), rtol=1e-4, atol=1e-5)


def test_nested_weights_are_refused():
    x, w, *rest = arguments()
    with pytest.raises(ValueError, match="weight 0 must be one tensor, got a nested one"):
        ours(x, torch.nested.nested_tensor(list(w)), *rest)


def test_sparse_weights_are_refused():
    x, w, *rest = arguments()
    with pytest.raises(ValueError, match="must be dense"):
        ours(x, w.to_sparse(), *rest)


def test_a_call_that_nobody_sees_skips_the_dispatcher_and_no_other(monkeypatch):
    from nin.ops import schema
    from nin.ops.cpu import dispatch, weight_cache

    direct = []
    weight_cache.calls.clear()
    forward, backward = schema._kernels["cpu"]
    kernels = (lambda *a: direct.append("forward") or forward(*a), lambda *a: direct.append("backward") or backward(*a))
    monkeypatch.setitem(schema._kernels, "cpu", kernels)
    monkeypatch.setattr(dispatch, "mlpconv", kernels[0])
    x, weight = torch.randn(2, 3, 4, 5), torch.randn(6, 3, 1, 1)

    def call(x=x, weight=weight):
        direct.clear()
        return nin.conv1x1(x, weight)

    want = torch.conv2d(x, weight)
    torch.testing.assert_close(call(), want)
    assert direct == ["forward"]
    leaf = weight.clone().requires_grad_()
    call(weight=leaf).sum().backward()
    assert direct == ["forward", "backward"]
    torch.testing.assert_close(leaf.grad[:, :, 0, 0], x.sum((0, 2, 3)).expand(6, 3))
    # the minus of a view with a negative bit is the dispatcher's to apply
    torch.testing.assert_close(call(torch._neg_view(x)), -want)
    torch.testing.assert_close(call(weight=torch._neg_view(weight)), -want)
    assert direct == []
    with torch.autocast("cpu", torch.bfloat16):
        assert call().dtype == torch.bfloat16
    assert direct == []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    assert direct == []
    assert any(event.name == "nin::mlpconv" for event in profile.events())
    with FlopCounterMode(display=False) as counter:
        call()
    assert direct == []
    assert counter.get_total_flops() == 2 * 2 * 20 * 18
