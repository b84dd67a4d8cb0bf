"""Program: the inference of a whole fused network as a list of steps, recorded once and run without its modules."""

import sys
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from nin.fusion.program_guards import ModuleState
from nin.fusion.program_plan import Plan
from nin.fusion.program_record import NotRecordableError, Recorder
from nin.fusion.program_trace import NetworkGraph, is_traceable, trace_network
from nin.ops.cpu import abi, dispatch
from nin.ops.cpu.library import Kernels
from nin.ops.cpu.weight_watch import WatchedTensors
from nin.ops.transforms import is_plain
from nin.runtime.fx_trace import unchanged_randomness

_ATTRIBUTE = "_nin_program"
_NOT_RUN = object()

# Plans of other shapes before the oldest goes, and graphs of other states before a network is left as it is.
MAX_PLANS, MAX_GRAPHS = 16, 8
# Plans of a graph that went for another: where so many shapes take turns, recording costs more than it saves.
MAX_EVICTIONS = 64


class _Made(NamedTuple):
    plan: Plan
    sources: WatchedTensors


class Program:
    """Runs a network's inference on the CPU in float32 as a list of steps.

    It stands in ``module._compiled_call_impl``, where ``module.compile()`` puts what it made: a call of the module
    comes here first. For each shape the steps are recorded once, on a copy of the inputs (`Recorder`), and run from
    then on, to the same bits. Whatever is no plain inference goes the usual way, through the modules: gradients,
    training, hooks, autocast, transforms, modes, tracing, other dtypes and devices. A change of the modules
    (`ModuleState`) makes another graph, a change of a weight (`WatchedTensors`) another plan.

    Args:
        module: the network.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._lock = threading.Lock()
        self._network: NetworkGraph | None = None
        self._graphs = self._evictions = 0
        self._plans: dict[Any, _Made] = {}
        self._next_state: ModuleState | None = None
        vars(module).update({_ATTRIBUTE: self, "_compiled_call_impl": self})

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle only what it is for: a copy of the network records for itself."""
        return Program, (self._module,)

    def forget(self) -> None:
        """Record again, as the chains' forms have changed."""
        self._plans = {}

    def make_plain(self) -> None:
        """Leave the network, in place."""
        kept = vars(self._module)
        kept.pop(_ATTRIBUTE, None)
        if kept.get("_compiled_call_impl") is self:
            del kept["_compiled_call_impl"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the network's result."""
        if torch.compiler.is_compiling():
            return self._module._call_impl(*args, **kwargs)
        result = _NOT_RUN if kwargs or not args else self._run(args)
        if result is not _NOT_RUN:
            return result
        # of the module that was called: a replica of nn.DataParallel has the original's attributes
        called = sys._getframe(1).f_locals.get("self")
        module = called if isinstance(called, nn.Module) and vars(called).get(_ATTRIBUTE) is self else self._module
        return module._call_impl(*args, **kwargs)

    def _run(self, args: tuple[Any, ...]) -> Any:
        kernels = dispatch.KERNELS
        if kernels is None or self._graphs > MAX_GRAPHS or self._module.training:
            return _NOT_RUN
        if not is_plain(args) or not _is_usual(args):
            return _NOT_RUN
        network = self._network
        if network is None or not network.state.holds():
            network = self._trace()
        if network is None or len(args) != len(network.inputs):
            return _NOT_RUN
        if torch.is_grad_enabled() and (any(x.requires_grad for x in args) or network.state.wants_gradients()):
            return _NOT_RUN
        key = (kernels.name, abi.WINOGRAD, *((x.shape, x.stride(), x.dtype) for x in args))
        made = self._plans.get(key)
        if made is None or not made.sources.are_unchanged():
            made = self._record(kernels, network, key, args)
        return _NOT_RUN if made is None else made.plan.run(args)

    def _trace(self) -> NetworkGraph | None:
        """Return the graph of the network as it is now; None if it has none, or is in a state that may pass."""
        with self._lock:
            if self._network is not None and self._network.state.holds():  # another thread was first
                return self._network
            if not is_traceable(self._module):
                return None
            if self._network is not None:  # what is changed for one call, as functional_call does, is not traced
                state, self._next_state = self._next_state, None
                if state is None or not state.holds():
                    self._next_state = ModuleState(self._module)
                    return None
            self._graphs, self._evictions, self._plans = self._graphs + 1, 0, {}
            self._network = trace_network(self._module)
            if self._network is None:
                self._graphs = MAX_GRAPHS + 1
            return self._network

    def _record(self, kernels: Kernels, network: NetworkGraph, key: Any, args: Sequence[Tensor]) -> _Made | None:
        """Return a plan for inputs of these shapes; None if there is none."""
        if self._evictions >= MAX_EVICTIONS and key not in self._plans:
            return None
        copies = [x.detach().clone() for x in args]  # which the network may change in place
        if any(copy.stride() != x.stride() for copy, x in zip(copies, args, strict=True)):
            return None
        recorder = Recorder(self._module, network, kernels)
        before = WatchedTensors(kernels, network.state.tensors)
        try:
            with unchanged_randomness():  # what is drawn is drawn by the call
                _, plan = recorder.record(copies)
        except NotRecordableError:
            self._graphs = MAX_GRAPHS + 1
            return None
        made = _Made(plan, WatchedTensors(kernels, recorder.sources, recorder.read))
        if not made.sources.are_watchable or not before.are_unchanged():
            return None
        with self._lock:
            if self._network is network:
                plans = [(k, v) for k, v in self._plans.items() if k != key]
                self._evictions += len(plans) >= MAX_PLANS
                self._plans = dict([*plans[max(0, len(plans) + 1 - MAX_PLANS) :], (key, made)])
        return made


def _is_usual(args: tuple[Any, ...]) -> bool:
    """Return whether a call computes in float32 on the CPU, and nobody looks."""
    if torch._C._is_tracing() or torch.is_autocast_enabled("cpu") or _has_any_global_hook():
        return False
    if torch._C._autograd._profiler_enabled():
        return False
    for x in args:
        if x is None or not x.is_cpu or x.is_nested or x.layout is not torch.strided or x.is_neg() or x.is_conj():
            return False
        if x.numel() == 0 or not x.data_ptr():
            return False
    return args[0].dtype == torch.float32
