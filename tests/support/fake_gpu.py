"""Calls traced on a GPU that need not be there."""

import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx


def traced(call, *tensors):
    """Return the names of what torch.compile's front end makes of a call, on tensors without memory."""
    with FakeTensorMode() as mode:
        fakes = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in tensors]
    with mode:
        graph = make_fx(dispatch_functionalize(call))(*fakes)
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
