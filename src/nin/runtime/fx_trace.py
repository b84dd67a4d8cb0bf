"""Trace a model's forward with torch.fx, with one error for all that cannot be traced."""

import contextlib
import inspect
import pickle
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
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


# torch.fx patches the calls of all modules while it traces: two traces at once would restore each other's patches.
_LOCK = threading.RLock()


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
    tracer = tracer or fx.Tracer()
    try:
        with _LOCK:
            _bind_to_this_thread(tracer)
            return tracer.trace(model, constants)
    except _ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise TracingError(f"the control flow cannot be traced ({type(error).__name__}: {reason})") from error


def _bind_to_this_thread(tracer: fx.Tracer) -> None:
    """Let modules that other threads call meanwhile compute as ever: fx's patches hold for all threads.

    It lasts: another thread may still be on its way into a patch when the trace has ended.
    """
    thread, call_module, get_attribute = threading.get_ident(), tracer.call_module, tracer.getattr

    def call(module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return forward(*args, **kwargs)
        return call_module(module, forward, args, kwargs)

    def get(name: str, value: Any, proxies: Any) -> Any:
        return value if threading.get_ident() != thread else get_attribute(name, value, proxies)

    vars(tracer).update(call_module=call, getattr=get)


def trace_forward(module: nn.Module, tracer: fx.Tracer) -> fx.Graph:
    """Return the graph of a module's forward, with the defaults of its optional arguments.

    Raises:
        TracingError: it cannot be traced; the message says why.
    """
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    optional = {p.name: p.default for p in parameters if p.default is not p.empty}
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise TracingError("its forward takes any arguments")
    return trace(module, tracer, optional)


@contextlib.contextmanager
def unchanged_randomness() -> Iterator[Callable[[], bool]]:
    """Keep the states of the random number generators: a forward that is traced may draw from them.

    Yields:
        A function that returns whether anybody drew since.
    """
    states = random.getstate(), np.random.get_state()
    now = _random_states()
    try:
        # named one by one: PyTorch warns where there are several and nobody says which
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
            yield lambda: now != _random_states()
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _random_states() -> tuple[bytes, ...]:
    generators = random.getstate(), np.random.get_state()
    return *map(pickle.dumps, generators), torch.get_rng_state().numpy().tobytes()
