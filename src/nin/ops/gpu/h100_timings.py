"""What the engines took on an H100, and an estimate of other shapes from it.

Where nothing may be measured (``NIN_GPU_TUNE=0``, in a CUDA graph that is captured, while torch.compile traces), the
engine is chosen by these figures. An engine is expected to be as far from its bound as in the measured case that is
most like the shape: the bound is the longer of the times for its arithmetic and for its bytes to and from memory.
Shapes that no case is like (float32, NCHW, more layers than any) stay with the library.
"""

import dataclasses
import itertools
import math

from nin.ops.gpu.problem import ChainProblem

BYTES_PER_S = 2.98e12  # a copy's, measured there: read and written
FLOP_PER_S = 800e12  # dense products of 16 bits with float32 sums, about what cuBLAS reaches there


@dataclasses.dataclass(frozen=True)
class MeasuredCase:
    """GPU time of one case by engine, in a replayed CUDA graph, bfloat16, channels_last.

    Attributes:
        name: of the case.
        backward: whether the times are those of all gradients, else those of the forward pass.
        problem: its sizes.
        microseconds: by engine.
    """

    name: str
    backward: bool
    problem: ChainProblem
    microseconds: dict[str, float]


def _square(size: int) -> tuple[tuple[int, ...], ...]:
    return (size, size), (1, 1), (size // 2, size // 2), (1, 1)


_CHAIN = ChainProblem(512 * 32 * 32, 192, (160, 96), ("relu",) * 2)
_CHAIN_192 = ChainProblem(512 * 16 * 16, 192, (192, 192), ("relu",) * 2)
_CHAIN_10 = ChainProblem(512 * 8 * 8, 192, (192, 10), ("relu",) * 2)
_CONVNEXT = ChainProblem(64 * 56 * 56, 96, (384, 96), ("gelu",) * 2)
_ONE = ChainProblem(512 * 28 * 28, 192, (32,), ("relu",))
_MLPCONV = ChainProblem(512 * 32 * 32, 3, (192, 160, 96), ("relu",) * 3, 25, pointwise=False, geometry=_square(5))
_5X5 = ChainProblem(512 * 16 * 16, 96, (192,), ("relu",), 25, pointwise=False, geometry=_square(5))
_3X3 = ChainProblem(512 * 8 * 8, 192, (192,), ("relu",), 9, pointwise=False, geometry=_square(3))

# One H100 80GB HBM3, PyTorch 2.11.0 (CUDA 13.0), Triton 3.6.0, 2026-11-28. The backward times are the differences of
# forward + backward and forward.
CASES = (
    MeasuredCase("chain 192→160→96", False, _CHAIN, {"triton": 177, "cublas": 330, "cudnn": 828}),
    MeasuredCase("chain 192→192→192", False, _CHAIN_192, {"triton": 125, "cudnn": 310}),
    MeasuredCase("chain 192→192→10", False, _CHAIN_10, {"triton": 15, "cudnn": 45}),
    MeasuredCase("ConvNeXt 96→384→96, GELU", False, _CONVNEXT, {"triton": 375, "cudnn": 574}),
    MeasuredCase("1×1 192→32", False, _ONE, {"triton": 66, "cudnn": 121}),
    MeasuredCase("mlpconv 5×5 3→192→160→96", False, _MLPCONV, {"triton": 297, "cudnn": 1800}),
    MeasuredCase("5×5 96→192", False, _5X5, {"triton": 380, "cudnn": 313}),
    MeasuredCase("3×3 192→192", False, _3X3, {"triton": 69, "cudnn": 67}),
    MeasuredCase("chain 192→160→96", True, _CHAIN, {"triton": 2590, "cudnn": 1057}),
    MeasuredCase("chain 192→192→192", True, _CHAIN_192, {"triton": 1280, "cudnn": 556}),
    MeasuredCase("chain 192→192→10", True, _CHAIN_10, {"triton": 155, "cudnn": 433}),
    MeasuredCase("ConvNeXt 96→384→96, GELU", True, _CONVNEXT, {"triton": 3190, "cudnn": 745}),
    MeasuredCase("1×1 192→32", True, _ONE, {"triton": 796, "cudnn": 213}),
    MeasuredCase("mlpconv 5×5 3→192→160→96", True, _MLPCONV, {"triton": 4916, "cudnn": 2552}),
    MeasuredCase("5×5 96→192", True, _5X5, {"triton": 3002, "cudnn": 762}),
    MeasuredCase("3×3 192→192", True, _3X3, {"triton": 626, "cudnn": 209}),
)


def estimate_us(problem: ChainProblem, *, backward: bool) -> dict[str, float]:
    """Return the expected time of each engine in microseconds; empty where no measured case is like the problem."""
    if problem.itemsize != 2 or problem.layout != "channels_last":
        return {}
    kind = len(problem.widths), problem.pointwise
    like = [c for c in CASES if c.backward == backward and (len(c.problem.widths), c.problem.pointwise) == kind]
    if not like:
        return {}
    nearest = min(like, key=lambda case: _distance(case.problem, problem))
    return {
        engine: us * bound_s(problem, engine, backward=backward) / bound_s(nearest.problem, engine, backward=backward)
        for engine, us in nearest.microseconds.items()
    }


def _distance(case: ChainProblem, problem: ChainProblem) -> float:
    """Return how unlike two problems of equally many layers are, in doublings of arithmetic, and twice of each width.

    Widths weigh more: cuDNN's speed depends on them by steps, as for 10 filters, which are no multiple of 8.
    """
    widths = zip(case.matrix_widths(), problem.matrix_widths(), strict=True)
    return abs(math.log2(case.macs() / problem.macs())) + sum(abs(math.log2(a / b)) for a, b in widths) * 2


def bound_s(problem: ChainProblem, engine: str, *, backward: bool) -> float:
    """Return the least time of an engine in seconds: for its arithmetic, or for its bytes to and from memory.

    A kernel reads the chain's input and writes its output; the library does that for each layer. A backward pass reads
    input, output and gradient, computes the hidden layers again and has two products a layer.
    """
    channels = (problem.in_channels, *problem.widths)
    pairs = list(itertools.pairwise(channels)) if engine != "triton" else [(channels[0], channels[-1])]
    values = sum((2 * a + 2 * b) if backward else (a + b) for a, b in pairs)
    flop = 2 * problem.macs() * (3 if backward and len(problem.widths) > 1 else 2 if backward else 1)
    return max(values * problem.pixels * problem.itemsize / BYTES_PER_S, flop / FLOP_PER_S)
