"""Tracing with torch.fx: graphs, constants, and one error for what cannot be traced."""

import pytest
import torch
from torch import fx, nn

from nin.runtime import fx_trace


class Forward(nn.Module):
    """A layer kept out of sight, and a forward."""

    def __init__(self, forward):
        super().__init__()
        self.hidden = [nn.ReLU()]
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize(
    ("forward", "kind"),
    [
        (lambda self, x: x if x.sum() > 0 else -x, "TraceError"),
        (lambda self, x: x * int(x.shape[0]), "TypeError"),
        (lambda self, x: x[: len(x) // 2], "RuntimeError"),
        (lambda self, x: {4: x}[x.ndim], "KeyError"),
        (lambda self, x: self.hidden[0](x), "NameError"),
        (lambda self, x: check(x), "AssertionError"),
    ],
)
def test_what_cannot_be_traced_is_one_error_that_says_why(forward, kind):
    with pytest.raises(fx_trace.TracingError, match=rf"^the control flow cannot be traced \({kind}: .*\)$"):
        fx_trace.trace(Forward(forward))


def check(x):
    """Refuse what is no tensor, as many forwards do."""
    assert isinstance(x, torch.Tensor)
    return x


def test_a_forward_becomes_a_graph_and_constants_are_no_inputs():
    class Scaled(nn.Module):
        def forward(self, x, scale=3.0):
            return x.relu() * scale

    graph = fx_trace.trace(Scaled(), constants={"scale": 3.0})
    x = torch.randn(2, 3)
    torch.testing.assert_close(fx.GraphModule(nn.Module(), graph)(x, 3.0), x.relu() * 3)


def test_other_errors_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        fx_trace.trace(Forward(lambda self, x: x / (1 // 0)))
