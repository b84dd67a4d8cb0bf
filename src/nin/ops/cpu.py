"""The compiled CPU kernels of ``nin::mlpconv``: loads the library, keeps packed weights, registers over the reference.

``NIN_CPU_ISA`` forces an instruction set (for tests and comparisons): one of ``avx512_bf16``, ``avx512``, ``avx2``,
``portable``, or ``reference`` for plain PyTorch. One that the machine lacks gives way to the next one down.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from nin.ops import reference, schema

LIBRARY_NAME = "libnin_cpu.so"
ISA_VARIABLE = "NIN_CPU_ISA"
INSTRUCTION_SETS = ("avx512_bf16", "avx512", "avx2", "portable")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATION_CODES = {name: code for code, name in enumerate(reference.ACTIVATIONS)}


def find_library() -> Path | None:
    """Return the compiled library's path, or None where the package was installed without a compiler."""
    # An editable installation has two folders: the sources, and the one that the build installed into.
    folders = [Path(folder) for folder in sys.modules[__package__].__path__]
    return next((folder / LIBRARY_NAME for folder in folders if (folder / LIBRARY_NAME).exists()), None)


def load_library() -> ctypes.CDLL | None:
    """Load the compiled library.

    Returns:
        The library, or None where there is none.

    Raises:
        ImportError: the library is there and cannot be loaded, or belongs to another version of the package.
    """
    path = find_library()
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"nin's compiled CPU library {path} cannot be loaded: {error}") from error
    library.nin_version.restype = ctypes.c_char_p
    built, expected = library.nin_version().decode(), version("nin")
    if built != expected:
        raise ImportError(f"{path} must be of version {expected}, got {built}: install nin again")
    pointer, row, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64
    real = ctypes.c_double
    for name, result, arguments in (
        ("nin_find_kernels", pointer, [row, size]),
        ("nin_packed_bytes", size, [pointer, row]),
        ("nin_sample", ctypes.c_uint64, [pointer, size]),
        ("nin_pack", None, [pointer, row, pointer, pointer]),
        ("nin_forward_scratch_bytes", size, [pointer, row, row, size]),
        ("nin_forward", ctypes.c_int32, [pointer, row, row, pointer, pointer, row]),
        ("nin_backward_scratch_bytes", size, [pointer, row, row, row, row]),
        ("nin_backward", ctypes.c_int32, [pointer, row, row, row, row, pointer, pointer, pointer, pointer, row]),
        ("nin_peak_flops", real, [pointer, row, real]),
        ("nin_copy_bytes_per_second", real, [row, pointer, pointer, size]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@dataclass(frozen=True)
class Kernels:
    """The kernels of one instruction set: the library's handle for each dtype."""

    name: str
    handles: dict[torch.dtype, int]


def find_kernels(library: ctypes.CDLL, wanted: str | None = None) -> Kernels:
    """Return the kernels of ``wanted``, or of the best instruction set below it that the machine has."""
    start = INSTRUCTION_SETS.index(wanted) if wanted else 0
    for name in INSTRUCTION_SETS[start:]:
        handles = {dtype: library.nin_find_kernels(name.encode(), code) for dtype, code in DTYPES.items()}
        if all(handles.values()):
            return Kernels(name, handles)
    raise ImportError("nin's compiled CPU library holds no kernels: install nin again")


def choose_kernels(library: ctypes.CDLL | None) -> Kernels | None:
    """Return the kernels that ``NIN_CPU_ISA`` and the machine allow; None for the reference."""
    wanted = os.environ.get(ISA_VARIABLE) or None
    if wanted not in (None, "reference", *INSTRUCTION_SETS):
        raise ValueError(f"{ISA_VARIABLE} must be one of {', '.join(INSTRUCTION_SETS)}, reference, got {wanted!r}")
    return None if library is None or wanted == "reference" else find_kernels(library, wanted)


def describe() -> str:
    """Return one line for ``nin.backends()``."""
    if LIBRARY is None:
        return "reference (PyTorch): installed without a C++ compiler, there is no compiled library"
    if KERNELS is None:
        return f"reference (PyTorch): {ISA_VARIABLE}=reference"
    built = LIBRARY.nin_version().decode()
    return f"nin {KERNELS.name} (compiled {built}), float32 and bfloat16; other dtypes: reference"


def mlpconv(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activations: Sequence[str],
) -> Tensor:
    """Compute the chain tile by tile; the hidden layers stay in the cache."""
    if KERNELS is None or not _serves(x, weights, biases):
        return reference.mlpconv(x, weights, biases, stride, padding, dilation, activations)
    y = _empty_result(x, weights, stride, padding, dilation)
    if y.numel() > 0:
        handle = KERNELS.handles[x.dtype]
        packed = [packed_weight(handle, weight) for weight in weights]
        problem = pack_problem(x, y, weights[0].shape, stride, padding, dilation, len(weights))
        layers, alive = _pack_layers(packed, weights, biases, activations)
        _check(_library().nin_forward(handle, problem, layers, x.data_ptr(), y.data_ptr(), _pool()))
        del alive
    return y


# Weights up to which the backward kernel keeps float sums for several slices of the pixels at once; beyond, PyTorch's
# layer by layer backward, whose products are large enough then.
MOST_BACKWARD_WEIGHTS = 1 << 21


def mlpconv_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activations: Sequence[str],
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Compute the gradients of a 1×1 chain tile by tile; see ``reference.mlpconv_backward``.

    A k×k convolution stays with PyTorch: oneDNN's backward runs at the limit of the machine where this was measured
    (5×5, 96 to 192 channels, float32: the input's gradient takes 52.6 ms on one core, our forward 50.2).
    """
    geometry = (stride, padding, dilation, activations)
    fits = KERNELS is not None and _serves(x, weights, biases) and (grad.shape, grad.dtype) == (y.shape, x.dtype)
    plain = tuple(weights[0].shape[2:]) == (1, 1) and tuple(padding) == (0, 0)
    if not fits or not plain or grad.numel() == 0 or sum(w.numel() for w in weights) > MOST_BACKWARD_WEIGHTS:
        return reference.mlpconv_backward(grad, x, y, weights, biases, *geometry, needs)
    assert KERNELS is not None
    count, handle = len(weights), KERNELS.handles[x.dtype]
    layout = reference.memory_format(x)
    grad_x = torch.empty(x.shape, dtype=x.dtype, memory_format=layout) if needs[0] else x.new_empty(0)
    if tuple(stride) != (1, 1):  # the pixels that it steps over
        grad_x.zero_()
    grads = [
        torch.empty(p.shape if p is not None and needed else 0, dtype=x.dtype)
        for p, needed in zip((*weights, *biases), needs[1:], strict=True)
    ]
    grad_weights, grad_biases = grads[:count], grads[count:]
    packed = [packed_weight(handle, weight) for weight in weights]
    exchanged = [packed_weight(handle, weight, for_input_gradient=True) for weight in weights]
    problem = pack_problem(x, y, weights[0].shape, stride, padding, dilation, count)
    layers, alive = _pack_layers(packed, weights, biases, activations)
    gradient = struct.pack("8q", *grad.stride(), *(grad_x.stride() if needs[0] else (0, 0, 0, 0)))
    pointers = [
        t.data_ptr() if t.numel() > 0 else 0
        for layer in zip(exchanged, grad_weights, grad_biases, strict=True)
        for t in layer
    ]
    gradients = struct.pack(f"{len(pointers)}q", *pointers)
    addresses = grad.data_ptr(), x.data_ptr(), y.data_ptr(), grad_x.data_ptr() if needs[0] else 0
    _check(_library().nin_backward(handle, problem, layers, gradient, gradients, *addresses, _pool()))
    del alive
    return grad_x, grad_weights, grad_biases


def _serves(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    """Return whether the tensors fit together; what does not goes to the reference, whose error says why."""
    if x.dtype not in DTYPES or x.dim() != 4 or 0 in x.shape[1:]:
        return False
    channels = x.shape[1]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        shape = weight.shape
        if len(shape) != 4 or shape[1] != channels or weight.dtype != x.dtype or 0 in shape or not weight.is_cpu:
            return False
        if i > 0 and (shape[2] != 1 or shape[3] != 1):
            return False
        channels = shape[0]
        if bias is not None and (bias.shape != (channels,) or bias.dtype != x.dtype or not bias.is_cpu):
            return False
    return True


def _empty_result(
    x: Tensor, weights: Sequence[Tensor], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    kernel = weights[0].shape[2:]
    height, width = (schema.output_size(x.shape[2 + d], kernel[d], stride[d], padding[d], dilation[d]) for d in (0, 1))
    shape = (x.shape[0], weights[-1].shape[0], height, width)
    return torch.empty(shape, dtype=x.dtype, memory_format=reference.memory_format(x))


def pack_problem(
    x: Tensor,
    y: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    layers: int,
) -> bytes:
    """Return the library's ``nin_problem``: 24 numbers of eight bytes."""
    shape, out = x.shape, y.shape
    values = (DTYPES[x.dtype], *shape, out[2], out[3], *weight_shape[2:], *stride, *padding, *dilation)
    return struct.pack("24q", *values, *x.stride(), *y.stride(), layers)


def _pack_layers(
    packed: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[str]
) -> tuple[bytes, list[Tensor]]:
    """Return the library's ``nin_layer`` for each layer, and what must live as long as they are used."""
    values: list[int] = []
    alive = list(packed)
    for weight, bias, blob, activation in zip(weights, biases, packed, activations, strict=True):
        address = 0
        if bias is not None:
            alive.append(bias.contiguous())
            address = alive[-1].data_ptr()
        values += (blob.data_ptr(), address, weight.shape[0], ACTIVATION_CODES[activation])
    return struct.pack(f"{len(values)}q", *values), alive


# ---- the machine -----------------------------------------------------------------------------------------------


def measure_peak_flops(dtype: torch.dtype, seconds: float = 0.3) -> float | None:
    """Return the FLOP/s of multiply-adds on registers with all threads; None where there is no compiled kernel.

    One multiply-add is two FLOP. For bfloat16 it is the peak of what the kernels multiply with: pairs of bfloat16
    where the machine has them, else float32.
    """
    if KERNELS is None:
        return None
    return float(_library().nin_peak_flops(KERNELS.handles[dtype], _pool(), seconds))


def measure_copy_bandwidth(copied_bytes: int = 256 << 20, rounds: int = 5) -> float | None:
    """Return the bytes/s, read and written, of the fastest of several copies with all threads; None as above."""
    if KERNELS is None:
        return None
    source, target = torch.ones(copied_bytes, dtype=torch.uint8), torch.ones(copied_bytes, dtype=torch.uint8)
    arguments = (_pool(), target.data_ptr(), source.data_ptr(), copied_bytes)
    return max(float(_library().nin_copy_bytes_per_second(*arguments)) for _ in range(rounds))


# ---- packed weights --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    weight: weakref.ref[Tensor]
    state: tuple[object, ...]
    packed: Tensor


_packed: dict[tuple[int, int, bool], _Entry] = {}


def packed_weight(handle: int, weight: Tensor, for_input_gradient: bool = False) -> Tensor:
    """Return the weight in the kernels' order; packed again only after the weight has changed.

    A change is seen by the version counter that every in-place operation and optimiser step raises, and by the
    address. A change through ``weight.data`` or another library's view of the memory raises no counter: it is seen
    where one of 64 values differs, as after scaling, averaging or copying. The copy lives as long as the weight.
    """
    if weight.is_inference():  # has no version counter
        return _pack(handle, weight, for_input_gradient)
    key = (id(weight), handle, for_input_gradient)
    address = weight.data_ptr()
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    sample = _library().nin_sample(address, weight.numel() * weight.element_size() if dense else 0)
    state = (weight._version, sample, address, weight.shape, weight.stride())
    entry = _packed.get(key)
    if entry is not None and entry.weight() is weight and entry.state == state:
        return entry.packed

    def forget(dead: weakref.ref[Tensor]) -> None:
        last = _packed.get(key)
        if last is not None and last.weight is dead:  # the id may serve another weight by now
            del _packed[key]

    packed = _pack(handle, weight, for_input_gradient)
    _packed[key] = _Entry(weakref.ref(weight, forget), state, packed)
    return packed


def _pack(handle: int, weight: Tensor, for_input_gradient: bool) -> Tensor:
    """Copy a weight into panels; for the input's gradient with its channels exchanged and its taps turned over."""
    columns, channels, height, width = weight.shape
    column_stride, channel_stride, height_stride, width_stride = weight.stride()
    address = weight.data_ptr()
    if for_input_gradient:
        address += ((height - 1) * height_stride + (width - 1) * width_stride) * weight.element_size()
        columns, channels, column_stride, channel_stride = channels, columns, channel_stride, column_stride
        height_stride, width_stride = -height_stride, -width_stride
    strides = (column_stride, channel_stride, height_stride, width_stride)
    row = struct.pack("9q", DTYPES[weight.dtype], columns, channels, height, width, *strides)
    packed = torch.empty(_library().nin_packed_bytes(handle, row), dtype=torch.uint8)
    _library().nin_pack(handle, row, address, packed.data_ptr())
    return packed


# ---- the library -----------------------------------------------------------------------------------------------


def _library() -> ctypes.CDLL:
    assert LIBRARY is not None
    return LIBRARY


def _find_parallel_for() -> int:
    """Return the address of PyTorch's ``torch_parallel_for``; 0 where it has none (the library starts threads)."""
    try:
        function = ctypes.CDLL(torch._C.__file__).torch_parallel_for
    except AttributeError:
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _pool() -> bytes:
    return struct.pack("2q", PARALLEL_FOR, torch.get_num_threads())


def _check(status: int) -> None:
    if status == 1:
        raise MemoryError("nin's CPU kernel: not enough memory for its scratch")
    if status != 0:
        raise RuntimeError("nin's CPU kernel: PyTorch's thread pool failed")


LIBRARY = load_library()
KERNELS = choose_kernels(LIBRARY)
PARALLEL_FOR = _find_parallel_for()

if KERNELS is not None:
    schema.library.impl("mlpconv", mlpconv, "CPU")
    schema.library.impl("mlpconv_backward", mlpconv_backward, "CPU")
