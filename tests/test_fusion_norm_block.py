"""ConvNeXt's blocks that fuse finds, forwards that look like one and are not, and what is changed later."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nin
from nin.fusion import chain as chain_module
from nin.ops.cpu import dispatch
from support.chains import LAYOUTS, each_layout, random_grads


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """The order of the paper's code; the subclasses do the same in other words, or something else."""

    def __init__(self, channels=6, hidden=10):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-3)
        self.up, self.act, self.down = nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels)
        self.gamma = nn.Parameter(torch.empty(channels))
        for name, parameter in self.named_parameters():
            if name.startswith(("gamma", "norm")):
                nn.init.uniform_(parameter, 0.5, 1.5)

    def branch(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return self.down(self.act(self.up(y)))

    def forward(self, x):
        return x + (self.gamma * self.branch(x)).permute(0, 3, 1, 2)


class ByConvolutions(Block):
    def __init__(self):
        super().__init__()
        self.norm2d = LayerNorm2d(6)
        del self.norm
        self.up, self.down = nn.Conv2d(6, 10, 1), nn.Conv2d(10, 6, 1, bias=False)
        self.drop, self.shortcut = nn.Dropout(0.2), nn.Identity()

    def forward(self, x):
        y = self.drop(self.down(self.drop(self.act(self.up(self.norm2d(self.depthwise(x)))))))
        return self.drop(y.mul(self.gamma.reshape(1, -1, 1, 1))) + self.shortcut(x)


class ByFunctions(Block):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6, bias=False)

    def forward(self, x):
        y = torch.permute(self.depthwise(x), (0, -2, -1, 1))
        y = F.layer_norm(y, (6,), weight=self.norm.weight, eps=1e-4)
        y = torch.permute(self.down(F.silu(self.up(y))), dims=[0, 3, 1, 2])
        y = torch.mul(self.gamma[:, None, None], y)
        y += x
        return y


class InPlace(Block):
    def forward(self, x):
        return self.branch(x).permute(0, 3, 1, 2).add_(x)


class WithoutScaleAndSum(Block):
    def forward(self, x):
        return self.branch(x).permute(0, 3, 1, 2)


class Strided(Block):
    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(6, 6, (3, 5), (2, 1), (0, 2), (1, 2), groups=6, bias=False)
        self.norm = nn.LayerNorm(6, elementwise_affine=False)
        self.act = nn.ReLU6()

    def forward(self, x):
        return (self.branch(x) * self.gamma).permute(0, 3, 1, 2)


FOUND = {
    Block: ["layer_scale", "permute", "residual"],
    ByConvolutions: ["layer_scale", "residual"],
    ByFunctions: ["permute", "layer_scale", "residual"],
    InPlace: ["permute", "residual"],
    WithoutScaleAndSum: ["permute"],
    Strided: ["layer_scale", "permute"],
}


class OtherSum(Block):
    def forward(self, x):
        return 2 * x + (self.gamma * self.branch(x)).permute(0, 3, 1, 2)


class ScaledTwice(Block):
    def forward(self, x):
        return x + self.gamma[:, None, None] * (self.gamma * self.branch(x)).permute(0, 3, 1, 2)


class ScaledByPixels(Block):
    def __init__(self):
        super().__init__()
        self.factors = nn.Parameter(torch.rand(7, 1))

    def forward(self, x):
        return x + self.factors * self.branch(x).permute(0, 3, 1, 2)


class SumBeforePermutation(Block):
    def forward(self, x):
        return (self.branch(x) + x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NormOfPixels(Block):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(5)

    def branch(self, x):
        return self.down(self.act(self.up(self.norm(self.depthwise(x)).permute(0, 2, 3, 1))))


class NormOfTwoAxes(Block):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm((5, 6))


class GlobalResponse(Block):
    def branch(self, x):
        y = self.act(self.up(self.norm(self.depthwise(x).permute(0, 2, 3, 1))))
        return self.down(y * y.norm(dim=(1, 2), keepdim=True))


class HiddenUsedTwice(Block):
    def branch(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return self.down(self.act(self.up(y))) + y


class KeepsTheNorm(Block):
    def branch(self, x):
        self.kept = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return self.down(self.act(self.up(self.kept)))


class OtherPermutation(Block):
    def branch(self, x):
        y = self.norm(self.depthwise(x).permute(0, 3, 2, 1))
        return self.down(self.act(self.up(y))).permute(0, 2, 1, 3)


class ChangedBetween(Block):
    def forward(self, x):
        y = self.branch(x)
        x = x.mul(2)
        return x + (self.gamma * y).permute(0, 3, 1, 2)


class WeightedSum(Block):
    def forward(self, x):
        return torch.add((self.gamma * self.branch(x)).permute(0, 3, 1, 2), x, alpha=2)


class TanhInside(Block):
    def __init__(self):
        super().__init__()
        self.act = nn.GELU(approximate="tanh")


# what they do differently is behind the block
WITHOUT_SUM = [OtherSum, ScaledByPixels, SumBeforePermutation, WeightedSum, ChangedBetween, ScaledTwice]
NOT_FOUND = [NormOfPixels, NormOfTwoAxes, GlobalResponse, HiddenUsedTwice, KeepsTheNorm, OtherPermutation, TanhInside]
OTHERS = [*WITHOUT_SUM, *NOT_FOUND]


def blocks(fused):
    return [chain for chain in fused.chains if chain.chain.normalizes]


def images(dtype=torch.float64, layout=torch.contiguous_format):
    return torch.randn(2, 6, 7, 5).to(dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("cls", FOUND)
@each_layout
def test_what_is_found_and_the_results(cls, layout):
    model = cls().double().eval()
    fused = nin.fuse(model)
    assert [chain.layers for chain in blocks(fused)] == [("depthwise", "up", "down")]
    steps = blocks(fused)[0].chain.steps
    assert list(steps[len(steps) - 1 - steps[::-1].index("layer") + 1 :]) == FOUND[cls]
    for form in ("operator", "1×1 operators", "original"):
        blocks(fused)[0].chain.form = form
        x = images(layout=layout)
        torch.testing.assert_close(fused.model(x), model(x), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(fused.model.forward(x), model(x), rtol=1e-10, atol=1e-12)
    assert blocks(fused)[0].chain.forms == ("operator", "1×1 operators", "original")


@pytest.mark.parametrize("cls", OTHERS)
def test_what_is_not_found_or_not_to_its_end(cls):
    model = cls().double().eval()
    fused = nin.fuse(model)
    assert all("residual" not in chain.chain.steps for chain in blocks(fused))
    assert not blocks(fused) or cls in WITHOUT_SUM
    x = images()
    torch.testing.assert_close(fused.model(x), model(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cls", [*FOUND, *OTHERS])
def test_a_forward_that_does_something_else_later_does_it(cls):
    """The model had the form when it was fused, and has another forward now."""
    for first in (Block, ByConvolutions):
        model = first().double().eval()
        fused = nin.fuse(model).model
        x, other = images(), cls().double().eval()
        fused(x)
        for network in (model, fused):
            network.__class__ = type(cls.__name__, (cls,), {})
            for name, module in other.named_children():
                if name not in ("depthwise",):
                    setattr(network, name, module)
            for name, parameter in other.named_parameters(recurse=False):
                setattr(network, name, parameter)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(dispatch.KERNELS is None, reason="no compiled kernels here")
@pytest.mark.parametrize("cls", FOUND)
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)
def test_the_block_is_one_call(cls, dtype, autocast, monkeypatch):
    calls, called = [], chain_module.inverted_bottleneck
    monkeypatch.setattr(chain_module, "inverted_bottleneck", lambda *a, **k: calls.append(k) or called(*a, **k))
    monkeypatch.setattr(chain_module, "mlpconv", None)
    model = cls().to(dtype).eval()
    fused = nin.fuse(model).model
    x = images(dtype)
    tolerance = 1e-5 if dtype == torch.float32 and not autocast else 0.1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result, expected = fused.forward(x), model(x)
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    assert [call["residual"] for call in calls] == ["residual" in FOUND[cls] and not autocast]


def replace_norm(model):
    model.norm = nn.LayerNorm(6, eps=1.0).to(model.gamma.dtype)


def write_norm(model):
    model.norm.weight.data.mul_(2)


def write_norms_bias(model):
    model.norm.bias.detach().numpy()[:] += 1


def write_gamma(model):
    model.gamma.data.mul_(-1)


def replace_gamma(model):
    model.gamma = nn.Parameter(torch.full_like(model.gamma, 3.0))


def reshape_gamma(model):
    model.gamma = nn.Parameter(torch.linspace(1, 2, 5, dtype=model.gamma.dtype)[:, None])


def write_last_bias(model):
    with torch.no_grad():
        model.down.bias.add_(1)


def hook_norm(model):
    model.norm.register_forward_hook(lambda module, inputs, output: 2 * output)


def set_epsilon(model):
    model.norm.eps = 0.5


CHANGES = [replace_norm, write_norm, write_norms_bias, write_gamma, replace_gamma, reshape_gamma, write_last_bias]


@pytest.mark.parametrize("change", [*CHANGES, hook_norm, set_epsilon])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_changed_later_takes_effect(change, dtype):
    model = Block().to(dtype).eval()
    fused = nin.fuse(model).model
    x = images(dtype)
    before = model(x)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fused(x), before, rtol=1e-5, atol=1e-5)
        change(model)
        change(fused)
        for _ in range(3):
            torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(x), before)


@pytest.mark.parametrize("cls", [Block, ByConvolutions, ByFunctions])
def test_gradients_in_both_modes(cls):
    for training in (False, True):
        model = cls().double().train(training)
        if training and cls is ByConvolutions:
            model.drop.p = 0.0
        fused = nin.fuse(model, training=training)
        assert blocks(fused)
        x = images()
        expected = random_grads([*model.parameters()], model(x))
        for grad, want in zip(random_grads([*fused.model.parameters()], fused.model(x)), expected, strict=True):
            torch.testing.assert_close(grad, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_input_that_changes_in_place_afterwards_and_inputs_of_other_shapes(layout):
    model = Block().eval()
    fused = nin.fuse(model).model
    with torch.no_grad():
        for shape in ((2, 6, 7, 5), (1, 6, 9, 9), (3, 6, 1, 1), (2, 6, 7, 5)):
            x = torch.randn(shape).contiguous(memory_format=layout)
            result, expected = fused(x), model(x)
            x.zero_()
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
