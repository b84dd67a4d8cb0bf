"""Squeeze-and-excitation in blocks that fuse finds, and forwards that look like it and are not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nin
from nin.fusion import chain as chain_module
from nin.ops.cpu import dispatch


class Block(nn.Module):
    """An inverted bottleneck; the subclasses below do something else with the depthwise layer's result."""

    def __init__(self):
        super().__init__()
        self.up, self.depthwise, self.down = (
            nn.Conv2d(6, 9, 1),
            nn.Conv2d(9, 9, 3, padding=1, groups=9),
            nn.Conv2d(9, 5, 1),
        )
        self.reduce, self.expand, self.gate = nn.Conv2d(9, 4, 1), nn.Conv2d(4, 9, 1), nn.Sigmoid()

    def factors(self, squeezed):
        return self.gate(self.expand(torch.relu(self.reduce(squeezed))))

    def forward(self, x):
        y = F.relu6(self.depthwise(F.relu6(self.up(x))))
        return self.down(y * self.factors(y.mean((2, 3), keepdim=True)))


class ByMethods(Block):
    def forward(self, x):
        y = F.relu6(self.depthwise(F.relu6(self.up(x))))
        return self.down(torch.mul(self.expand(self.reduce(y.mean([-1, -2], True)).relu()).sigmoid(), y))


class ByFunctions(Block):
    def forward(self, x):
        y = F.relu6(self.depthwise(F.relu6(self.up(x))))
        factors = torch.sigmoid(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(y, (1, 1))))))
        return self.down(y.mul(factors))


class OfTheInput(Block):
    def forward(self, x):
        y = F.relu6(self.depthwise(F.relu6(self.up(x))))
        return self.down(y * self.factors(self.up(x).mean((2, 3), keepdim=True)))


class OfOneAxis(Block):
    def forward(self, x):
        y = F.relu6(self.depthwise(F.relu6(self.up(x))))
        return self.down(y * self.factors(y.mean((2,), keepdim=True)))


class Added(Block):
    def forward(self, x):
        y = F.relu6(self.depthwise(F.relu6(self.up(x))))
        return self.down(y + self.factors(y.mean((2, 3), keepdim=True)))


class UsedThrice(Block):
    def forward(self, x):
        y = F.relu6(self.depthwise(F.relu6(self.up(x))))
        return self.down(y * self.factors(y.mean((2, 3), keepdim=True))) + y.amax()


class FactorsUsedTwice(Block):
    def forward(self, x):
        y = F.relu6(self.depthwise(F.relu6(self.up(x))))
        factors = self.factors(y.mean((2, 3), keepdim=True))
        return self.down(y * factors) + factors.sum()


class KeepsTheFactors(Block):
    def forward(self, x):
        y = F.relu6(self.depthwise(F.relu6(self.up(x))))
        self.kept = self.factors(y.mean((2, 3), keepdim=True))
        return self.down(y * self.kept)


class PooledToFour(Block):
    def forward(self, x):
        y = F.relu6(self.depthwise(F.relu6(self.up(x))))
        return self.down(y * F.interpolate(self.factors(F.adaptive_avg_pool2d(y, 2)), y.shape[2:]))


class WithoutAGate(Block):
    def forward(self, x):
        y = F.relu6(self.depthwise(F.relu6(self.up(x))))
        return self.down(y * self.expand(torch.relu(self.reduce(y.mean((2, 3), keepdim=True)))))


class ChangedBetween(Block):
    def forward(self, x):
        y = F.relu6(self.depthwise(F.relu6(self.up(x))))
        squeezed = y.mean((2, 3), keepdim=True)
        y.mul_(2)
        return self.down(y * self.factors(squeezed))


FOUND = [Block, ByMethods, ByFunctions]
OTHERS = [OfTheInput, OfOneAxis, Added, UsedThrice, FactorsUsedTwice, KeepsTheFactors, PooledToFour, WithoutAGate]


def squeezing(fused):
    return [chain.layers for chain in fused.chains if "mean" in chain.chain.steps]


@pytest.mark.parametrize("cls", [*FOUND, *OTHERS, ChangedBetween])
def test_what_is_found_and_the_results(cls):
    model = cls().double().eval()
    fused = nin.fuse(model)
    assert squeezing(fused) == ([("up", "depthwise", "reduce", "expand", "down")] if cls in FOUND else [])
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(fused.model(x), model(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cls", [*OTHERS, ChangedBetween])
def test_a_forward_that_does_something_else_later_does_it(cls):
    """The model had the form when it was fused, and has another forward now."""
    model = Block().double().eval()
    fused = nin.fuse(model).model
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    for network in (model, fused):
        network.__class__ = type(cls.__name__, (cls,), {})
    torch.testing.assert_close(fused(x), model(x), rtol=1e-10, atol=1e-12)


def replace_gate(model):
    model.gate = nn.Hardsigmoid()


def hook_the_gate(model):
    model.gate.register_forward_hook(lambda module, inputs, output: 2 * output)


def widen_the_squeeze(model):
    model.reduce, model.expand = (copy.deepcopy(WIDER[name]) for name in ("reduce", "expand"))


def norm_instead(model):
    model.expand = nn.Sequential(model.expand, nn.Tanh())


WIDER = {"reduce": nn.Conv2d(9, 7, 1).double(), "expand": nn.Conv2d(7, 9, 1).double()}


@pytest.mark.parametrize("change", [replace_gate, hook_the_gate, widen_the_squeeze, norm_instead])
def test_a_layer_that_is_changed_later_takes_effect(change):
    model = Block().double().eval()
    fused = nin.fuse(model).model
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64)
    before = model(x)
    torch.testing.assert_close(fused(x), before, rtol=1e-10, atol=1e-12)
    change(model)
    change(fused)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(model(x), before)


@pytest.mark.skipif(dispatch.KERNELS is None, reason="no compiled kernels here")
def test_the_block_is_one_call(monkeypatch):
    calls, called = [], chain_module.inverted_bottleneck
    monkeypatch.setattr(chain_module, "inverted_bottleneck", lambda *a, **k: calls.append(len(a[1])) or called(*a, **k))
    monkeypatch.setattr(chain_module, "mlpconv", None)
    model = Block().eval()
    fused = nin.fuse(model).model
    x = torch.randn(2, 6, 7, 5)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)
    assert calls == [5]


class ByAMethod(Block):
    """The forward calls a method of its own, as timm's networks do, and a method of a method."""

    def hidden(self, x):
        return F.relu6(self.depthwise(self.wide(x)))

    def wide(self, x):
        return F.relu6(self.up(x))

    def forward(self, x):
        y = self.hidden(x)
        return self.down(y * self.factors(y.mean((2, 3), keepdim=True)))


@pytest.mark.skipif(dispatch.KERNELS is None, reason="no compiled kernels here")
def test_a_first_layer_that_a_method_calls(monkeypatch):
    calls, called = [], chain_module.inverted_bottleneck
    monkeypatch.setattr(chain_module, "inverted_bottleneck", lambda *a, **k: calls.append(len(a[1])) or called(*a, **k))
    model = ByAMethod().eval()
    fused = nin.fuse(model).model
    x = torch.randn(2, 6, 7, 5)
    with torch.no_grad():
        torch.testing.assert_close(fused.forward(x), model(x), rtol=1e-5, atol=1e-5)  # by its modules
        assert calls == [5]
        # who calls the method gets the layers' results
        assert torch.equal(fused.hidden(x), model.hidden(x))
        assert torch.equal(fused.wide(x), model.wide(x))
    assert calls == [5]
