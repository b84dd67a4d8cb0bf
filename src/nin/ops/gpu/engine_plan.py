"""Plan a call on a GPU: which layers run together, in which engine and in which tiles.

Each group is as long as fits on the chip; `engine_choice` says which engine takes it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from nin.ops.gpu import engine_choice, tile_sizes
from nin.ops.gpu.engine_choice import Choice
from nin.ops.gpu.problem import ChainProblem

# (problem of a group, index of its first layer or None where it cannot be measured, tiles, backward) → its engine
Choose = Callable[[ChainProblem, int | None, Sequence[Any], bool], Choice]


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Consecutive layers of a chain that run together.

    Attributes:
        first: index of the first of them.
        count: how many, 1 to 3.
        choice: their engine, and why it.
        problem: their sizes.
        tiles: candidates for the kernel, the default first; `autotune` chooses among them when it launches.
    """

    first: int
    count: int
    choice: Choice
    problem: ChainProblem
    tiles: tuple[Any, ...] = ()

    @property
    def fused(self) -> bool:
        """Whether a Triton kernel takes them; else PyTorch does, layer by layer."""
        return self.choice.engine == "triton"


@dataclasses.dataclass(frozen=True)
class BackwardGroup(LayerGroup):
    """Consecutive layers, one or two, whose gradients are computed together.

    Where `fused`, a kernel computes what travels from pixel to pixel and the library the weights' gradients, see
    `nin.ops.gpu.backward`; else PyTorch (cuDNN) all of it, layer by layer.

    Attributes:
        output_plan: how the group's output is computed again, where a group follows that takes it as input.
    """

    output_plan: tuple[LayerGroup, ...] = ()


def choose_unmeasured(problem: ChainProblem, first: int | None, tiles: Sequence[Any], backward: bool) -> Choice:
    """Choose the engine of a group as ``NIN_GPU`` or the table says; see `Choose`."""
    return engine_choice.choose(problem, backward=backward)


def plan_forward(
    problem: ChainProblem, choose: Choose = choose_unmeasured, *, measurable: bool = True
) -> tuple[LayerGroup, ...]:
    """Return the groups of a forward pass: each as long as fits on the chip, and by the engine that is faster.

    Args:
        problem: of the call.
        choose: of a group's engine.
        measurable: whether the chain is that of the call, whose layers ``choose`` can measure.
    """
    groups: list[LayerGroup] = []
    first = 0
    while first < len(problem.widths):
        count, tiles = _longest_fused_group(problem, first)
        part = problem.subchain(first, count)
        choice = _choose_engine(choose, part, first if measurable else None, tiles, backward=False)
        if choice.engine != "triton" and not part.pointwise:
            count = 1  # the library takes layer by layer, so the 1×1 layers behind may still be a kernel's
            part = problem.subchain(first, count)
        groups.append(LayerGroup(first, count, choice, part, tuple(tiles)))
        first += count
    return tuple(groups)


def plan_backward(problem: ChainProblem, choose: Choose = choose_unmeasured) -> tuple[BackwardGroup, ...]:
    """Return the groups of a backward pass, in forward order: pairs of 1×1 layers where they fit, else single ones."""
    groups: list[BackwardGroup] = []
    first = 0
    while first < len(problem.widths):
        count, tiles = _backward_tiles(problem, first)
        part = problem.subchain(first, count)
        choice = _choose_engine(choose, part, first, tiles, backward=True)
        # the last group's output is that of the call, which autograd has saved
        output_plan: tuple[LayerGroup, ...] = ()
        if first + count < len(problem.widths):
            output_plan = plan_forward(part, choose, measurable=False)
        groups.append(BackwardGroup(first, count, choice, part, tuple(tiles), output_plan))
        first += count
    return tuple(groups)


def _choose_engine(
    choose: Choose, problem: ChainProblem, first: int | None, tiles: Sequence[Any], *, backward: bool
) -> Choice:
    """Choose the engine of a group for which there may be a kernel, with these tiles."""
    if not tiles:
        return Choice(engine_choice.LIBRARY, "no kernel for it")
    if problem.engine == "auto" and not getattr(tiles[0], "resident", True):
        # they would be read again for each tile of pixels, and such a kernel takes long to compile
        return Choice(engine_choice.LIBRARY, "its weights do not fit on the chip")
    return choose(problem, first, tiles, backward)


def _longest_fused_group(problem: ChainProblem, first: int) -> tuple[int, list[Any]]:
    """Return how many layers from ``first`` on one forward kernel holds, and its tiles."""
    for count in (3, 2):  # `chain_forward` has arguments for three layers
        if first + count <= len(problem.widths):
            widths = problem.subchain(first, count).matrix_widths()
            tiles = tile_sizes.chain_tiles(widths, problem.itemsize, problem.device)
            if tiles:
                return count, tiles
    layer = problem.subchain(first, 1)
    return 1, tile_sizes.layer_tiles(layer.widths[0], layer.in_channels, layer.taps, layer.itemsize)


def _backward_tiles(problem: ChainProblem, first: int) -> tuple[int, list[Any]]:
    """Return how many layers from ``first`` on go backward together, and their tiles; none where no kernel can."""
    # an odd layer goes first: pairs at the end spare its input's gradient from being written twice
    pair = problem.subchain(first, 2)
    if pair.pointwise and (len(problem.widths) - first) % 2 == 0:
        tiles = tile_sizes.pair_tiles(pair.matrix_widths(), pair.itemsize, pair.device)
        if tiles:
            return 2, tiles
    layer = problem.subchain(first, 1)
    if not layer.pointwise:
        return 1, []  # cuDNN was three times faster at both gradients of a k×k layer than kernels of ours
    return 1, tile_sizes.layer_gradient_tiles(layer.in_channels, layer.widths[0])
