"""A GPU that need not be there: calls traced on tensors without memory, and a pretended one that computes on the CPU.

A tensor of the pretended GPU says that it is on "cuda:0" and holds its values in a tensor on the CPU. So trainings,
with their backward passes, run from end to end, and what a GPU forbids raises as it would there: operations on tensors
of two devices, `numpy()` of a GPU's tensor, and reading values while a CUDA graph is captured.
"""

import contextlib
import threading
import time
import types

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from nin.ops import schema

aten = torch.ops.aten


def traced(call, *tensors):
    """Return the names of what torch.compile's front end makes of a call, on tensors without memory."""
    with FakeTensorMode() as mode:
        fakes = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in tensors]
    with mode:
        graph = make_fx(dispatch_functionalize(call))(*fakes)
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


class DeviceMismatchError(RuntimeError):
    """An operation got tensors of several devices, as it would raise on a machine with a GPU."""


class CaptureError(RuntimeError):
    """Something was done while a CUDA graph was captured that a capture forbids."""


# -- the machine ------------------------------------------------------------------------------------------------


class _Machine:
    """What the pretended GPUs of this process hold beside tensors."""

    current = 0  # index of the current GPU
    count = 2
    graph = None  # that is captured now


def normalised(device):
    """Return a device as PyTorch does: "cuda" with the current GPU's index."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", _Machine.current)
    return device


def is_gpu(device):
    return device is not None and torch.device(device).type == "cuda"


# -- tensors ----------------------------------------------------------------------------------------------------

# devices of the tensors of the calls that are running; what they make without a device belongs there
_running = threading.local()


class GPUTensor(Tensor):
    """A tensor of the pretended GPU. To PyTorch's C++ it is on the CPU, which autograd needs; to Python it is not."""

    @staticmethod
    def __new__(cls, values, device):
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype
        )

    def __init__(self, values, device):
        self.values_on_cpu, self.gpu = values, device

    @property
    def device(self):
        return self.gpu

    @property
    def is_cuda(self):
        return True

    @property
    def is_cpu(self):
        return False

    def __repr__(self):
        return f"{self.values_on_cpu!r} on {self.gpu}"

    # what PyTorch calls a traceable wrapper: `nn.Module.to` then swaps parameters instead of filling them
    def __tensor_flatten__(self):
        return ["values_on_cpu"], self.gpu

    @staticmethod
    def __tensor_unflatten__(inner, device, size, stride):
        return GPUTensor(inner["values_on_cpu"], device)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class _Move(torch.autograd.Function):
    """Copy a tensor to another device; the gradient goes back to where the tensor was."""

    @staticmethod
    def forward(ctx, x, device):
        ctx.before = x.device
        return moved(x, device)

    @staticmethod
    def backward(ctx, grad):
        return moved(grad, ctx.before), None


def moved(x, device):
    """Return a copy of a tensor on another device, autograd not asked."""
    if _Machine.graph is not None and not (is_gpu(x.device) and is_gpu(device)):
        raise CaptureError(f"a copy from {x.device} to {device} while a CUDA graph is captured")
    with _unwatched():
        values = (x.values_on_cpu if isinstance(x, GPUTensor) else x.detach()).clone()
    return GPUTensor(values, device) if is_gpu(device) else values


@contextlib.contextmanager
def _unwatched():
    """Compute on the CPU's own tensors, of which nothing is checked."""
    before = getattr(_running, "unwatched", False)
    _running.unwatched = True
    try:
        yield
    finally:
        _running.unwatched = before


def _to(x, *args, **kwargs):
    kwargs.pop("copy", None)
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
    device = x.device if device is None else normalised(device)
    if device != x.device:
        x = _Move.apply(x, device)
    options = {} if layout is None else {"memory_format": layout}
    dtype = x.dtype if dtype is None else dtype
    if dtype != x.dtype or options:
        with torch._C.DisableTorchFunction():
            return x.to(dtype, **options)
    return x


def _no_numpy(x, *args, **kwargs):
    raise TypeError(f"can't convert {x.device} device type tensor to numpy. Use Tensor.cpu() first.")


def _values(method):
    return lambda x, *args, **kwargs: getattr(x.values_on_cpu, method)(*args, **kwargs)


MOVES = {
    Tensor.to: _to,
    Tensor.cpu: lambda x, **kwargs: _to(x, "cpu"),
    Tensor.cuda: lambda x, device="cuda", **kwargs: _to(x, torch.device("cuda", device) if device == 0 else device),
}
READS = {Tensor.numpy: _no_numpy, Tensor.__array__: _no_numpy, Tensor.__dlpack__: _no_numpy}
READS |= {getattr(Tensor, name): _values(name) for name in ("tolist", "data_ptr", "untyped_storage")}


def call(func, args, kwargs):
    """Call a function of torch with tensors of the pretended GPU among its arguments, or a GPU as its device."""
    gpus = [t.gpu for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, GPUTensor)]
    if func in READS and gpus:
        return READS[func](*args, **kwargs)
    if func in MOVES:
        return MOVES[func](*args, **kwargs)
    if func in (torch.tensor, torch.as_tensor) and is_gpu(kwargs.get("device")):
        device = kwargs.pop("device")
        return func(*args, **kwargs).to(device)
    before = getattr(_running, "device", None)
    _running.device = gpus[0] if gpus else before
    try:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    finally:
        _running.device = before


# Operators that read or write tensors of two devices on a real GPU too.
CROSSING = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.set_data.default}
CROSSING |= {
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
    aten._foreach_copy_.default,
}
# Operators that refuse even a scalar of another device.
STRICT = {aten.cat.default, aten.stack.default, aten._foreach_lerp_.Scalar}


def compute(func, args, kwargs):
    """Compute an operator on the values, on the device that its tensors or its arguments name."""
    leaves = pytree.tree_leaves((args, kwargs))
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    gpus = {t.gpu for t in tensors if isinstance(t, GPUTensor)}
    wanted = kwargs.get("device")
    if wanted is not None and wanted.type == "cpu":
        # C++ asks for the CPU, where it believes the tensors to be; who asks for it in Python gets it in `_to`
        wanted = None if tensors else getattr(_running, "device", None)
    if getattr(_running, "unwatched", False) or not (gpus or is_gpu(wanted)):
        return func(*args, **kwargs)
    device = _check_devices(func, args, leaves, tensors, gpus, wanted)
    if func is aten._local_scalar_dense.default and _Machine.graph is not None:
        raise CaptureError("a value was read while a CUDA graph is captured")

    def unwrap(t):
        return t.values_on_cpu if isinstance(t, GPUTensor) else t

    kwargs_of_cpu = {**kwargs, "device": torch.device("cpu")} if is_gpu(kwargs.get("device")) else kwargs
    inner_args, inner_kwargs = pytree.tree_map(unwrap, (args, kwargs_of_cpu))
    with _unwatched():
        result = run_operator(func, inner_args, inner_kwargs)
        if _Machine.graph is not None:
            _Machine.graph.record(func, inner_args, inner_kwargs, result)
    if not is_gpu(device) and not func._schema.is_mutable:
        return result
    wrapped = pytree.tree_map_only(Tensor, lambda t: GPUTensor(t, device), result)
    if not tensors or func._overloadpacket is aten.to:
        return args[0] if args and inner_args[0] is result and gpus else wrapped
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def run_operator(func, args, kwargs):
    """Compute an operator on the CPU; nin's own by what serves it on a GPU, where that can run here."""
    if func.namespace == "nin":
        from nin.ops.gpu import dispatch

        kernel = {"mlpconv": dispatch._forward, "mlpconv_backward": dispatch._backward}[func._overloadpacket.__name__]
        return kernel(*args, **kwargs)
    return func(*args, **kwargs)


def _check_devices(func, args, leaves, tensors, gpus, wanted):
    """Return the device of the result; refuse tensors of several devices."""
    if any(isinstance(value, torch.Generator) and value.device.type == "cpu" for value in leaves):
        raise RuntimeError(f"{func}: expected a 'cuda' device type for generator but found 'cpu'")
    if wanted is not None and len(tensors) < 2:
        return normalised(wanted)
    if func in CROSSING:
        return args[0].device
    others = [t for t in tensors if not isinstance(t, GPUTensor)]
    written = isinstance(args[0], Tensor) and not isinstance(args[0], GPUTensor) if args else False
    in_place = func._schema.is_mutable and written
    if len(gpus) > 1 or in_place or any(t.dim() > 0 or func in STRICT for t in others):
        found = ", ".join(sorted({str(t.device) for t in tensors}))
        raise DeviceMismatchError(f"{func}: expected all tensors to be on the same device, found {found}")
    return normalised(wanted) if is_gpu(wanted) else next(iter(gpus))


class _Functions(TorchFunctionMode):
    """What a call of torch's functions asks of the pretended GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})


class _Operators(TorchDispatchMode):
    """What makes tensors on the pretended GPU without having any."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


# -- torch.cuda -------------------------------------------------------------------------------------------------


class _Graph:
    """A CUDA graph: the operators of a capture, computed again by a replay, on the tensors that it knows."""

    def __init__(self):
        self.calls, self.replays = [], 0

    def record(self, func, args, kwargs, result):
        self.calls.append((func, args, kwargs, result))

    def replay(self):
        self.replays += 1
        if self.replays == 1:  # a real capture computes nothing; this one has, so the first replay is done
            return
        with _unwatched(), torch.no_grad():
            for func, args, kwargs, result in self.calls:
                again = run_operator(func, args, kwargs)
                if any(r.alias_info is not None for r in func._schema.returns) or func._schema.is_mutable:
                    continue  # a view, or written in place
                for old, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(again), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)


@contextlib.contextmanager
def _capture(graph, **kwargs):
    _Machine.graph = graph
    try:
        yield
    finally:
        _Machine.graph = None


@contextlib.contextmanager
def _current(device):
    before = _Machine.current
    index = device if isinstance(device, int) else torch.device(device).index
    _Machine.current = before if index is None else index
    try:
        yield
    finally:
        _Machine.current = before


class _Stream:
    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, other):
        pass

    synchronize = wait_event = record_event = lambda self, *args: None


class _Event:
    def __init__(self, **kwargs):
        self.ns = 0

    def record(self, *args):
        self.ns = time.perf_counter_ns()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return (other.ns - self.ns) / 1e6


class _Autocast(torch.autocast):
    """Autocast of the pretended GPU: to PyTorch's C++ its tensors are on the CPU."""

    def __init__(self, device_type, *args, **kwargs):
        self.of_gpu = device_type == "cuda"
        super().__init__("cpu" if self.of_gpu else device_type, *args, **kwargs)

    def __enter__(self):
        self.before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        if self.of_gpu:
            torch.set_autocast_enabled("cuda", self._enabled)
            torch.set_autocast_dtype("cuda", self.fast_dtype)
        return super().__enter__()

    def __exit__(self, *error):
        torch.set_autocast_enabled("cuda", self.before[0])
        torch.set_autocast_dtype("cuda", self.before[1])
        return super().__exit__(*error)


def _cast_floats(values, device, dtype):
    """Cast as autocast does; the operator's rule looks for tensors of the CPU there, these say that they are not."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.dtype in (torch.float32, *HALF) else t, values)


def no_grad():
    """Enter `torch.no_grad` and return what leaves it."""
    stack = contextlib.ExitStack()
    stack.enter_context(torch.no_grad())
    return stack


HALF = (torch.bfloat16, torch.float16)


def _group_by_device(tensor_lists, with_indices=False):
    """Group an optimiser's tensors by the device that they name; PyTorch's C++ sees the CPU."""
    groups = _group_by_cpu_device(tensor_lists, with_indices)
    return {(next(t for t in of[0][0] if t is not None).device, dtype): of for (_, dtype), of in groups.items()}


_group_by_cpu_device = torch._C._group_tensors_by_device_and_dtype
_run_thread = threading.Thread.run


def _run_watched(thread):
    """Run a thread with what watches its tensors: both modes are a thread's own."""
    with _Functions(), _Operators():
        _run_thread(thread)


PROPERTIES = types.SimpleNamespace(
    name="NVIDIA pretended", shared_memory_per_block_optin=232_448, multi_processor_count=132, major=9, minor=0,
    total_memory=80 << 30, L2_cache_size=50 << 20, regs_per_multiprocessor=65_536, warp_size=32,
)  # fmt: skip


@contextlib.contextmanager
def pretended_gpu(monkeypatch):
    """Let this process have two GPUs, whose tensors lie on the CPU, within the block."""
    torch._C._ensureCUDADeviceGuardSet()
    replacements = {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "is_initialized": lambda: True,
        "device_count": lambda: _Machine.count,
        "current_device": lambda: _Machine.current,
        "get_device_name": lambda device=None: PROPERTIES.name,
        "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
        "get_device_properties": lambda device=None: PROPERTIES,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: _Machine.graph is not None,
        "mem_get_info": lambda device=None: (70 << 30, 80 << 30),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device="cuda": torch.empty(0, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
        "device": _current,
        "Stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: _Stream(),
        "Event": _Event,
        "CUDAGraph": _Graph,
        "graph": _capture,
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(torch, "autocast", _Autocast)
    monkeypatch.setattr(schema, "cast_floats", _cast_floats)
    # PyTorch 2.15 cannot take views of such tensors in inference mode
    monkeypatch.setattr(torch.inference_mode, "__enter__", lambda self: setattr(self, "no_grad", no_grad()))
    monkeypatch.setattr(torch.inference_mode, "__exit__", lambda self, *error: self.no_grad.close())
    # what refers to a parameter goes on referring to it when it is moved, as on a machine with a GPU
    monkeypatch.setattr(torch.utils, "weakref", types.SimpleNamespace(getweakrefs=lambda t: []))
    monkeypatch.setattr(torch._C, "_group_tensors_by_device_and_dtype", _group_by_device)
    monkeypatch.setattr(threading.Thread, "run", _run_watched)
    # the reference, whose operators are checked one by one; the kernels have tests of their own
    monkeypatch.setenv("NIN_GPU", "reference")
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with _Functions(), _Operators():
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)


# -- the compiler -----------------------------------------------------------------------------------------------


class CompilerDriver:
    """What Triton asks of a GPU's driver to compile for it; nothing can be started. For `triton.runtime.driver`.

    Args:
        capability: compute capability times ten.
    """

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0
