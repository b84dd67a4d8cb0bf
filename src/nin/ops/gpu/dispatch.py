"""Which kernel serves a call on a GPU: the Triton kernels of ``nin::mlpconv``, registered over the reference.

Triton is imported when the first tensor on a GPU arrives. What the kernels do not serve (float64, an empty batch, a
chain that cuDNN is faster at) goes to the reference. ``NIN_GPU`` forces one of the two, see `nin.ops.gpu.engine_plan`.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from nin.ops import reference, schema
from nin.ops.arguments import ChainArguments, Gradients, as_dispatcher_backward_kernel, as_dispatcher_kernel
from nin.ops.gpu import engine_plan
from nin.ops.gpu.engine_plan import BackwardGroup, ChainProblem, LayerGroup

Group = TypeVar("Group", bound=LayerGroup)

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Compute capability from which Triton multiplies bfloat16 in matrix units.
MIN_CAPABILITY = (8, 0)


def backend_summary() -> str:
    """Return in one line which kernels serve tensors on a GPU, for ``nin.backends()``."""
    if not HAS_TRITON:
        return "reference (PyTorch, cuDNN): Triton is not installed"
    kernels = "nin Triton kernels and cuDNN, whichever a roofline says is faster (constants estimated, not measured)"
    engine = engine_plan.requested_engine()
    if engine != "auto":
        kernels = {"triton": "nin Triton kernels", "reference": "reference (PyTorch, cuDNN)"}[engine]
        kernels += f": {engine_plan.ENGINE_VARIABLE}={engine}"
    if not torch.cuda.is_available():
        return f"no GPU here; there: {kernels}"
    if torch.cuda.get_device_capability() < MIN_CAPABILITY:
        return f"reference (PyTorch, cuDNN): {torch.cuda.get_device_name()} is older than the kernels need"
    return f"{kernels}; {torch.cuda.get_device_name()}, Triton {importlib.import_module('triton').__version__}"


def mlpconv(x: Tensor, chain: ChainArguments) -> Tensor:
    """Compute the chain on a GPU, by the kernels where the plan gives them any of its groups."""
    groups = forward_plan(x, chain)
    if not any(group.fused for group in groups):
        return reference.mlpconv(x, chain)
    from nin.ops.gpu import forward  # imports Triton

    return forward.mlpconv(x, chain, groups)


def mlpconv_backward(grad: Tensor, x: Tensor, y: Tensor, chain: ChainArguments, needs: Sequence[bool]) -> Gradients:
    """Compute the gradients on a GPU, by the kernels where the plan gives them any of its groups."""
    groups = backward_plan(x, chain)
    if grad.dtype != x.dtype or not any(group.fused for group in groups):
        return reference.mlpconv_backward(grad, x, y, chain, needs)
    from nin.ops.gpu import backward  # imports Triton

    return backward.mlpconv_backward(grad, x, y, chain, needs, groups)


def forward_plan(x: Tensor, chain: ChainArguments) -> tuple[LayerGroup, ...]:
    """Return the plan of a forward call; empty where the reference takes all of it."""
    return _make_plan(engine_plan.plan_forward, x, chain)


def backward_plan(x: Tensor, chain: ChainArguments) -> tuple[BackwardGroup, ...]:
    """Return the plan of a backward call; empty where the reference takes all of it."""
    return _make_plan(engine_plan.plan_backward, x, chain)


def _make_plan(
    planner: Callable[[ChainProblem], tuple[Group, ...]], x: Tensor, chain: ChainArguments
) -> tuple[Group, ...]:
    """Return the plan and record it; empty where no kernel can take the call, or ``NIN_GPU`` forbids it."""
    engine = engine_plan.requested_engine()
    if engine == "reference" or not _is_supported(x, chain):
        return ()
    groups = planner(ChainProblem.of(x, chain, engine))
    for recording in _recordings:
        recording.extend(groups)
    return groups


def _is_supported(x: Tensor, chain: ChainArguments) -> bool:
    """Return whether the kernels can take these tensors at all."""
    if not HAS_TRITON or x.dtype not in engine_plan.DTYPES or 0 in x.shape:
        return False
    if x.is_cuda and torch.cuda.is_available() and torch.cuda.get_device_capability(x.device) < MIN_CAPABILITY:
        return False
    # offsets within one image, and within a weight, have 32 bits; `needs_64_bit_offsets` widens those of images alone
    image = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    widest = max(weight.shape[0] for weight in chain.weights) * x.shape[2] * x.shape[3]
    return max(image, widest, *(weight.numel() for weight in chain.weights)) < 1 << 31


# a stack, as one recording may be made within another
_recordings: list[list[LayerGroup]] = []


@contextlib.contextmanager
def record_groups() -> Iterator[list[LayerGroup]]:
    """Collect the groups that are planned meanwhile; none for a call that the reference takes."""
    groups: list[LayerGroup] = []
    _recordings.append(groups)
    try:
        yield groups
    finally:
        _recordings.remove(groups)


def engine_summary(groups: Sequence[LayerGroup]) -> str:
    """Return in a few words which engines ran: "Triton 2 layers, cuDNN 1 layers"."""
    counts = {"Triton": 0, "cuDNN": 0}
    for group in groups:
        counts["Triton" if group.fused else "cuDNN"] += group.count
    return ", ".join(f"{name} {count} layers" for name, count in counts.items() if count) or "reference (cuDNN)"


def _decompose_on_gpu(kernel: Any, x_index: int) -> Any:
    """Return a rule for functionalisation: a call on a GPU becomes the kernels that it launches.

    So torch.compile sees Triton kernels and convolutions, and plans while it traces. torch.export keeps the operator:
    an exported program does not depend on the machine that exported it.
    """

    def rule(mode: Any, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # the switch by which torch.export asks the same of PyTorch's own torch.library.triton_op
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        if not args[x_index].is_cuda or custom_triton_ops_decomposition_disabled():
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return kernel(*args, **(kwargs or {}))

    return rule


_forward, _backward = as_dispatcher_kernel(mlpconv), as_dispatcher_backward_kernel(mlpconv_backward)
schema.library.impl("mlpconv", _forward, "CUDA")
schema.library.impl("mlpconv_backward", _backward, "CUDA")
torch.library.register_torch_dispatch(
    "nin::mlpconv", FunctionalTensorMode, _decompose_on_gpu(_forward, 0), lib=schema.library
)
torch.library.register_torch_dispatch(
    "nin::mlpconv_backward", FunctionalTensorMode, _decompose_on_gpu(_backward, 1), lib=schema.library
)
