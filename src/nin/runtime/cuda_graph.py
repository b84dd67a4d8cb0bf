"""Replays a step of fixed shapes as one CUDA graph, so that its hundreds of launches cost one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[..., tuple[Tensor, ...]]


class Replay:
    """Calls a function of tensors a few times as it is, then captures it and replays it from there on.

    The plain calls compile kernels and make what the optimiser keeps; they are steps like any other, so nothing has
    to be undone. A call with other shapes than the captured one is made as it is.

    Args:
        step: takes and gives tensors, works in place on all else, and never waits for the GPU.
        device: the GPU that it computes on; of several it need not be the current one.
        plain_calls: before the capture.
    """

    def __init__(self, step: Step, device: torch.device, plain_calls: int = 3) -> None:
        self.step, self.device, self.plain_calls = step, device, plain_calls
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()
        self.results: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Take one step; the results are the caller's."""
        with torch.cuda.device(self.device):  # streams and captures are those of the current GPU
            return self._call(inputs)

    def _call(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.graph is None and self.plain_calls > 0:
            self.plain_calls -= 1
            return self._call_beside(inputs)
        if self.graph is None:
            self._capture(inputs)
        if any(kept.shape != given.shape for kept, given in zip(self.inputs, inputs, strict=True)):
            return self._call_beside(inputs)
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        assert self.graph is not None
        self.graph.replay()
        return tuple(result.clone() for result in self.results)

    def _call_beside(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Call the step on a stream of its own, as a capture needs what autograd remembers of earlier calls."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results = self.step(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return results

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = tuple(torch.empty_like(given).copy_(given) for given in inputs)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = self.step(*self.inputs)
