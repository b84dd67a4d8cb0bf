"""Steps of a network in float32, many of which one call of the compiled library runs one after the other."""

import dataclasses
import enum
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from nin.ops.cpu import abi, library
from nin.ops.cpu.call_cache import SeenCall
from nin.ops.cpu.library import Kernels


class StepKind(enum.IntEnum):
    """What a step computes: ``nin_step_kind`` of the C interface."""

    CHAIN = 0
    BOTTLENECK = 1
    ADD = 2
    MAX_POOL = 3
    AVERAGE_POOL = 4
    LINEAR = 5


@dataclasses.dataclass(frozen=True)
class KernelStep:
    """A step, without the addresses of the tensors that it reads and writes.

    Attributes:
        kind: what it computes.
        chain: the struct ``nin_chain``: sizes, strides and geometry; empty where a step has none.
        layers: the structs ``nin_layer`` of convolutions.
        option: the activation of a sum, the residual of a bottleneck, the padding of a pooling (see ``c_api.hpp``).
        count: the values of a sum; the divisor of a pooling.
        kept: what the structs point to.
    """

    kind: StepKind
    chain: bytes = b""
    layers: bytes = b""
    option: int = 0
    count: int = 0
    kept: tuple[object, ...] = ()

    def activates_nothing(self) -> bool:
        """Return whether an activation may follow in the same step."""
        if self.kind == StepKind.CHAIN:
            return self.layers[-_CODE.size :] == _CODE.pack(0)
        return self.kind == StepKind.ADD and self.option == 0

    def with_activation(self, code: int) -> "KernelStep":
        """Return the step with an activation at its end, where there was none."""
        if self.kind == StepKind.ADD:
            return dataclasses.replace(self, option=code)
        return dataclasses.replace(self, layers=self.layers[: -_CODE.size] + _CODE.pack(code))

    def with_residual(self) -> "KernelStep":
        """Return the bottleneck to whose result its input is added."""
        return dataclasses.replace(self, option=1)


# A block of memory, by its number, and an offset in bytes.
Operand = tuple[int, int]
NO_OPERAND: Operand = -1, 0

_STEP = struct.Struct("11q")
_CODE = struct.Struct("q")  # of an activation: the last field of nin_layer


def step_of_call(seen: SeenCall) -> KernelStep | None:
    """Return the step that a call of an operator's kernel is; None if there is none for it."""
    call, chain = seen.call, seen.chain
    kinds = {"nin_forward": StepKind.CHAIN, "nin_inverted_bottleneck": StepKind.BOTTLENECK}
    kind = kinds.get(call.function.__name__)
    packed_chain, layers, *options = call.structs
    if kind is None or call.output["dtype"] != torch.float32 or len(options) > 1:
        return None
    return KernelStep(kind, packed_chain, layers, options[0] if options else 0, kept=(call.copies, *chain.biases))


def add_step(count: int, activation: str = "none") -> KernelStep:
    """Return ``y = activation(x + other)``, or ``activation(x)``, of ``count`` values that lie in one order."""
    return KernelStep(StepKind.ADD, option=abi.ACTIVATION_CODES[activation], count=count)


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
    return KernelStep(kind, abi.pack_window(x, y, *window), option=int(not counts_padding), count=divisor)


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
    return KernelStep(StepKind.LINEAR, window, layer, kept=(weight, bias))


class PackedSteps:
    """Steps, packed for one call of the library.

    Args:
        kernels: of the instruction set in use.
        steps: each with the operands x, other and y.
    """

    def __init__(self, kernels: Kernels, steps: Sequence[tuple[KernelStep, tuple[Operand, ...]]]) -> None:
        self._handle = kernels.handles[torch.float32]
        self._kept = [step.kept for step, _ in steps]
        self._count = len(steps)
        blobs = [blob for step, _ in steps for blob in (step.chain, step.layers)]
        self._structs = torch.frombuffer(bytearray(b"".join(blobs) or b"\0"), dtype=torch.uint8)
        address, packed = self._structs.data_ptr(), []
        for step, operands in steps:
            chain, layers = address, address + len(step.chain)
            address = layers + len(step.layers)
            flat = [number for operand in operands for number in operand]
            packed.append(_STEP.pack(step.kind, *flat, chain, layers, step.option, step.count))
        self._steps = torch.frombuffer(bytearray(b"".join(packed)), dtype=torch.uint8)
        self._address = self._steps.data_ptr()

    def run(self, memory: Sequence[int]) -> None:
        """Run the steps.

        Args:
            memory: the addresses of the blocks of memory.
        """
        addresses = struct.pack(f"{len(memory)}q", *memory)
        run_steps = library.loaded().nin_run_steps
        library.check(run_steps(self._handle, self._address, self._count, addresses, library.thread_pool()))


def run_step(kernels: Kernels, step: KernelStep, x: Tensor, other: Tensor | None, y: Tensor) -> None:
    """Run one step on tensors."""
    operands = (0, 0), (1, 0) if other is not None else NO_OPERAND, (2, 0)
    addresses = x.data_ptr(), 0 if other is None else other.data_ptr(), y.data_ptr()
    PackedSteps(kernels, [(step, operands)]).run(addresses)
