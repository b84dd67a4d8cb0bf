"""Which kernel serves a call on a GPU: the Triton kernels of ``nin::mlpconv``, registered over the reference.

Triton is imported when the first tensor on a GPU arrives. What the kernels do not serve (float64, an empty batch, a
chain that cuDNN is faster at) goes to the reference. A call is planned once for its shapes and settings, recorded as it
runs (`replay`), and replayed from then on. ``NIN_GPU`` forces an engine, see `engine_choice`.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.nn import Parameter

from nin.ops import reference, schema
from nin.ops.arguments import ChainArguments, Gradients, as_dispatcher_backward_kernel, as_dispatcher_kernel
from nin.ops.gpu import engine_choice, engine_plan, timing_cache
from nin.ops.gpu.autotune import KernelUnavailableError
from nin.ops.gpu.engine_choice import ENGINE, TUNING, Choice
from nin.ops.gpu.engine_plan import BackwardGroup, LayerGroup
from nin.ops.gpu.problem import DTYPES, ChainProblem, float32_precision

# Compute capability from which Triton multiplies bfloat16 in matrix units.
MIN_CAPABILITY = (8, 0)
MAX_CALLS = 4096  # shapes whose calls are kept; at 10 to 30 kB each, more where the pixels are in many pieces

Groups = tuple[LayerGroup, ...]

# types of tensors that have memory of their own; others are traced
PLAIN_TYPES = (Tensor, Parameter)


def backend_summary() -> str:
    """Return in one line which kernels serve tensors on a GPU, for ``nin.backends()``."""
    # imported only where there is a GPU
    if importlib.util.find_spec("triton") is None or (torch.cuda.is_available() and triton_problem()):
        return f"reference (PyTorch, cuDNN): {triton_problem()}"
    engine = ENGINE.read()
    kernels = engine_choice.mode_summary()
    if engine != "auto":
        kernels = {"triton": "nin Triton kernels", "reference": "reference (PyTorch, cuDNN)"}[engine]
        kernels += f": {ENGINE.variable}={engine}"
    if not torch.cuda.is_available():
        return f"no GPU here; there: {kernels}"
    if torch.cuda.get_device_capability() < MIN_CAPABILITY:
        return f"reference (PyTorch, cuDNN): {torch.cuda.get_device_name()} is older than the kernels need"
    return f"{kernels}; {torch.cuda.get_device_name()}, Triton {importlib.import_module('triton').__version__}"


@functools.cache
def triton_problem() -> str:
    """Import Triton; return why it cannot serve here, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        importlib.import_module("triton")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # what a broken installation raises
        return f"Triton cannot be imported: {error}"
    return _compiler_problem() if torch.cuda.is_available() and torch.version.cuda else ""


def _compiler_problem() -> str:
    """Return why Triton can compile nothing for this GPU: it has no assembler; or nothing."""
    find = getattr(importlib.import_module("triton.backends.nvidia.compiler"), "get_ptxas", None)
    major, minor = torch.cuda.get_device_capability()
    try:
        if find is not None:
            find(10 * major + minor)
    except TypeError:  # of another version: a compilation will tell
        return ""
    except (RuntimeError, OSError) as error:
        return f"Triton cannot compile: {error}"
    return ""


def mlpconv(x: Tensor, chain: ChainArguments) -> Tensor:
    """Compute the chain on a GPU, by the engines of its plan."""
    result: Tensor = _run(x, (x,), chain, None)
    return result


def mlpconv_backward(grad: Tensor, x: Tensor, y: Tensor, chain: ChainArguments, needs: Sequence[bool]) -> Gradients:
    """Compute the gradients on a GPU, by the engines of their plan."""
    result: Gradients = _run(x, (grad, x, y), chain, needs)
    return result


@dataclasses.dataclass(frozen=True)
class _KeptCall:
    """The plan of a call and, where it has kernels, what it does; see `replay`."""

    groups: Groups
    recorded: Callable[[Sequence[Any]], Any] | None


_calls: dict[Any, _KeptCall] = {}
# measuring and compiling is done by one thread at a time
_first_call_lock = threading.RLock()


def _run(x: Tensor, images: tuple[Tensor, ...], chain: ChainArguments, needs: Sequence[bool] | None) -> Any:
    """Compute the chain of ``images`` (x,), or its gradients of ``images`` (grad, x, y)."""
    if type(x) not in PLAIN_TYPES:  # traced
        return _plan_and_compute(images, chain, needs)[0]
    index = x.get_device()
    if index >= 0 and index != torch.cuda.current_device():  # kernels are launched on the current device
        with torch.cuda.device(index):
            return _run(x, images, chain, needs)
    tensors = (*images, *chain.weights, *chain.biases)
    key = _call_key(x, tensors, chain, needs)
    kept = _calls.get(key)
    if kept is None:
        return _first_call(key, images, chain, needs)
    for recording in _recordings:
        recording.extend(kept.groups)
    if kept.recorded is None:
        return _compute(kept.groups, images, chain, needs)
    return kept.recorded(tensors)


def _call_key(
    x: Tensor, tensors: Sequence[Tensor | None], chain: ChainArguments, needs: Sequence[bool] | None
) -> tuple[Any, ...]:
    """Return all that a call's plan, and the kernels that it launches, depend on."""
    return (
        x.device,
        # Triton compiles other kernels for addresses that are no multiples of 16
        *[None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() & 15) for t in tensors],
        *chain.stride,
        *chain.padding,
        *chain.dilation,
        *chain.activations,
        None if needs is None else tuple(needs),
        os.environ.get(ENGINE.variable),
        os.environ.get(TUNING.variable),
        float32_precision() if x.dtype == torch.float32 else "",
    )


def _first_call(
    key: tuple[Any, ...], images: tuple[Tensor, ...], chain: ChainArguments, needs: Sequence[bool] | None
) -> Any:
    """Plan a call and record it while it runs; it is replayed from then on."""
    with _first_call_lock:
        result, kept, final = _plan_and_compute(images, chain, needs, record=True)
        if final:
            while len(_calls) >= MAX_CALLS:
                _calls.pop(next(iter(_calls)), None)
            _calls[key] = kept
    return result


def _plan_and_compute(
    images: tuple[Tensor, ...], chain: ChainArguments, needs: Sequence[bool] | None, *, record: bool = False
) -> tuple[Any, _KeptCall, bool]:
    """Return the result, what was done, and whether another call like it should do the same.

    That is not so for a plan made while a graph was captured, when nothing could be measured.
    """
    x = images[0 if needs is None else 1]
    measures = record and _can_measure(x)
    while True:
        groups = _make_plan(x, chain, needs, measures)
        try:
            if not (record and groups):
                return _compute(groups, images, chain, needs), _KeptCall(groups, None), True
            from nin.ops.gpu import replay  # imports Triton

            def compute(*tensors: Any, groups: Groups = groups) -> Any:
                return _compute(groups, tensors[: len(images)], chain.with_parameters(tensors[len(images) :]), needs)

            result, recorded = replay.record(compute, (*images, *chain.weights, *chain.biases))
            return result, _KeptCall(groups, recorded), _is_final(x, groups)
        except KernelUnavailableError as error:
            # the next plan has the library in its place
            group = error.group
            engine_choice.exclude(group.problem, backward=isinstance(group, BackwardGroup))


def _compute(groups: Any, images: Sequence[Tensor], chain: ChainArguments, needs: Sequence[bool] | None) -> Any:
    """Compute the chain or its gradients by a plan; the reference does where it is empty."""
    if needs is None:
        (x,) = images
        if not groups:
            return reference.mlpconv(x, chain)
        from nin.ops.gpu import forward  # imports Triton

        return forward.mlpconv(x, chain, groups)
    grad, x, y = images
    if not groups:
        return reference.mlpconv_backward(grad, x, y, chain, needs)
    from nin.ops.gpu import backward  # imports Triton

    return backward.mlpconv_backward(grad, x, y, chain, needs, groups)


def forward_plan(x: Tensor, chain: ChainArguments) -> tuple[LayerGroup, ...]:
    """Return the plan of a forward call without measuring; empty where the reference takes all of it."""
    return _make_plan(x, chain, None, measures=False)


def backward_plan(x: Tensor, chain: ChainArguments) -> tuple[BackwardGroup, ...]:
    """Return the plan of a backward call without measuring; empty where the reference takes all of it."""
    return _make_plan(x, chain, (), measures=False)


def _make_plan(x: Tensor, chain: ChainArguments, needs: Sequence[bool] | None, measures: bool) -> Any:
    """Return the plan and record it; empty where no kernel can take the call, or ``NIN_GPU`` forbids it."""
    engine = ENGINE.read()
    if engine == "reference" or not _is_supported(x, chain):
        return ()
    timer = None
    if measures:
        from nin.ops.gpu import engine_timing  # imports Triton

        timer = engine_timing.EngineTimer(x, chain, limited=TUNING.read() != "full")
    platform = timing_cache.platform_name(x.device)

    def choose(problem: ChainProblem, first: int | None, tiles: Sequence[Any], backward: bool) -> Choice:
        measure = None
        if timer is not None and first is not None:
            measure = functools.partial(timer.measure, problem, first, tiles, backward)
        return engine_choice.choose(problem, backward=backward, platform=platform, measure=measure)

    planner: Any = engine_plan.plan_forward if needs is None else engine_plan.plan_backward
    groups = planner(ChainProblem.of(x, chain, engine), choose)
    for recording in _recordings:
        recording.extend(groups)
    return groups


def _is_final(x: Tensor, groups: Groups) -> bool:
    """Return whether a plan may be kept: not where a graph is being captured and the table stood in for measuring."""
    expected = TUNING.read() != "0" and any(group.choice.source == engine_choice.TABLE for group in groups)
    return not (expected and x.is_cuda and torch.cuda.is_current_stream_capturing())


def _can_measure(x: Tensor) -> bool:
    """Return whether engines can be timed now: on a GPU, not while a graph is captured."""
    return x.is_cuda and not torch.cuda.is_current_stream_capturing() and TUNING.read() != "0"


def _is_supported(x: Tensor, chain: ChainArguments) -> bool:
    """Return whether the kernels can take these tensors at all."""
    if x.dtype not in DTYPES or 0 in x.shape:
        return False
    if triton_problem():
        timing_cache.warn_once(f"nin: {triton_problem()}; PyTorch's own kernels take the place of nin's")
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
    counts = {"triton": 0, "cudnn": 0, "cublas": 0}
    for group in groups:
        counts[group.choice.engine] += group.count
    names = {"triton": "Triton", "cudnn": "cuDNN", "cublas": "cuBLAS"}
    return ", ".join(f"{names[engine]} {n} layers" for engine, n in counts.items() if n) or "reference (cuDNN)"


def choice_lines(groups: Sequence[LayerGroup]) -> list[str]:
    """Return a line for each kind of group: "192→160→96 forward: triton 177 µs, cudnn 828 µs, measured"."""
    lines = []
    for group in groups:
        widths = "→".join(map(str, (group.problem.in_channels, *group.problem.widths)))
        direction = "backward" if isinstance(group, BackwardGroup) else "forward"
        lines.append(f"{widths} {direction}: {group.choice.figures()}")
    return list(dict.fromkeys(lines))


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
schema.register_backend("cuda", mlpconv, mlpconv_backward)
torch.library.register_torch_dispatch(
    "nin::mlpconv", FunctionalTensorMode, _decompose_on_gpu(_forward, 0), lib=schema.library
)
torch.library.register_torch_dispatch(
    "nin::mlpconv_backward", FunctionalTensorMode, _decompose_on_gpu(_backward, 1), lib=schema.library
)
