"""`fuse`: find the chains of a model, let their first layers begin them, and keep what is faster."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from nin.errors import UserError
from nin.fusion.chain import Chain, Place
from nin.fusion.compiled import CompiledNetwork
from nin.fusion.heads import HEADS, begin_chain
from nin.fusion.link import Link
from nin.fusion.match import ChainMatch
from nin.fusion.matcher import Tracer, is_operator, match_chains
from nin.fusion.node_roles import is_pointwise, unsupported_reason
from nin.runtime.fx_trace import TracingError, trace_forward, unchanged_randomness
from nin.runtime.model_copy import copy_model
from nin.runtime.timer import Timing, time_interleaved

# A form must take less than this fraction of the original's time: a smaller gain is within the noise of the clock.
LARGEST_TIME_RATIO = 0.97

# In a line of text that stands for all layers of a kind.
MOST_NAMES = 4

# Rounds of timing between forms of a compiled network.
COMPILE_RUNS = 9

_Chains = dict[tuple[str, ...], Chain]  # by the names of their layers in the whole model


@dataclasses.dataclass(frozen=True)
class FusedChain:
    """A chain of the fused model.

    Attributes:
        layers: names of its convolutions or fully connected layers.
        form: how it is computed, one of `CHAIN_FORMS`; "original" where nothing was faster.
        form_alone: the fastest when the chain is timed by itself; other than ``form`` where the whole model decided.
        times: of each form that was measured, on the chain's input in a run on the example.
        chain: how it is computed.
    """

    layers: tuple[str, ...]
    form: str
    form_alone: str
    times: dict[str, Timing]
    chain: Chain = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, repr=False)
class FuseResult:
    """The result of `fuse`.

    Attributes:
        model: the faster model. Its ``state_dict`` has the keys and tensors of the original's.
        chains: its chains.
        left: names of 1×1 layers that are in no chain, with the reason.
        before: time of the original model on the example, or None without an example.
        after: time of the faster model.
        example: the inputs that it was made for, or none.
    """

    model: nn.Module
    chains: tuple[FusedChain, ...]
    left: dict[str, str]
    before: Timing | None
    after: Timing | None
    example: tuple[Any, ...] = ()

    def __str__(self) -> str:
        """Return a line for each form of chains, and for each reason why layers are in none; rich shows all."""
        lines = [] if self.speedup is None else [f"the whole model: {self.speedup:.2f}× as fast"]
        groups: dict[str, list[str]] = {}
        for chain in self.chains:
            if ", ".join(chain.layers) not in self.left:
                groups.setdefault(chain.form, []).append(" → ".join(chain.layers))
        for name, reason in self.left.items():
            groups.setdefault(f"left, {reason}", []).append(name)
        for group, names in groups.items():
            more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
            lines.append(f"{', '.join(names[:MOST_NAMES])}{more}: {group}")
        return "\n".join(lines) or "no 1×1 layers"

    __repr__ = __str__

    @property
    def speedup(self) -> float | None:
        """The time before over the time after, or None without an example."""
        return None if self.before is None or self.after is None else self.before.median_ms / self.after.median_ms

    def compile(self) -> CompiledNetwork:
        """Return the model as it is now for inference on the CPU: recorded steps, most of them in one native call.

        Where the chains may have several forms and there is an example, they are timed in it: without modules around
        each of them, more chains gain from the operator.

        Raises:
            UserError: the model was fused for training.
        """
        if any(chain.chain.training for chain in self.chains):
            raise UserError("compile() is for inference: fuse the model without training=True")
        alone = {chain.layers[0]: chain.form_alone for chain in self.chains}
        operators = dict.fromkeys(alone, "operator")
        compiled = CompiledNetwork(_with_forms(self.model, alone), copies=False)
        if alone == operators or not self.example:
            return compiled
        other = CompiledNetwork(_with_forms(self.model, operators), copies=False)
        calls: dict[str, Callable[[], object]] = {
            "alone": functools.partial(compiled, *self.example),
            "operators": functools.partial(other, *self.example),
        }
        times = time_interleaved(calls, runs=COMPILE_RUNS)
        return compiled if times["alone"].median_ms <= times["operators"].median_ms else other

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
    evaluation) and ReLU, GELU or SiLU after it; an inverted bottleneck ([1×1,] depthwise k×k, 1×1; ReLU6 and hardswish
    too); ConvNeXt's block (depthwise k×k, LayerNorm, two 1×1 or fully connected layers, scale, residual); or fully
    connected layers on every pixel. Its hidden values stay in the cache, see `nin.mlpconv` and
    `nin.inverted_bottleneck`. The model keeps its classes, its parameters and their names; in the other mode, training
    or evaluation, it runs as before.

    Its forward is the model's own and runs in every call, so what is done to the model afterwards, such as a hook or
    another weight, takes effect. For inference on the CPU that is as fast as it can be, ``compile()`` of the result
    makes a snapshot whose steps run without Python between them.

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
    # ordinary tensors, even where the caller is in inference mode
    with torch.inference_mode(False):
        new = copy_model(model)
        modes = {module: module.training for module in new.modules()}
        found = _find_chains(new, training=training)
    chains, unfused = found.chains, found.unfused
    times: dict[tuple[str, ...], dict[str, Timing]] = {}
    before = after = None
    inputs: tuple[Any, ...] = ()
    if example is not None:
        inputs = example if isinstance(example, tuple) else (example,)
        new.train(training)
        times = _choose_forms(new, inputs, chains, runs)
    alone = {layers: chain.form for layers, chain in chains.items()}
    if example is not None:
        before, after = _measure(copy_model(model).train(training), new, chains, inputs, runs)
        if after.median_ms > before.median_ms:  # each is faster alone, but not all together
            reason = f"the whole model took {after.median_ms:.2f} ms with them and {before.median_ms:.2f} ms without"
            unfused.update(dict.fromkeys(map(", ".join, chains), reason))
            for chain in chains.values():
                chain.form = "original"
            # every layer runs as in the original: a second measurement would tell the noise of the clock
            after = before
        for module, mode in modes.items():
            module.training = mode
    fused = tuple(FusedChain(names, c.form, alone[names], times.get(names, {}), c) for names, c in chains.items())
    return FuseResult(new, fused, unfused, before, after, inputs)


def _with_forms(model: nn.Module, forms: dict[str, str]) -> nn.Module:
    """Return a copy of a fused model in which chains have these forms, by the names of their first layers."""
    new = copy_model(model, keep_fused=True)
    for name, form in forms.items():
        chain: Any = getattr(new.get_submodule(name), "nin_chain", None)
        if isinstance(chain, Chain):
            chain.form = form
    return new


@dataclasses.dataclass
class _Found:
    """What `fuse` finds in a model.

    Attributes:
        chains: by the names of their layers.
        unfused: the reason why other 1×1 layers are in none, by the layer's name.
        untraced: the reason why a module cannot be traced, by its name.
    """

    chains: _Chains = dataclasses.field(default_factory=dict)
    unfused: dict[str, str] = dataclasses.field(default_factory=dict)
    untraced: dict[str, str] = dataclasses.field(default_factory=dict)


def _find_chains(model: nn.Module, *, training: bool) -> _Found:
    """Find the chains of a model and let their first layers begin them, in place.

    Tracing runs the forwards once, on a copy: they may count their calls.
    """
    shared = {id(p): p for p in model.parameters()}  # torch.fx only records what is done to them
    traced = copy_model(model, shared).train(training)
    found = _Found()
    with unchanged_randomness():
        _find_in(traced, "", model, found)
    in_chains, unfused, untraced = set(itertools.chain(*found.chains)), found.unfused, found.untraced
    own = {f"{name}." for name, module in model.named_modules() if is_operator(module)}
    for name, module in model.named_modules():
        known = name in in_chains or name in unfused or name.startswith(tuple(own))
        if not known and is_pointwise(module):
            around = max((path for path in untraced if not path or name.startswith(f"{path}.")), key=len, default=None)
            reason = "it is not called" if around is None else untraced[around]
            unfused[name] = unsupported_reason(module, 1, first=True) or reason
    return found


def _find_in(traced: nn.Module, path: str, model: nn.Module, found: _Found) -> None:
    """Find the chains of a module of the traced copy, or of its children where it cannot be traced."""
    if is_operator(traced) or not any(traced.children()):
        return
    tracer = Tracer()
    try:
        graph = trace_forward(traced, tracer)
    except TracingError as error:
        found.untraced[path] = f"{f'{path}: ' if path else ''}{error}"
        for name, child in traced.named_children():
            _find_in(child, _join(path, name), model, found)
        return
    matches, reasons = match_chains(traced, graph, tracer.kept_nodes())
    found.unfused |= {_join(path, name): reason for name, reason in reasons.items()}
    root = model.get_submodule(path)
    for match in matches:
        layers = tuple(_join(path, name) for name in match.layer_names)
        places, callers = _surroundings(root, match)
        head = root.get_submodule(match.layer_names[0])
        if not all(place.is_as_before() for place in places):
            found.unfused |= dict.fromkeys(layers, "a hook looks at it")
        elif type(head) not in HEADS:
            found.unfused |= dict.fromkeys(layers, "it is called more than once")
        else:
            convolves = isinstance(head, nn.Conv2d)
            steps = tuple(match.steps)
            found.chains[layers] = Chain(
                steps,
                training=traced.training,
                places=places,
                callers=callers,
                convolves=convolves,
                bottleneck=match.bottleneck,
            )
            begin_chain(head, found.chains[layers])


def _surroundings(root: nn.Module, match: ChainMatch) -> tuple[tuple[Place, ...], tuple[nn.Module, ...]]:
    """Return the modules of a chain, with those around them that hold a part of it, and what calls the first layer.

    Args:
        root: the module that was traced.
        match: a chain in its graph.
    """
    stacks = [[name for name, _ in node.meta.get("nn_module_stack", {}).values()] for node in match.nodes]
    # of forwards: a module that is a node of the graph is in its own stack
    forwards = [s[:-1] if node.op == "call_module" else s for s, node in zip(stacks, match.nodes, strict=True)]
    common = len(list(itertools.takewhile(lambda names: len(set(names)) == 1, zip(*forwards, strict=False))))
    owner = forwards[0][common - 1] if common else ""
    paths = {name for stack in stacks for name in stack[common:]}
    paths |= {_join(path, name) for path in paths for name, _ in root.get_submodule(path).named_modules()}
    prefixes = {".".join(parts[:n]) for parts in (path.split(".") for path in paths) for n in range(1, len(parts) + 1)}
    places = []
    for path in sorted(prefix for prefix in prefixes if not owner or prefix.startswith(f"{owner}.")):
        parent, _, name = path.rpartition(".")
        places.append(Place(root.get_submodule(parent), name, root.get_submodule(path)))
    callers = [*reversed(forwards[0][common:]), owner]
    return tuple(places), tuple(root.get_submodule(name) for name in callers)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


@torch.no_grad()
def _choose_forms(
    model: nn.Module, inputs: tuple[Any, ...], chains: _Chains, runs: int
) -> dict[tuple[str, ...], dict[str, Timing]]:
    """Time every chain on its input in a run of the model, and set its fastest form."""
    for chain in chains.values():
        chain.watches = True
    model(*inputs)
    times = {}
    for layers, chain in chains.items():
        seen, chain.watches, chain.seen = chain.seen, False, None
        if seen is None:  # not called
            continue
        timed = time_interleaved(
            {form: functools.partial(_run_form, chain, form, *seen) for form in chain.forms_for(seen[0])}, runs=runs
        )
        best = min(timed, key=lambda form: timed[form].median_ms)
        chain.form = best if timed[best].median_ms < LARGEST_TIME_RATIO * timed["original"].median_ms else "original"
        times[layers] = timed
    return times


def _run_form(chain: Chain, form: str, x: Tensor, links: list[Link]) -> Tensor:
    chain.form = form
    return chain.run(x, links)


@torch.no_grad()
def _measure(
    plain: nn.Module, new: nn.Module, chains: _Chains, inputs: tuple[Any, ...], runs: int
) -> tuple[Timing, Timing]:
    """Time the original and the new model in turn; let all chains be operators where that is faster as a whole."""
    models = {"before": plain, "after": new}
    others = [chain for chain in chains.values() if chain.form != "operator"]
    if others:
        models["operators"] = copy_model(new, keep_fused=True)
        for module in models["operators"].modules():
            if isinstance(chain := getattr(module, "nin_chain", None), Chain):
                chain.form = "operator"
    timed = time_interleaved({name: functools.partial(m, *inputs) for name, m in models.items()}, runs=runs)
    if others and timed["operators"].median_ms < timed["after"].median_ms:
        for chain in others:
            chain.form = "operator"
        timed["after"] = timed["operators"]
    return timed["before"], timed["after"]
