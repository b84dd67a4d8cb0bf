"""A fused model does what the model does, in every call, whatever its forward does and whatever is done to it later."""

import copy
import io
import multiprocessing
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import nin
from nin.fusion.chain import Chain
from nin.fusion.pending import Pending

KEPT = []  # what forwards below keep outside of the model


def block():
    """Return 1×1 → BatchNorm → ReLU → 1×1, with statistics as after training."""
    model = nn.Sequential(nn.Conv2d(8, 20, 1), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 8, 1))
    with torch.no_grad():
        for t in (model[1].weight, model[1].bias, model[1].running_mean, model[1].running_var):
            t.uniform_(0.5, 1.5)
    return model.eval()


class Two(nn.Module):
    """Two 1×1 layers, and state for the forwards of the classes below."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 1)
        self.calls, self.early = 0, False
        self.register_buffer("count", torch.zeros(()))


class WritesIntoNew(Two):
    def forward(self, x):
        out = torch.zeros_like(x.detach())
        out += self.b(self.a(x).relu())
        return out


class WritesIntoZeros(Two):
    def forward(self, x):
        out = torch.zeros(2, 8, 5, 5)
        out += self.b(self.a(x).relu())
        return out


class AddsNoise(Two):
    def forward(self, x):
        return self.b(self.a(x).relu()) + torch.randn(1, 8, 1, 1)


class Tosses(Two):
    def forward(self, x):
        if torch.rand(1) < 0.5 or random.random() < 0.3 or np.random.rand() < 0.2:
            return self.b(self.a(x).relu())
        return self.b(F.gelu(self.a(x)))


class LooksAtValues(Two):
    def forward(self, x):
        return self.b(self.a(x).relu()) if x.sum() > 0 else self.b(self.a(x))


class Counts(Two):
    def forward(self, x):
        self.calls += 1
        self.count += 1
        return self.b(self.a(x).relu()) * self.calls + self.count


class KeepsInAttribute(Two):
    def forward(self, x):
        self.kept = self.a(x)
        return self.b(self.kept.relu())


class KeepsInGlobal(Two):
    def forward(self, x):
        hidden = self.a(x)
        KEPT.append(hidden)
        return self.b(hidden.relu()) * len(KEPT)


class ReturnsEarly(Two):
    def forward(self, x):
        hidden = self.a(x)
        if self.early:
            return hidden + 0
        return self.b(F.relu(self.norm(hidden)))


class ChangesItsInput(Two):
    def forward(self, x):
        x = x.clone()
        hidden = self.a(x)
        with torch.no_grad():
            x.mul_(2)
        return self.b(hidden.relu()) + x.detach()


class ChangesItsWeights(Two):
    def forward(self, x):
        hidden = self.a(x)
        with torch.no_grad():
            self.a.weight.data.mul_(0.9)
        return self.b(hidden.relu())


class ComputesPartWithoutGradients(Two):
    def forward(self, x):
        with torch.no_grad():
            hidden = self.a(x)
        return self.b(hidden.relu())


class Decorated(Two):
    @torch.no_grad()
    def forward(self, x):
        return self.b(self.a(x).relu())


class ReadsWeights(Two):
    def forward(self, x):
        return self.b(self.a(x).relu()) + self.a.weight.sum() + F.conv2d(self.a(x), self.b.weight)


class LooksAtHidden(Two):
    def forward(self, x):
        hidden = self.a(x)
        assert isinstance(hidden, torch.Tensor)
        self.calls = float(hidden.detach().mean()) + hidden.detach().numpy().sum()
        return self.b(F.relu(hidden, inplace=True)) * self.calls


class UsesAnAlias(Two):
    def forward(self, x):
        hidden = self.a(x)
        return self.b(F.relu(hidden, inplace=True)) + hidden.sum()


class ChangesTheResult(Two):
    def forward(self, x):
        out = self.norm(self.a(x))
        out += 1
        return self.b(out)


class TakesAnything(Two):
    def forward(self, *args, **kwargs):
        return self.b(self.a(args[0]).relu())


class DropsOut(Two):
    def forward(self, x):
        return self.b(F.dropout(self.a(x).relu(), 0.5, training=True))


class Tied(Two):
    def forward(self, x):
        return F.conv2d(self.b(self.a(x).relu()), self.b.weight.transpose(0, 1)).sum((2, 3))


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class HasASubclass(Two):
    def __init__(self):
        super().__init__()
        self.a = Doubled(8, 6, 1)

    def forward(self, x):
        return self.b(self.a(x).relu())


class Checkpointed(Two):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(lambda t: self.b(self.a(t).relu()), x, use_reentrant=False)


FORWARDS = [kind for kind in list(globals().values()) if isinstance(kind, type) and issubclass(kind, Two)][1:]


def run(model, *, gradients):
    """Return all numbers that six calls of a model give, whose signs and flags differ."""
    KEPT.clear()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    numbers = []
    for call in range(6):
        model.early = call == 4
        x = (torch.linspace(-1, 1, 400).view(2, 8, 5, 5) * (-1) ** call).requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            y = model(x)
            kept = [*KEPT, *([model.kept] if hasattr(model, "kept") else [])]
            assert all(type(t) is torch.Tensor for t in (y, *kept))
            if gradients and y.requires_grad:
                y.square().sum().backward()
        gradient = [x.grad, *(p.grad for p in model.parameters())]
        numbers += [t.detach().clone() for t in (y, *kept, *gradient, *model.buffers()) if t is not None]
    return numbers


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kind", FORWARDS)
def test_every_call_is_the_models(kind, gradients):
    torch.manual_seed(0)
    model = kind().eval()
    if gradients and kind in (ChangesItsInput, KeepsInAttribute, KeepsInGlobal):
        pytest.skip("PyTorch cannot differentiate what was changed in place, or its test holds the graph")
    state = {name: str(value) for name, value in vars(model).items() if not name.startswith("_")}
    fused = nin.fuse(model).model
    assert {name: str(value) for name, value in vars(fused).items() if not name.startswith("_")} == state
    wanted, got = run(model, gradients=gradients), run(fused, gradients=gradients)
    assert len(wanted) == len(got)
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def test_what_fusing_leaves_alone_has_its_reason():
    assert "symbolically traced" in nin.fuse(LooksAtValues().eval()).left["a"]
    assert nin.fuse(TakesAnything().eval()).left["b"] == "its forward takes any arguments"
    assert nin.fuse(HasASubclass().eval()).left["a"] == "it is a Doubled, whose forward may differ"
    assert nin.fuse(ReadsWeights().eval()).left["a"] == "it is called more than once"


def test_fusing_draws_no_random_numbers():
    model = Tosses().eval()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    nin.fuse(model)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_an_input_that_changes_before_the_layers_are_computed_is_an_error():
    class Sometimes(Two):
        def forward(self, x):
            hidden = self.a(x)
            if self.early:
                x.mul_(2)
            return self.b(hidden.relu())

    fused = nin.fuse(Sometimes().eval()).model
    fused.early = True
    with torch.no_grad(), pytest.raises(nin.errors.UserError, match="was changed in place before the layer's result"):
        fused(torch.randn(1, 8, 3, 3))


class Square(torch.autograd.Function):
    """A function with a forward and gradients of its own; `Halving` has them in the newer form."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class Halving(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x / 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


class ChecksPoints(Two):
    """Computes its hidden values again in the backward pass."""

    def forward(self, x):
        return checkpoint(lambda h: self.b(h.relu()), self.a(x), use_reentrant=True)


class UsesFunctions(Two):
    functions = (Square, Halving)

    def forward(self, x):
        hidden = self.a(x)
        for function in self.functions:
            hidden = function.apply(hidden)
        return self.b(hidden.relu())


@pytest.mark.parametrize("kind", [ChecksPoints, UsesFunctions])
def test_autograd_functions_between_the_layers_keep_their_gradients(kind):
    torch.manual_seed(0)
    model = kind().eval()
    wanted, got = run(model, gradients=True), run(nin.fuse(model).model, gradients=True)
    assert len(wanted) == len(got)
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [Square, Halving])
def test_an_autograd_function_that_comes_later_is_an_error(function):
    model = UsesFunctions().eval()
    model.functions = ()
    fused = nin.fuse(model).model
    model.functions = fused.functions = (function,)
    x = torch.randn(1, 8, 3, 3)
    with pytest.raises(nin.errors.UserError, match=f"went into the autograd function {function.__name__}"):
        fused(x)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))


@pytest.mark.parametrize("which", range(4))
def test_a_forward_that_is_set_on_a_layer_keeps_its_gradients(which):
    model = block()
    results = []
    for network in (model, nin.fuse(model).model):
        forward = network[which].forward
        network[which].forward = lambda x, forward=forward: Square.apply(forward(Square.apply(x)))
        x = torch.linspace(-1, 1, 400).view(2, 8, 5, 5).requires_grad_()
        network(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in network.parameters())])
        network.zero_grad()
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


# -- what is done to a model after it was fused -------------------------------------------------------------------


def doubling_hook(module, args, output):
    return output * 2


def tripling_pre_hook(module, args):
    return (args[0] * 3,)


def wrap(module):
    forward = module.forward
    module.forward = lambda x: forward(x) * 2


def reflect(conv):
    conv.padding, conv.padding_mode, conv._reversed_padding_repeated_twice = (1, 1), "reflect", [1, 1, 1, 1]


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CHANGES = {
    "first replaced": lambda m: m.__setitem__(0, nn.Conv2d(8, 20, 1)),
    "norm replaced": lambda m: m.__setitem__(1, nn.BatchNorm2d(20, eps=0.3).eval()),
    "norm removed": lambda m: m.__setitem__(1, nn.Identity()),
    "norm is another": lambda m: m.__setitem__(1, nn.GroupNorm(4, 20)),
    "activation replaced": lambda m: m.__setitem__(2, nn.GELU()),
    "activation unknown": lambda m: m.__setitem__(2, nn.LeakyReLU(0.3)),
    "last replaced": lambda m: m.__setitem__(3, nn.Conv2d(20, 5, 3)),
    "last has groups": lambda m: m.__setitem__(3, nn.Conv2d(20, 8, 1, groups=4)),
    "last is transposed": lambda m: m.__setitem__(3, nn.ConvTranspose2d(20, 8, 2)),
    "layer deleted": lambda m: m.__delitem__(2),
    "layer inserted": lambda m: m.insert(2, nn.Tanh()) and None,
    "layer added": lambda m: m.append(nn.ReLU()) and None,
    **{f"hook on {i}": lambda m, i=i: m[i].register_forward_hook(doubling_hook) and None for i in range(4)},
    **{f"pre-hook on {i}": lambda m, i=i: m[i].register_forward_pre_hook(tripling_pre_hook) and None for i in range(4)},
    **{f"{i} compiled": lambda m, i=i: m[i].compile(backend="eager") for i in range(4)},
    **{f"forward of {i} wrapped": lambda m, i=i: wrap(m[i]) for i in range(4)},
    "first parametrised": lambda m: parametrizations.weight_norm(m[0]) and None,
    "last parametrised": lambda m: parametrizations.spectral_norm(m[3]) and None,
    "first pruned": lambda m: prune.ln_structured(m[0], "weight", 0.3, n=2, dim=0) is None or None,
    "last pruned": lambda m: prune.l1_unstructured(m[3], "weight", 30) is None or None,
    "last with the old weight_norm": lambda m: nn.utils.weight_norm(m[3]) and None,
    "bias removed": lambda m: setattr(m[0], "bias", None),
    "bias replaced": lambda m: setattr(m[3], "bias", nn.Parameter(torch.ones(8))),
    "eps": lambda m: setattr(m[1], "eps", 0.5),
    "norm without its own weights": lambda m: [setattr(m[1], name, None) for name in ("weight", "bias")] and None,
    "norm without statistics": lambda m: [setattr(m[1], f"running_{n}", None) for n in ("mean", "var")] and None,
    "norm trains": lambda m: m[1].train() and None,
    "norm trains with a plain average": lambda m: setattr(m[1].train(), "momentum", None),
    "training": lambda m: m.train() and None,
    "stride": lambda m: setattr(m[0], "stride", (2, 2)),
    "padding": lambda m: setattr(m[0], "padding", (1, 1)),
    "same padding": lambda m: setattr(m[0], "padding", "same"),
    "padding reflects": lambda m: reflect(m[0]),
    "copied deeply": copy.deepcopy,
    "copied": copy.copy,
    "pickled": lambda m: pickle.loads(pickle.dumps(m)),
    "saved": through_a_file,
    "in another container": lambda m: nn.Sequential(nn.ReLU(), m),
    "by hand": lambda m: lambda x: m[3](m[2](m[1](m[0](x)))),
    "the first alone": lambda m: m[0],
    "the first two": lambda m: m[:2],
    "the first one, then others": lambda m: lambda x: torch.cat([m[0](x), m[0](x)]).mean(1),
    "one image": lambda m: lambda x: m[3](m[0](x[0])),
    "as a function": lambda m: (
        lambda x: torch.func.functional_call(m, {k: 2 * v for k, v in m.state_dict().items()}, x)
    ),
    "in inference mode": lambda m: torch.inference_mode()(lambda x: m(x)),
    "vmap": lambda m: torch.vmap(lambda x: m(x[None])[0]),
    "traced by torch.fx": torch.fx.symbolic_trace,
    "traced by torch.jit": lambda m: torch.jit.trace(m, torch.ones(2, 8, 5, 5)),
    "scripted": torch.jit.script,
    "there and back": lambda m: m.double().float() and None,
    "in float64": lambda m: lambda x: m.double()(x.double()),
    "on the meta device and back": lambda m: m.to("meta").to_empty(device="cpu").apply(fill_with_ones) and None,
}


def fill_with_ones(module):
    with torch.no_grad():
        for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            t.fill_(1)


@pytest.mark.filterwarnings("ignore")  # of PyTorch, about its old functions
@pytest.mark.parametrize("name", CHANGES)
def test_what_is_done_to_a_fused_model_takes_effect(name):
    torch.manual_seed(0)
    model = block()
    fused = nin.fuse(model)
    assert [chain.layers for chain in fused.chains] == [("0", "3")]
    x, results = torch.randn(2, 8, 5, 5), []
    for network in (model, fused.model):
        with torch.no_grad():
            network(x)  # so that what is cached is cached
            torch.manual_seed(1)
            changed = CHANGES[name](network)
            changed = network if changed is None else changed
            results.append([changed(x), changed(2 * x)])
            if isinstance(changed, nn.Module) and not isinstance(changed, torch.jit.ScriptModule):
                results[-1] += list(changed.state_dict().values())
    assert all(type(t) is torch.Tensor for t in results[1])
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_run(which, register):
    model = block()
    results = []
    for network in (model, nin.fuse(model).model):
        seen = []
        getattr(network[which], register)(lambda module, *gradients, seen=seen: seen.extend(gradients))
        network(torch.linspace(-1, 1, 400).view(2, 8, 5, 5).requires_grad_()).sum().backward()
        results.append([g[0] for g in seen])
    assert len(results[0]) == len(results[1]) > 0
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_hooks_of_all_modules_run():
    model = block()
    fused = nin.fuse(model).model
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append((type(y), y.shape)))
    try:
        with torch.no_grad():
            fused(torch.randn(2, 8, 5, 5))
    finally:
        handle.remove()
    assert seen == [(torch.Tensor, (2, 20, 5, 5))] * 3 + [(torch.Tensor, (2, 8, 5, 5))] * 2


def test_the_pieces_that_are_hidden_are_never_given_away():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(8, 20, 1), nn.ReLU()), nn.Conv2d(20, 8, 1)).eval()
    fused = nin.fuse(model)
    assert [chain.layers for chain in fused.chains] == [("0.0", "1")]
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        assert type(fused.model[0](x)) is torch.Tensor
        torch.testing.assert_close(fused.model[0](x), model[0](x))
        seen = []
        fused.model[0].register_forward_hook(lambda module, args, y: seen.append(y))
        torch.testing.assert_close(fused.model(x), model(x), rtol=1e-5, atol=1e-6)
    assert type(seen[0]) is torch.Tensor


def test_a_chain_is_computed_as_one_operator(monkeypatch):
    calls = []
    run_chain = Chain.run
    monkeypatch.setattr(Chain, "run", lambda *args: calls.append(1) or run_chain(*args))
    monkeypatch.setattr(Pending, "compute", lambda this: pytest.fail("the layers were run one by one"))
    fused = nin.fuse(block()).model
    for network in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), nn.Sequential(nn.ReLU(), fused)):
        network(torch.randn(2, 8, 5, 5))
    assert len(calls) == 4


def test_fused_models_look_like_what_they_are():
    model = block()
    fused = nin.fuse(model).model
    assert str(fused) == str(model)
    assert type(fused) is type(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in model.named_modules()]
    assert all(isinstance(new, type(old)) for new, old in zip(fused.modules(), model.modules(), strict=True))
    again = nin.fuse(fused)
    assert [chain.layers for chain in again.chains] == [("0", "3")]
    assert nin.cost(fused, (1, 8, 5, 5)) == nin.cost(model, (1, 8, 5, 5))


def test_modes_of_single_modules_stay():
    model = block().train()
    model[1].eval()
    fused = nin.fuse(model, torch.randn(2, 8, 5, 5), runs=2).model
    assert [module.training for module in fused.modules()] == [module.training for module in model.modules()]


def test_fusing_in_inference_mode_gives_a_model_that_can_be_trained():
    with torch.inference_mode():
        fused = nin.fuse(block(), torch.randn(2, 8, 5, 5), runs=2).model
        fused(torch.randn(2, 8, 5, 5))
    fused(torch.randn(2, 8, 5, 5).requires_grad_()).sum().backward()
    assert all(p.grad is not None for p in fused.parameters())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_fused_models_go_to_other_processes(method):
    fused = nin.fuse(block()).model
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        wanted = fused(x)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # PyTorch's threads do not survive a fork
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(sender, fused, x.numpy()))
    process.start()
    try:
        assert receiver.poll(120)
        got = receiver.recv()
    finally:
        process.join()
        torch.set_num_threads(threads)
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-6)


def answer(sender, model, x):
    torch.set_num_threads(1)
    with torch.no_grad():
        sender.send(model(torch.from_numpy(x)).numpy())


# -- folded weights ------------------------------------------------------------------------------------------------


def measure_statistics(model):
    model.train()
    for _ in range(3):
        model(3 + 2 * torch.randn(4, 8, 5, 5))
    model.eval()


def train(model, **options):
    optimizer = torch.optim.AdamW(model.parameters(), 0.05, **options)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.enable_grad():
            model(torch.randn(2, 8, 5, 5)).square().sum().backward()
        optimizer.step()


WRITES = {
    "statistics measured": measure_statistics,
    "fused optimiser": lambda m: train(m, fused=True),
    "foreach optimiser": lambda m: train(m, foreach=True),
    "through data": lambda m: [p.data.mul_(1.5) for p in m.parameters()],
    "one value through data": lambda m: m[0].weight.data[3, 2].fill_(7),
    "one variance in NumPy": lambda m: m[1].running_var.numpy().__setitem__(4, 9),
    "one weight in NumPy": lambda m: m[0].weight.detach().numpy().__setitem__((4, 1), 9),
    "data replaced": lambda m: setattr(m[0].weight, "data", torch.ones(20, 8, 1, 1)),
    "swapped": lambda m: torch.utils.swap_tensors(m[0].weight, nn.Parameter(torch.ones(20, 8, 1, 1))),
    "set": lambda m: m[0].weight.data.set_(torch.ones(20, 8, 1, 1)),
    "norm's bias": lambda m: m[1].bias.data.fill_(3),
    "averaged": lambda m: torch.optim.swa_utils.AveragedModel(block()).module.load_state_dict(m.state_dict()),
    "loaded": lambda m: m.load_state_dict({name: t + 1 for name, t in m.state_dict().items()}),
    "assigned": lambda m: m.load_state_dict({name: t + 1 for name, t in m.state_dict().items()}, assign=True),
    "from a vector": lambda m: nn.utils.vector_to_parameters(
        torch.linspace(-1, 1, sum(p.numel() for p in m.parameters())), m.parameters()
    ),
}


@pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", WRITES)
def test_folded_weights_are_always_fresh(name, no_gradients):
    fused = nin.fuse(block()).model
    x = torch.randn(2, 8, 5, 5)
    for _ in range(3):
        with no_gradients():
            before = fused(x)
        with torch.no_grad():
            torch.manual_seed(2)
            WRITES[name](fused)
        plain = block()
        plain.load_state_dict(fused.state_dict())
        with no_gradients():
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
            assert name in ("averaged", "loaded", "assigned") or before.shape == x.shape


def test_folded_weights_are_kept(monkeypatch):
    fused = nin.fuse(block())
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        fused.model(x)
        (kept,) = (chain.chain._folded for chain in fused.chains)
        if kept is None:
            pytest.skip("without the compiled library they are folded in every call")
        fused.model(x)
        assert fused.chains[0].chain._folded is kept
