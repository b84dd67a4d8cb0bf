"""The Triton kernels of ``nin::mlpconv`` on NVIDIA GPUs: registers them over the reference.

Triton is imported when the first tensor on a GPU arrives. What the kernels do not serve (float64, an empty batch, a
chain that cuDNN is faster at) goes to the reference. ``NIN_GPU`` forces one of the two, see `choosing`.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from nin.ops import reference, schema
from nin.ops.arguments import ChainArguments, Gradients, as_dispatcher_backward_kernel, as_dispatcher_kernel
from nin.ops.gpu import plan as choosing

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Compute capability from which Triton multiplies bfloat16 in matrix units.
LEAST_CAPABILITY = (8, 0)


def backend_summary() -> str:
    """Return in one line which kernels serve tensors on a GPU, for ``nin.backends()``."""
    if not HAS_TRITON:
        return "reference (PyTorch, cuDNN): Triton is not installed"
    kernels = "nin Triton kernels and cuDNN, whichever a roofline says is faster (constants estimated, not measured)"
    engine = choosing.read_variable()
    if engine != "auto":
        kernels = {"triton": "nin Triton kernels", "reference": "reference (PyTorch, cuDNN)"}[engine]
        kernels += f": {choosing.VARIABLE}={engine}"
    if not torch.cuda.is_available():
        return f"no GPU here; there: {kernels}"
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return f"reference (PyTorch, cuDNN): {torch.cuda.get_device_name()} is older than the kernels need"
    return f"{kernels}; {torch.cuda.get_device_name()}, Triton {importlib.import_module('triton').__version__}"


def plan(x: Tensor, layers: ChainArguments, *, backward: bool = False) -> list[choosing.Step]:
    """Return which layers run together and by which engine; empty where the reference takes the whole call."""
    engine = choosing.read_variable()
    if engine == "reference" or not serves(x, layers.weights):
        return []
    from nin.ops.gpu import forward

    problem = forward.describe(x, layers)
    make = choosing.plan_backward if backward else choosing.plan_forward
    steps = make(problem, forward.device_of(x), engine)
    for seen in _watched:
        seen.extend(steps)
    return steps


_watched: list[list[choosing.Step]] = []


@contextlib.contextmanager
def watch() -> Iterator[list[choosing.Step]]:
    """Collect the steps that are chosen meanwhile; none where the reference takes all of a call."""
    steps: list[choosing.Step] = []
    _watched.append(steps)
    try:
        yield steps
    finally:
        _watched.remove(steps)


def summarise(steps: Sequence[choosing.Step]) -> str:
    """Return in a few words which engines ran: "Triton 2 layers, cuDNN 1"."""
    counts = {"Triton": 0, "cuDNN": 0}
    for step in steps:
        counts["Triton" if step.fused else "cuDNN"] += step.count
    return ", ".join(f"{name} {count} layers" for name, count in counts.items() if count) or "reference (cuDNN)"


def serves(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Return whether the kernels can take these tensors at all."""
    if not HAS_TRITON or x.dtype not in choosing.DTYPES or 0 in x.shape:
        return False
    if x.is_cuda and torch.cuda.is_available() and torch.cuda.get_device_capability(x.device) < LEAST_CAPABILITY:
        return False
    # within one image offsets are counted in 32 bits, and a filter's too
    image = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    result = max(weight.shape[0] for weight in weights) * x.shape[2] * x.shape[3]
    return max(image, result, *(weight.numel() for weight in weights)) < 1 << 31


def mlpconv(x: Tensor, layers: ChainArguments) -> Tensor:
    """Compute the chain on a GPU, by the kernels where any of its steps is theirs."""
    if any(step.fused for step in plan(x, layers)):
        importlib.import_module("nin.ops.gpu.operators")
        y: Tensor = torch.ops.nin.triton_mlpconv(x, *layers[:-1], ",".join(layers.activations))
        return y
    return reference.mlpconv(x, layers)


def mlpconv_backward(grad: Tensor, x: Tensor, y: Tensor, layers: ChainArguments, needs: Sequence[bool]) -> Gradients:
    """Compute the gradients on a GPU, by the kernels where any of the steps is theirs."""
    steps = plan(x, layers, backward=True)
    if grad.dtype == x.dtype and any(step.fused for step in steps):
        importlib.import_module("nin.ops.gpu.operators")
        grads: Gradients = torch.ops.nin.triton_mlpconv_backward(
            grad, x, y, *layers[:-1], ",".join(layers.activations), needs
        )
        return grads
    return reference.mlpconv_backward(grad, x, y, layers, needs)


def _look_through(kernel: Any, x_place: int) -> Any:
    """Return the rule by which torch.compile takes the operator apart on a GPU into the kernels that it launches.

    torch.export keeps the operator: an exported program does not depend on what it was exported on.
    """

    def rule(mode: Any, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        if not args[x_place].is_cuda or custom_triton_ops_decomposition_disabled():
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return kernel(*args, **(kwargs or {}))

    return rule


_forward, _backward = as_dispatcher_kernel(mlpconv), as_dispatcher_backward_kernel(mlpconv_backward)
schema.library.impl("mlpconv", _forward, "CUDA")
schema.library.impl("mlpconv_backward", _backward, "CUDA")
torch.library.register_torch_dispatch(
    "nin::mlpconv", FunctionalTensorMode, _look_through(_forward, 0), lib=schema.library
)
torch.library.register_torch_dispatch(
    "nin::mlpconv_backward", FunctionalTensorMode, _look_through(_backward, 1), lib=schema.library
)

__all__ = ["backend_summary", "mlpconv", "mlpconv_backward", "plan", "summarise", "watch"]
