"""CompiledNetwork: the inference of a network as a list of steps, most of them in one call of the compiled library."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nin import ops
from nin.errors import is_out_of_memory
from nin.fusion.compiled_graph import NetworkGraph, trace_network
from nin.fusion.compiled_plan import Plan
from nin.fusion.compiled_recorder import NotRecordableError, Recorder
from nin.ops.cpu import abi, dispatch, library
from nin.ops.cpu.library import Kernels
from nin.ops.transforms import is_plain
from nin.runtime.fx_trace import TracingError, unchanged_randomness
from nin.runtime.model_copy import copy_model

# Shapes (with layouts) that steps are recorded for; those that come later run the modules.
MAX_PLANS = 16

# How far results of the steps may be from the modules' in the check, relative to their norm: both round, in float32,
# through all layers of a network.
TOLERANCE = 1e-3
# In bfloat16 it is what one rounding makes, and besides twice as far as the modules' own result moves when every input
# is rounded otherwise: through the layers of MobileNetV3 that becomes 0.4 to 1.8 %, and so do other roundings within.
BF16_ROUNDING = 2**-8
# The check takes noise for inputs that have no finite value of this size: beside the biases they change too little.
VISIBLE = 0.1


class CompiledNetwork:
    """A snapshot of a network, for inference on the CPU.

    It is a function of images: what is done to the network afterwards, its weights, attributes, modules and hooks, does
    not reach it, and results have no gradients. For float32 and bfloat16 on the CPU the steps of the network are
    recorded when a shape is seen first, and run from then on without Python between them; the first result of every
    shape is compared with the modules', on other values than those it was recorded with. For what they cannot be
    recorded (`reason`), in other dtypes, on other devices, under autocast, transforms and tracers, the snapshot's
    modules compute the result.

    What else a forward does, such as counting its calls or printing, it does while it is recorded and not in each call.

    Args:
        network: a fused one, see `nin.fuse`, or one of nin's.
        copies: take a copy, and leave the network as it is. Without it the network is frozen and is the snapshot's own.

    Attributes:
        network: its own network, in evaluation mode. Nobody may change it.
        reason: why its modules compute the results; "" where steps do.

    Example:
        >>> block = torch.nn.Sequential(torch.nn.Conv2d(64, 128, 1), torch.nn.ReLU(), torch.nn.Conv2d(128, 64, 1))
        >>> compiled = nin.fuse(block).compile()
        >>> x = torch.randn(2, 64, 8, 8)
        >>> torch.allclose(compiled(x), block(x), atol=1e-5)
        True
    """

    def __init__(self, network: nn.Module, *, copies: bool = True) -> None:
        with torch.inference_mode(False):  # ordinary tensors, even where the caller is in inference mode
            self.network = ops.freeze((copy_model(network, keep_fused=True) if copies else network).eval())
        self.reason = ""
        self._graph: NetworkGraph | None = None
        self._plans: dict[Any, Plan] = {}
        self._lock = threading.Lock()
        if dispatch.KERNELS is None:
            self.reason = "the compiled library is not there"
            return
        try:
            self._graph = trace_network(self.network)
        except TracingError as error:
            self.reason = str(error)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the network; the copy records for itself."""
        return CompiledNetwork, (self.network,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the network's result."""
        with torch.no_grad():
            plan = None if kwargs or torch.compiler.is_compiling() else self._plan(args)
            return self.network(*args, **kwargs) if plan is None else plan.run(args)

    def _plan(self, args: tuple[Any, ...]) -> Plan | None:
        """Return the steps for inputs of these shapes; None where the modules are to run."""
        kernels = dispatch.KERNELS
        if kernels is None or self.reason or not is_plain(args) or not _is_usual(args):
            return None
        key = (kernels.name, abi.WINOGRAD, *((x.shape, x.stride(), x.dtype) for x in args))
        plan = self._plans.get(key)
        return self._record(kernels, key, args) if plan is None else plan

    def _record(self, kernels: Kernels, key: Any, args: tuple[Tensor, ...]) -> Plan | None:
        with self._lock:
            if key in self._plans or len(self._plans) >= MAX_PLANS:
                return self._plans.get(key)
            graph = self._graph
            if graph is None or len(args) != len(graph.inputs):
                return None
            given = [x.detach().clone() for x in args]  # which the network may change in place
            if any(mine.stride() != x.stride() for mine, x in zip(given, args, strict=True)):
                return None
            try:
                with unchanged_randomness():
                    _, plan = Recorder(self.network, graph, kernels).record(given)
                    self._check(plan, args)
            except NotRecordableError as error:
                self.reason = str(error)
                return None
            self._plans[key] = plan
            return plan

    def _check(self, plan: Plan, args: Sequence[Tensor]) -> None:
        """Compare steps with the modules on other values.

        Raises:
            NotRecordableError: the results, or what is left in the inputs, are not the same.
        """
        generator = torch.Generator().manual_seed(0)
        values = [_other_values(x.detach(), generator) for x in args]

        def result(run: Callable[..., Any], values: list[Tensor]) -> tuple[Any, list[Tensor]]:
            inputs = [torch.empty_like(x).copy_(value) for x, value in zip(args, values, strict=True)]
            return run(*inputs), inputs

        is_bf16 = torch.bfloat16 in plan.dtypes
        moved = [_round_otherwise(value, generator) for value in values] if is_bf16 else values
        try:
            modules = result(self.network, values)
            rounded = result(self.network, moved) if is_bf16 else modules
        except Exception as error:  # somebody's own forward may refuse values that nobody gave it
            if is_out_of_memory(error):
                raise
            said = " ".join(str(error).split())[:160]
            raise NotRecordableError(f"on other values its forward raised {type(error).__name__}: {said}") from error
        steps = result(lambda *inputs: plan.run(inputs), values)
        tolerance = BF16_ROUNDING if is_bf16 else TOLERANCE
        if not _are_alike(steps, modules, rounded, tolerance):
            raise NotRecordableError("its steps give other values than its modules, or results of another type")


def _other_values(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return values like a tensor's, of which errors show in a result: zeros, as in a first call, would hide them."""
    factors = 0.5 + torch.rand(x.shape, generator=generator).to(x.dtype)
    values = x.flip(0) * factors
    if not x.is_floating_point():
        return values
    noise = torch.randn(x.shape, generator=generator).to(x.dtype)
    finite = values.isfinite()
    return torch.where(finite, values, noise) if (values[finite].abs() > VISIBLE).any() else noise


def _round_otherwise(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return floating-point values, each multiplied by one rounding of bfloat16 up or down."""
    if not x.is_floating_point():
        return x
    signs = 2 * torch.randint(2, x.shape, generator=generator) - 1
    return x.float() * (1 + BF16_ROUNDING * signs)


def _are_alike(a: Any, b: Any, other: Any, tolerance: float) -> bool:
    """Return whether two results are the same to rounding: their types, their structure and the tensors in them.

    Args:
        a: a result.
        b: what it must be.
        other: as far from ``b`` as roundings lead, half of what is allowed.
        tolerance: what is allowed besides, relative to the norm.
    """
    if not type(a) is type(b) is type(other):
        return False
    if isinstance(a, Tensor):
        if not a.shape == b.shape == other.shape or a.dtype != b.dtype:
            return False
        if not a.is_floating_point():
            wrong, moved = ((t != b).double().sum() for t in (a, other))
            return bool(wrong <= tolerance * b.numel() + 2 * moved)
        x, y, z = (t.double().nan_to_num() for t in (a, b, other))
        near = (x - y).norm() <= tolerance * y.norm() + 2 * (z - y).norm() + 1e-6
        return bool(near) and torch.equal(a.isfinite(), b.isfinite())
    if isinstance(a, Mapping):
        return list(a) == list(b) == list(other) and all(_are_alike(a[k], b[k], other[k], tolerance) for k in a)
    if isinstance(a, list | tuple):
        parts = zip(a, b, other, strict=False)
        return len(a) == len(b) == len(other) and all(_are_alike(*part, tolerance) for part in parts)
    return bool(a == b) if isinstance(a, bool | int | float | str | None) else False


def _is_usual(args: tuple[Any, ...]) -> bool:
    """Return whether a call computes in float32 or bfloat16 on the CPU."""
    if not args or torch._C._is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    for x in args:
        if x is None or not x.is_cpu or x.is_nested or x.layout is not torch.strided or x.is_neg() or x.is_conj():
            return False
        if x.numel() == 0 or not x.data_ptr():
            return False
    return args[0].dtype in library.DTYPES
