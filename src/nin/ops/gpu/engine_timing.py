"""Time the engines of a group of layers on a call's own tensors."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nin.ops import reference
from nin.ops.arguments import ChainArguments
from nin.ops.gpu import autotune, backward, forward, matrix_products, replay
from nin.ops.gpu.autotune import GpuTimer, Tuning
from nin.ops.gpu.engine_choice import LIBRARY, Choice
from nin.ops.gpu.engine_plan import BackwardGroup, LayerGroup
from nin.ops.gpu.problem import ChainProblem

Measured = tuple[dict[str, float], dict[str, str], list[str]]


class EngineTimer:
    """Time the engines of each group of one call, within one budget.

    Args:
        x: input of the call.
        chain: its layers.
        limited: to a second; else every tile is timed, however long its compilation takes.
    """

    def __init__(self, x: Tensor, chain: ChainArguments, *, limited: bool) -> None:
        self.x, self.chain = x, chain
        self.time_us = GpuTimer(x.device)
        self.clock = time.monotonic
        self.ends = self.clock() + autotune.BUDGET_S if limited else math.inf

    def measure(self, problem: ChainProblem, first: int, tiles: Sequence[Any], backward: bool) -> Measured:
        """Return the engines' times in microseconds, the tiles chosen, and what there was no time for."""
        count = len(problem.widths)
        chain = self.chain.subchain(first, count)
        x = self.x if first == 0 else self.images(problem.in_channels)
        tuning = Tuning(time_us=self.time_us, clock=self.clock, ends=self.ends)
        engines = self.backward_engines if backward else self.forward_engines
        calls = engines(x, chain, problem, tuple(tiles))
        with torch.no_grad():
            times = autotune.time_engines(calls, tuning)
        return times, tuning.tiles, tuning.left_out

    def images(self, channels: int) -> Tensor:
        """Return random images as large as the output, in the layout of the input."""
        images, _, height, width = self.chain.output_shape(self.x)
        layout = reference.memory_format_of(self.x)
        made = torch.empty(
            images, channels, height, width, dtype=self.x.dtype, device=self.x.device, memory_format=layout
        )
        # a generator of its own: a training's random numbers do not depend on what was timed
        return made.normal_(generator=torch.Generator(self.x.device).manual_seed(0))

    def forward_engines(
        self, x: Tensor, chain: ChainArguments, problem: ChainProblem, tiles: tuple[Any, ...]
    ) -> dict[str, Callable[[], Any]]:
        """Return, by engine, what prepares its forward pass."""
        layout, group = (
            reference.memory_format_of(x),
            LayerGroup(0, len(problem.widths), Choice("", ""), problem, tiles),
        )
        names = [LIBRARY, "triton"]
        if problem.itemsize == 2 and matrix_products.is_supported(x, chain):
            names.insert(1, "cublas")
        tensors = x, *chain.weights, *chain.biases
        return {
            name: functools.partial(
                replayed,
                lambda x, *rest, name=name: forward.run_engine(name, x, layout, chain.with_parameters(rest), group),
                tensors,
            )
            for name in names
        }

    def backward_engines(
        self, x: Tensor, chain: ChainArguments, problem: ChainProblem, tiles: tuple[Any, ...]
    ) -> dict[str, Callable[[], Any]]:
        """Return, by engine, what prepares its backward pass: all gradients."""
        needs = [True, *[True] * len(chain.weights), *(bias is not None for bias in chain.biases)]
        y, grad = (self.images(problem.widths[-1]) for _ in range(2))
        y = torch.nn.functional.relu(y) if chain.activations[-1] == "relu" else y
        groups = {
            name: BackwardGroup(0, len(problem.widths), Choice(name, ""), problem, tiles)
            for name in (LIBRARY, "triton")
        }
        tensors = grad, x, y, *chain.weights, *chain.biases
        return {
            name: functools.partial(
                replayed,
                lambda g, x, y, *rest, group=group: backward.group_backward(
                    g, x, y, chain.with_parameters(rest), needs, group
                ),
                tensors,
            )
            for name, group in groups.items()
        }


def replayed(call: Callable[..., Any], tensors: Sequence[Tensor | None]) -> Callable[[], Any]:
    """Return a call's replay on its own tensors, once its tiles are chosen."""
    call(*tensors)  # chooses the tiles, whose measurement is not to be recorded
    with autotune.without_measurement():
        _, recorded = replay.record(call, tensors)
    return functools.partial(recorded, tensors)
