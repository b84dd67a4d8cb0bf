"""`fuse`: the chains of a model are found, put into its forward, and measured."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, fx, nn

from nin.fusion.chain import Chain
from nin.fusion.matcher import Found, Tracer, find_chains
from nin.layers import Conv1x1, MLPConv
from nin.runtime.fx_trace import TracingError, trace
from nin.runtime.timer import Timing, time_interleaved

# A form must be so much faster than the layers as they are before it takes their place.
MARGIN = 0.97


@dataclasses.dataclass(frozen=True)
class FusedChain:
    """What became of one chain.

    Attributes:
        layers: names of its convolutions or fully connected layers.
        form: how it is computed, one of `FORMS`; "original" where nothing was faster.
        times: of each form that was measured, on what the chain sees in a run on the example.
        chain: the module that computes it.
    """

    layers: tuple[str, ...]
    form: str
    times: dict[str, Timing]
    chain: Chain = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Fused:
    """What `fuse` made.

    Attributes:
        model: the faster model. Its ``state_dict`` has the keys and tensors of the original's.
        chains: what was found.
        left: names of 1×1 layers that are in no chain, with the reason.
        before: the original model on the example, or None where there was none.
        after: the faster model on it.
    """

    model: nn.Module
    chains: tuple[FusedChain, ...]
    left: dict[str, str]
    before: Timing | None
    after: Timing | None

    @property
    def speedup(self) -> float | None:
        """Time before over time after."""
        return None if self.before is None or self.after is None else self.before.median_ms / self.after.median_ms

    def __rich__(self) -> Table:
        """Return the table that the terminal shows."""
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


def fuse(model: nn.Module, example: Any = None, *, training: bool = False, runs: int = 9) -> Fused:
    """Let the 1×1 chains of a model run as one operator each, where that is faster.

    A chain is a convolution (1×1, or k×k with groups = 1), then 1×1 convolutions, with BatchNorm (folded, in
    evaluation) and ReLU, GELU or SiLU between and behind them; or fully connected layers that look at every place
    alone. Its hidden values stay in the cache, see `nin.mlpconv`. The model keeps its classes, its parameters and
    their names; in the mode that was not asked for it runs as before.

    Args:
        model: any PyTorch model; it is left as it is. Parts that cannot be traced stay as they are.
        example: an input (or a tuple of them) of the size, layout and dtype that counts. With it, every chain is
            timed in each of its forms and computed in the fastest, and the model as a whole: where it is slower
            with them, all chains stay as they were. Without it, all become the operator.
        training: fuse what runs in training; chains end at a BatchNorm then, and at dropout.
        runs: rounds of timing.

    Returns:
        The model and what became of each chain.

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
    chains: dict[str, Chain] = {}
    left: dict[str, str] = {}
    new = _fuse_below(new, "", chains, left).train(mode)
    times: dict[str, dict[str, Timing]] = {}
    before = after = None
    if example is not None:
        inputs = example if isinstance(example, tuple) else (example,)
        new.train(training)
        times = _choose_forms(new, inputs, chains, runs)
        plain = copy.deepcopy(model).train(training)
        before, after = _measure(plain, new, inputs, runs)
        if after.median_ms > before.median_ms:  # chains that are faster alone, and not among the others
            reason = f"the whole model took {after.median_ms:.2f} ms with them and {before.median_ms:.2f} ms without"
            left.update(dict.fromkeys((", ".join(key.split("|")) for key in chains), reason))
            for chain in chains.values():
                chain.form = "original"
            before, after = _measure(plain, new, inputs, runs)
        new.train(mode)
    found = (FusedChain(tuple(key.split("|")), c.form, times.get(key, {}), c) for key, c in chains.items())
    return Fused(new, tuple(found), left, before, after)


def _fuse_below(module: nn.Module, path: str, chains: dict[str, Chain], left: dict[str, str]) -> nn.Module:
    """Fuse a module, or its children where it cannot be traced; return it."""
    if isinstance(module, MLPConv | Conv1x1 | Chain) or not any(module.children()) or _is_hooked(module):
        return module
    graph = _trace(module, path)
    if graph is None:
        for name, child in module.named_children():
            setattr(module, name, _fuse_below(child, _join(path, name), chains, left))
        return module
    found, reasons = find_chains(module, graph)
    left |= {_join(path, name): reason for name, reason in reasons.items()}
    # each chain goes into the smallest module that holds all of it, so that the classes above stay what they are
    for owner in sorted({_owner(chain) for chain in found}, key=lambda name: -name.count(".") - bool(name)):
        _rewrite(module.get_submodule(owner), _join(path, owner), chains)
    return module


def _rewrite(module: nn.Module, path: str, chains: dict[str, Chain]) -> None:
    """Put the chains of one module into its forward."""
    graph = _trace(module, path)
    if graph is None or _is_hooked(module):
        return
    found, _ = find_chains(module, graph)
    for number, chain in enumerate(found):
        name = f"nin_chain_{number}"
        made = Chain(chain.links, _join(path, name))
        vars(module)[name] = made  # past the registration of children, see `Tracer.path_of_module`
        chains["|".join(_join(path, layer) for layer in chain.names)] = made
        last = chain.nodes[-1]
        with graph.inserting_after(last):
            node = graph.call_module(name, args=chain.nodes[0].args[:1])
        last.replace_all_uses_with(node)
        for old in reversed(chain.nodes):
            graph.erase_node(old)
    if found:
        graph.lint()
        _replace_forward(module, type(fx.GraphModule(module, graph)).forward)


def _replace_forward(module: nn.Module, fused: Callable[..., Any]) -> None:
    """Give the module a subclass of its class whose forward is fused where it is called as it was traced.

    That is in the same mode, and with nothing given that has a default: what `if extra is None` decides in a forward
    is decided in the graph.
    """
    original, traced, required = type(module).forward, module.training, len(_parameters(module)[0])

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        as_traced = self.training == traced and len(args) == required and not kwargs
        return (fused if as_traced else original)(self, *args, **kwargs)

    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__doc__": kind.__doc__})


def _trace(module: nn.Module, path: str) -> fx.Graph | None:
    """Return the module's graph, or None where it has control flow or the like."""
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


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _owner(chain: Found) -> str:
    """Return the name of the smallest module that all nodes of a chain run in."""
    stacks = []
    for node in chain.nodes:
        stack = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
        stacks.append(stack[:-1] if node.op == "call_module" else stack)
    common = ""
    for names in zip(*stacks, strict=False):
        if len(set(names)) > 1:
            break
        common = names[0]
    return common


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


@torch.no_grad()
def _choose_forms(
    model: nn.Module, inputs: tuple[Any, ...], chains: dict[str, Chain], runs: int
) -> dict[str, dict[str, Timing]]:
    """Time every chain on what it sees, and let it run in its fastest form."""
    seen: dict[str, Tensor] = {}
    hooks = [
        chain.register_forward_pre_hook(lambda _, args, key=key: seen.update({key: args[0].clone()}))
        for key, chain in chains.items()
    ]
    model(*inputs)
    for hook in hooks:
        hook.remove()
    times = {}
    for key, x in seen.items():
        chain = chains[key]

        def run(form: str, chain: Chain = chain, x: Tensor = x) -> Tensor:
            chain.form = form
            return chain(x)

        timed = time_interleaved({form: lambda form=form: run(form) for form in chain.forms}, runs=runs)  # type: ignore[misc]
        best = min(timed, key=lambda form: timed[form].median_ms)
        chain.form = best if timed[best].median_ms < MARGIN * timed["original"].median_ms else "original"
        times[key] = timed
    return times


@torch.no_grad()
def _measure(before: nn.Module, after: nn.Module, inputs: tuple[Any, ...], runs: int) -> tuple[Timing, Timing]:
    """Time both models in turn."""
    timed = time_interleaved({"before": lambda: before(*inputs), "after": lambda: after(*inputs)}, runs=runs)
    return timed["before"], timed["after"]
