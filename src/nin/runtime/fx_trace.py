"""Trace a model's forward with torch.fx, with one error for all that cannot be traced."""

from typing import Any

from torch import fx, nn

# What a forward raises on the proxies of torch.fx, which stand for tensors and have no values.
_ERRORS = (
    ValueError,  # fx's TraceError: an if or a loop over one
    TypeError,  # int() or range() of one
    RuntimeError,  # len() of one
    AttributeError,  # a method that only a tensor of a subclass has
    AssertionError,  # assert isinstance(x, Tensor)
    LookupError,  # a dict asked for one
    NameError,  # fx's, of a layer kept in a plain list
)


class TracingError(ValueError):
    """The forward cannot be traced; the message says why, in one line."""


def trace(model: nn.Module, tracer: fx.Tracer | None = None, constants: dict[str, Any] | None = None) -> fx.Graph:
    """Return the graph of a model's forward.

    Args:
        model: in the mode, training or evaluation, that is to be traced.
        tracer: decides which modules become one node; PyTorch's own if None.
        constants: values for arguments of the forward, which are then no inputs of the graph (`concrete_args` of fx).

    Raises:
        TracingError: for example, the control flow depends on values.
    """
    try:
        return (tracer or fx.Tracer()).trace(model, constants)
    except _ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise TracingError(f"the control flow cannot be traced ({type(error).__name__}: {reason})") from error
