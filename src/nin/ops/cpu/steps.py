"""Steps of a network, many of which one call of the compiled library runs one after the other."""

import dataclasses
import enum
import struct
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nin.ops.arguments import ChainArguments
from nin.ops.cpu import abi, library
from nin.ops.cpu.call_cache import SeenCall
from nin.ops.cpu.library import Kernels
from nin.ops.cpu.weight_cache import packed_copies


class StepKind(enum.IntEnum):
    """What a step computes: ``nin_step_kind`` of the C interface."""

    CHAIN = 0
    BOTTLENECK = 1
    ADD = 2
    MAX_POOL = 3
    AVERAGE_POOL = 4
    LINEAR = 5
    DEPTHWISE = 6
    SCALE_SHIFT = 7
    LAYER_NORM = 8


@dataclasses.dataclass(frozen=True)
class KernelStep:
    """A step, without the addresses of the tensors that it reads and writes.

    Attributes:
        kind: what it computes.
        dtype: of every tensor.
        chain: the struct ``nin_chain``: sizes, strides and geometry; empty where a step has none.
        layers: the structs ``nin_layer`` of convolutions.
        option: the groups of a convolution, the residual of a bottleneck, the activation of a sum, the padding of a
            pooling (see ``c_api.hpp``).
        count: the values of a sum, the divisor of a pooling, the stride of a pixelwise step's other operand.
        kept: what the structs point to.
    """

    kind: StepKind
    dtype: torch.dtype
    chain: bytes = b""
    layers: bytes = b""
    option: int = 0
    count: int = 0
    kept: tuple[object, ...] = ()

    def activates_nothing(self) -> bool:
        """Return whether an activation may follow in the same step."""
        if self.kind == StepKind.ADD:
            return self.option == 0
        activates = StepKind.CHAIN, StepKind.DEPTHWISE, StepKind.SCALE_SHIFT, StepKind.LAYER_NORM
        return self.kind in activates and self.layers[-_CODE.size :] == _CODE.pack(0)

    def with_activation(self, code: int) -> "KernelStep":
        """Return the step with an activation at its end, where there was none."""
        if self.kind == StepKind.ADD:
            return dataclasses.replace(self, option=code)
        layers = bytearray(self.layers)
        for group in range(max(1, self.option)):  # else the chain's last layer
            end = len(layers) - group * _LAYER_BYTES
            layers[end - _CODE.size : end] = _CODE.pack(code)
        return dataclasses.replace(self, layers=bytes(layers))

    def with_residual(self) -> "KernelStep":
        """Return the bottleneck to whose result its input is added."""
        return dataclasses.replace(self, option=1)


# A block of memory, by its number, and an offset in bytes.
Operand = tuple[int, int]
NO_OPERAND: Operand = -1, 0

_STEP = struct.Struct("12q")
_CODE = struct.Struct("q")  # of an activation: the last field of nin_layer
_LAYER_BYTES = 32
_MOST_LANES = 16  # floats in a vector


def step_of_call(seen: SeenCall) -> KernelStep | None:
    """Return the step that a call of an operator's kernel is; None if there is none for it."""
    call, chain = seen.call, seen.chain
    kinds = {"nin_forward": StepKind.CHAIN, "nin_inverted_bottleneck": StepKind.BOTTLENECK}
    kind = kinds.get(call.function.__name__)
    packed_chain, layers, *options = call.structs
    if kind is None or len(options) > 1:
        return None
    option, dtype = options[0] if options else 0, call.output["dtype"]
    return KernelStep(kind, dtype, packed_chain, layers, option, kept=(call.copies, *chain.biases))


def convolution_step(kernels: Kernels, x: Tensor, y: Tensor, layer: ChainArguments, groups: int = 1) -> KernelStep:
    """Return a convolution with what follows it, of whose weight it keeps a packed copy.

    Args:
        kernels: of the instruction set in use.
        x: (N, C, H, W), in any layout.
        y: the result, (N, C', H', W').
        layer: one layer, with the weight (C', C / groups, kH, kW).
        groups: of channels, each convolved by itself.
    """
    (weight,), (bias,), *_ = layer
    if groups == x.shape[1] == len(weight):
        packed_chain = abi.pack_chain(x, y, layer)
        (copy,) = packed_copies(kernels, [weight], as_floats=0)
        layers, kept = abi.pack_layers([copy.packed], layer)
        return KernelStep(StepKind.DEPTHWISE, x.dtype, packed_chain, layers, kept=tuple(kept))
    biases = [None] * groups if bias is None else bias.contiguous().chunk(groups)
    weights = weight.chunk(groups)
    first = layer._replace(weights=weights[:1])
    packed_chain = abi.pack_chain(x[:, : weight.shape[1]], y[:, : len(weights[0])], first)
    packed_chain, tile_size = abi.choose_winograd(kernels, packed_chain, first)
    layers, kept = b"", []
    for part, part_bias in zip(weights, biases, strict=True):
        (copy,) = packed_copies(kernels, [part], winograd_tile_size=tile_size)
        packed, tensors = abi.pack_layers([copy.packed], layer._replace(weights=[part], biases=[part_bias]))
        layers += packed
        kept += tensors
    return KernelStep(StepKind.CHAIN, x.dtype, packed_chain, layers, option=groups, kept=tuple(kept))


def add_step(x: Tensor, activation: str = "none") -> KernelStep:
    """Return ``y = activation(x + other)``, or ``activation(x)``, of values that lie in one order."""
    return KernelStep(StepKind.ADD, x.dtype, option=abi.ACTIVATION_CODES[activation], count=x.numel())


def pool_step(
    x: Tensor,
    y: Tensor,
    window: tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]],
    *,
    largest: bool,
    counts_padding: bool = True,
    divisor: int = 0,
) -> KernelStep:
    """Return a pooling of images in channels_last.

    Args:
        x: (N, C, H, W).
        y: the result, (N, C, H', W').
        window: size, stride, padding and dilation, two numbers each.
        largest: the largest value of a window, else the mean.
        counts_padding: whether a mean is that of all values of a window, padding too.
        divisor: of a mean, in place of the number of values; 0: that number.
    """
    kind = StepKind.MAX_POOL if largest else StepKind.AVERAGE_POOL
    return KernelStep(kind, x.dtype, abi.pack_window(x, y, *window), option=int(not counts_padding), count=divisor)


def linear_step(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> KernelStep:
    """Return a fully connected layer, which reads its weight and bias where they lie: they must stay there.

    Args:
        x: (N, channels), rows of contiguous values.
        weight: (channels out, channels), contiguous.
        bias: (channels out,), contiguous, or None.
        y: the result, (N, channels out), like x.
    """
    one = 1, 1
    window = abi.pack_window(x[:, :, None, None], y[:, :, None, None], one, one, (0, 0), one, layers=1)
    address = 0 if bias is None else bias.data_ptr()
    layer = struct.pack("4q", weight.data_ptr(), address, weight.shape[0], 0)
    return KernelStep(StepKind.LINEAR, x.dtype, window, layer, kept=(weight, bias))


class Other(enum.IntEnum):
    """What the other operand of `scale_shift_step` is: ``nin_other`` of the C interface."""

    SCALE = 0
    PIXEL_SCALE = 1
    PIXEL_SHIFT = 2


def scale_shift_step(
    x: Tensor,
    y: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    activation: str = "none",
    norm_eps: float | None = None,
    other_is: tuple[Other, int] = (Other.SCALE, 0),
) -> KernelStep:
    """Return ``y = activation(x · scale + shift)`` of each channel, of which it keeps copies in float32.

    Args:
        x: (N, C, P, 1), P pixels.
        y: the result, of the same shape, whose channels are contiguous.
        scale: (C,), or None.
        shift: (C,), or None.
        activation: its name.
        norm_eps: epsilon of a LayerNorm of x over the channels, which comes first; None: without.
        other_is: what the step's other operand is, if it has one, and how many values lie from its first for an image,
            or for a pixel, to that for the next.
    """
    one = 1, 1
    window = abi.pack_window(x, y, one, one, (0, 0), one, 1, norm_eps)
    # to whole vectors
    copies = [None if t is None else F.pad(t.detach().float(), (0, -x.shape[1] % _MOST_LANES)) for t in (scale, shift)]
    addresses = [0 if t is None else t.data_ptr() for t in copies]
    layer = struct.pack("4q", *addresses, x.shape[1], abi.ACTIVATION_CODES[activation])
    kind = StepKind.SCALE_SHIFT if norm_eps is None else StepKind.LAYER_NORM
    return KernelStep(kind, x.dtype, window, layer, *other_is, kept=tuple(copies))


class PackedSteps:
    """Steps, packed for one call of the library.

    Args:
        kernels: of the instruction set in use.
        steps: each with the operands x, other and y.
    """

    def __init__(self, kernels: Kernels, steps: Sequence[tuple[KernelStep, tuple[Operand, ...]]]) -> None:
        self._handles = struct.pack(f"{len(library.DTYPES)}q", *map(kernels.handles.__getitem__, library.DTYPES))
        self._kept = [step.kept for step, _ in steps]
        self._count = len(steps)
        blobs = [blob for step, _ in steps for blob in (step.chain, step.layers)]
        self._structs = torch.frombuffer(bytearray(b"".join(blobs) or b"\0"), dtype=torch.uint8)
        address, packed = self._structs.data_ptr(), []
        for step, operands in steps:
            chain, layers = address, address + len(step.chain)
            address = layers + len(step.layers)
            flat = [number for operand in operands for number in operand]
            values = library.DTYPES[step.dtype], *flat, chain, layers, step.option, step.count
            packed.append(_STEP.pack(step.kind, *values))
        self._steps = torch.frombuffer(bytearray(b"".join(packed)), dtype=torch.uint8)
        self._address = self._steps.data_ptr()

    def run(self, memory: Sequence[int]) -> None:
        """Run the steps.

        Args:
            memory: the addresses of the blocks of memory.
        """
        addresses = struct.pack(f"{len(memory)}q", *memory)
        run_steps = library.loaded().nin_run_steps
        library.check(run_steps(self._handles, self._address, self._count, addresses, library.thread_pool()))


def run_step(kernels: Kernels, step: KernelStep, x: Tensor, other: Tensor | None, y: Tensor) -> None:
    """Run one step on tensors."""
    operands = (0, 0), (1, 0) if other is not None else NO_OPERAND, (2, 0)
    addresses = x.data_ptr(), 0 if other is None else other.data_ptr(), y.data_ptr()
    PackedSteps(kernels, [(step, operands)]).run(addresses)
