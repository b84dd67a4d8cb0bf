"""Capture a function of tensors of fixed shapes as a CUDA graph, so that its hundreds of kernel launches cost one."""

from collections.abc import Callable

import torch
from torch import Tensor


class CUDAGraphRunner:
    """Calls a function a few times as it is, then captures it as a CUDA graph and replays that.

    The warm-up calls compile kernels and allocate the optimiser's state; they are training steps like any other, so
    nothing has to be undone. `torch.cuda.make_graphed_callables` captures a forward and a backward, not
    a whole step with the optimiser. A call with other shapes than the captured ones runs without the graph.

    Args:
        function: takes and returns tensors, changes all else in place, and never synchronises with the GPU.
        device: the GPU that it computes on; of several it need not be the current one.
        warmup_calls: before the capture; PyTorch's documentation of CUDA graphs takes 3.
    """

    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], device: torch.device, warmup_calls: int = 3
    ) -> None:
        self.function, self.device, self.warmup_calls = function, device, warmup_calls
        self.graph: torch.cuda.CUDAGraph | None = None
        self.static_inputs: tuple[Tensor, ...] = ()
        self.static_outputs: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the function's results; they are copies, which the next replay does not overwrite."""
        with torch.cuda.device(self.device):  # streams and captures are those of the current GPU
            return self._call(inputs)

    def _call(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.graph is None and self.warmup_calls > 0:
            self.warmup_calls -= 1
            return self._call_on_side_stream(inputs)
        if self.graph is None:
            self._capture(inputs)
        if any(static.shape != given.shape for static, given in zip(self.static_inputs, inputs, strict=True)):
            return self._call_on_side_stream(inputs)
        for static, given in zip(self.static_inputs, inputs, strict=True):
            static.copy_(given)
        assert self.graph is not None
        self.graph.replay()
        return tuple(output.clone() for output in self.static_outputs)

    def _call_on_side_stream(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Call the function on a stream other than the default one, which a capture must not depend on.

        Autograd's nodes that accumulate gradients remember the stream on which they were made.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            outputs = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return outputs

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self.static_inputs = tuple(torch.empty_like(given).copy_(given) for given in inputs)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.static_outputs = self.function(*self.static_inputs)
