"""`fuse`: match the chains of a model, rewrite the forwards of its modules, and keep what is faster."""

import copy
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, fx, nn

from nin.fusion.chain import Chain
from nin.fusion.matcher import ChainMatch, Tracer, is_hooked, match_chains
from nin.layers import Conv1x1, MLPConv
from nin.runtime.fx_trace import TracingError, trace
from nin.runtime.timer import Timing, time_interleaved

# A form must take less than this fraction of the original's time: a smaller gain is within the noise of the clock.
LARGEST_TIME_RATIO = 0.97

_Chains = dict[tuple[str, ...], Chain]  # by the names of their layers in the whole model


@dataclasses.dataclass(frozen=True)
class FusedChain:
    """A chain of the fused model.

    Attributes:
        layers: names of its convolutions or fully connected layers.
        form: how it is computed, one of `CHAIN_FORMS`; "original" where nothing was faster.
        times: of each form that was measured, on the chain's input in a run on the example.
        chain: the module that computes it.
    """

    layers: tuple[str, ...]
    form: str
    times: dict[str, Timing]
    chain: Chain = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class FuseResult:
    """The result of `fuse`.

    Attributes:
        model: the faster model. Its ``state_dict`` has the keys and tensors of the original's.
        chains: its chains.
        left: names of 1×1 layers that are in no chain, with the reason.
        before: time of the original model on the example, or None without an example.
        after: time of the faster model.
    """

    model: nn.Module
    chains: tuple[FusedChain, ...]
    left: dict[str, str]
    before: Timing | None
    after: Timing | None

    @property
    def speedup(self) -> float | None:
        """The time before over the time after, or None without an example."""
        return None if self.before is None or self.after is None else self.before.median_ms / self.after.median_ms

    def __rich__(self) -> Table:
        """Return a table of the chains, and of the layers that are in none, for rich."""
        title = "" if self.speedup is None else f"the whole model: {self.speedup:.2f}× as fast"
        table = Table("layers", "computed as", "ms before", "ms after", title=title)
        for chain in self.chains:
            times = [chain.times.get(form) for form in ("original", chain.form)]
            table.add_row(
                " → ".join(chain.layers), chain.form, *("" if t is None else f"{t.median_ms:.3f}" for t in times)
            )
        for name, reason in self.left.items():
            table.add_row(name, f"left: {reason}", "", "")
        return table


def fuse(model: nn.Module, example: Any = None, *, training: bool = False, runs: int = 9) -> FuseResult:
    """Return a model whose 1×1 chains run as one operator each, where that is faster.

    A chain is a convolution (1×1, or k×k with groups = 1), then 1×1 convolutions, each with BatchNorm (folded, in
    evaluation) and ReLU, GELU or SiLU after it; or fully connected layers on every pixel. Its hidden values stay in the
    cache, see `nin.mlpconv`. The model keeps its classes, its parameters and their names; in the other mode, training
    or evaluation, it runs as before.

    Args:
        model: any PyTorch model; it is not changed. Modules that cannot be traced stay as they are.
        example: an input (or a tuple of them) of the shape, memory format and dtype to optimise for. With it, every
            chain is timed in each of its forms and computed in the fastest; and where the whole model is slower with
            its chains, none is kept. Without it, all become the operator.
        training: fuse for training; chains end at a BatchNorm then, and at dropout.
        runs: rounds of timing.

    Returns:
        The fused model, its chains, and the 1×1 layers in none.

    Raises:
        TypeError: the model is no module.

    Example:
        >>> block = torch.nn.Sequential(torch.nn.Conv2d(64, 128, 1), torch.nn.ReLU(), torch.nn.Conv2d(128, 64, 1))
        >>> fused = nin.fuse(block)
        >>> fused.chains[0].layers
        ('0', '2')
        >>> x = torch.randn(2, 64, 8, 8)
        >>> torch.allclose(fused.model(x), block(x), atol=1e-5)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    mode = model.training
    new = copy.deepcopy(model).train(training)
    chains: _Chains = {}
    unfused: dict[str, str] = {}
    new = _fuse_module(new, "", chains, unfused).train(mode)
    times: dict[tuple[str, ...], dict[str, Timing]] = {}
    before = after = None
    if example is not None:
        inputs = example if isinstance(example, tuple) else (example,)
        new.train(training)
        times = _choose_forms(new, inputs, chains, runs)
        plain = copy.deepcopy(model).train(training)
        before, after = _measure(plain, new, inputs, runs)
        if after.median_ms > before.median_ms:  # each is faster alone, but not all together
            reason = f"the whole model took {after.median_ms:.2f} ms with them and {before.median_ms:.2f} ms without"
            unfused.update(dict.fromkeys(map(", ".join, chains), reason))
            for chain in chains.values():
                chain.form = "original"
            before, after = _measure(plain, new, inputs, runs)
        new.train(mode)
    found = tuple(FusedChain(layers, c.form, times.get(layers, {}), c) for layers, c in chains.items())
    return FuseResult(new, found, unfused, before, after)


def _fuse_module(module: nn.Module, path: str, chains: _Chains, unfused: dict[str, str]) -> nn.Module:
    """Fuse a module in place, or its children where it cannot be traced; return it."""
    if isinstance(module, MLPConv | Conv1x1 | Chain) or not any(module.children()) or is_hooked(module):
        return module
    graph = _trace(module, path)
    if graph is None:
        for name, child in module.named_children():
            setattr(module, name, _fuse_module(child, _join(path, name), chains, unfused))
        return module
    matches, reasons = match_chains(module, graph)
    unfused |= {_join(path, name): reason for name, reason in reasons.items()}
    # Each chain goes into the smallest module with all of its layers, so that the classes above stay what they are;
    # inner modules first, as their chains are then leaves in the graphs of the outer ones.
    for owner in sorted({_smallest_owner(match) for match in matches}, key=lambda name: -name.count(".") - bool(name)):
        _insert_chains(module.get_submodule(owner), _join(path, owner), chains)
    return module


def _insert_chains(module: nn.Module, path: str, chains: _Chains) -> None:
    """Replace the nodes of a module's chains in its forward by calls of `Chain`."""
    graph = _trace(module, path)
    if graph is None or is_hooked(module):
        return
    matches, _ = match_chains(module, graph)
    for number, match in enumerate(matches):
        name = f"nin_chain_{number}"
        chain = Chain(match.links, _join(path, name))
        vars(module)[name] = chain  # not registered: who runs a module's children one by one must not run it
        chains[tuple(_join(path, layer) for layer in match.layer_names)] = chain
        last = match.nodes[-1]
        with graph.inserting_after(last):
            node = graph.call_module(name, args=match.nodes[0].args[:1])
        last.replace_all_uses_with(node)
        for old in reversed(match.nodes):
            graph.erase_node(old)
    if matches:
        graph.lint()
        _replace_forward(module, type(fx.GraphModule(module, graph)).forward)


def _replace_forward(module: nn.Module, fused: Callable[..., Any]) -> None:
    """Give the module a subclass of its class, whose forward is fused where it is called as it was traced.

    That is in the same mode, and without the arguments that have a default: the graph holds the branch that a condition
    such as ``if mask is None`` took for the defaults.
    """
    original, traced, required = type(module).forward, module.training, len(_parameters(module)[0])

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        as_traced = self.training == traced and len(args) == required and not kwargs
        return (fused if as_traced else original)(self, *args, **kwargs)

    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__doc__": kind.__doc__})


def _trace(module: nn.Module, path: str) -> fx.Graph | None:
    """Return the module's graph, or None where it cannot be traced."""
    required, optional = _parameters(module)
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in required):
        return None
    try:
        return trace(module, Tracer(path), {p.name: p.default for p in optional})
    except TracingError:
        return None


def _parameters(module: nn.Module) -> tuple[list[inspect.Parameter], list[inspect.Parameter]]:
    """Return the parameters of a module's forward that must be given, and those with a default."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    optional = [p for p in parameters if p.default is not p.empty]
    return [p for p in parameters if p.default is p.empty], optional


def _smallest_owner(match: ChainMatch) -> str:
    """Return the name of the smallest module in which all nodes of a chain run."""
    stacks = []
    for node in match.nodes:
        stack = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
        stacks.append(stack[:-1] if node.op == "call_module" else stack)
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*stacks, strict=False))
    return next((names[0] for names in reversed(list(shared))), "")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


@torch.no_grad()
def _choose_forms(
    model: nn.Module, inputs: tuple[Any, ...], chains: _Chains, runs: int
) -> dict[tuple[str, ...], dict[str, Timing]]:
    """Time every chain on its input in a run of the model, and set its fastest form."""
    chain_inputs: dict[tuple[str, ...], Tensor] = {}
    hooks = [
        chain.register_forward_pre_hook(lambda _, args, key=key: chain_inputs.update({key: args[0].clone()}))
        for key, chain in chains.items()
    ]
    model(*inputs)
    for hook in hooks:
        hook.remove()
    times = {}
    for key, x in chain_inputs.items():
        chain = chains[key]
        timed = time_interleaved(
            {form: functools.partial(_run_form, chain, form, x) for form in chain.forms}, runs=runs
        )
        best = min(timed, key=lambda form: timed[form].median_ms)
        chain.form = best if timed[best].median_ms < LARGEST_TIME_RATIO * timed["original"].median_ms else "original"
        times[key] = timed
    return times


def _run_form(chain: Chain, form: str, x: Tensor) -> Tensor:
    chain.form = form
    return chain(x)


@torch.no_grad()
def _measure(before: nn.Module, after: nn.Module, inputs: tuple[Any, ...], runs: int) -> tuple[Timing, Timing]:
    """Time both models in turn."""
    timed = time_interleaved({"before": lambda: before(*inputs), "after": lambda: after(*inputs)}, runs=runs)
    return timed["before"], timed["after"]
