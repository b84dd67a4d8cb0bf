"""A model's forward as a graph."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

# What a forward raises when it is called with the proxies of `torch.fx`, which stand for tensors and have no values.
_ERRORS = (
    ValueError,  # fx's TraceError: an if or a loop over one
    TypeError,  # int() or range() of one
    RuntimeError,  # len() of one
    AssertionError,  # assert isinstance(x, Tensor)
    LookupError,  # a dict asked for one
    NameError,  # fx's, of a layer kept in a plain list
)


class TracingError(ValueError):
    """The model does what a graph cannot hold; the text says what, in one line."""


def trace(model: nn.Module, tracer: fx.Tracer | None = None, constants: dict[str, Any] | None = None) -> fx.Graph:
    """Return the graph of what a model computes.

    Args:
        model: in the mode that is to be traced.
        tracer: what decides which modules become one node, or PyTorch's own.
        constants: arguments of the forward that have these values and are no inputs of the graph.

    Raises:
        TracingError: the control flow depends on values, or the like.
    """
    try:
        return (tracer or fx.Tracer()).trace(model, constants)
    except _ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise TracingError(f"the control flow cannot be traced ({type(error).__name__}: {reason})") from error
