"""Compiled networks: first inputs that hide errors, and calls that PyTorch takes though few write them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nin
from nin.fusion.compiled_kernels import find_step
from nin.ops.cpu import dispatch

pytestmark = pytest.mark.skipif(dispatch.KERNELS is None, reason="steps need the compiled library")


def chain(channels=8):
    torch.manual_seed(0)
    return nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, channels, 1)


def inverted_bottleneck(limit):
    """Return a block of two ReLU6, of which the second has another limit."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(8, 16, 1),
        nn.ReLU6(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.ReLU6(),
        nn.Conv2d(16, 8, 1),
    )
    model = nn.Sequential(*layers).eval()
    model[3].max_val = limit
    return model


def images(*size, seed=1, dtype=torch.float32):
    x = torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def agrees(net, model, *inputs):
    """Compare the results of a compiled network and of its model for inputs of two layouts, twice."""
    with torch.no_grad():
        for layout in (torch.channels_last, torch.contiguous_format):
            given = [x.contiguous(memory_format=layout) if x.dim() == 4 else x for x in inputs]
            for _ in range(2):
                torch.testing.assert_close(net(*given), model(*given), rtol=1e-4, atol=1e-5)


class AsksForATensor(nn.Sequential):
    def forward(self, x):
        return super().forward(x * 2 if isinstance(x, torch.Tensor) else x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [0.0, 1e-9, float("nan"), float("inf")])
def test_errors_show_whatever_the_first_input_is(first, dtype):
    model = AsksForATensor(*chain()).to(dtype).eval()
    net = nin.fuse(model).compile()
    net(torch.full((2, 8, 6, 6), first, dtype=dtype))
    assert "other values" in net.reason
    agrees(net, model, images(2, 8, 6, 6, dtype=dtype))
    right = nin.fuse(nn.Sequential(*chain()).to(dtype).eval()).compile()
    right(torch.full((2, 8, 6, 6), first, dtype=dtype))
    assert right.reason == ""
    assert len(right._plans) == 1


class TakesNothing(nn.Sequential):
    """Parts of images without a channel or without a row, on the way and in the result."""

    def forward(self, x):
        y = super().forward(x)
        head, rest = y.split([0, y.shape[1]], 1)
        low = F.relu(y[:, :, 1:])
        return (
            torch.cat([head, F.relu(y[:, 1:]), rest], 1),
            low.permute(0, 2, 3, 1),
            y[:0],
            F.relu(rest),
            y.narrow(3, 1, 0),
        )


@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize("size", [(1, 8, 1, 1), (2, 8, 5, 4)])
def test_views_without_values(channels, size):
    model = TakesNothing(*chain(channels)).eval()
    net = nin.fuse(model).compile()
    agrees(net, model, images(*size))
    assert net.reason == ""


class UsesOtherNames(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        z = y.permute(1, 0, 2, 3)
        joined = torch.cat([y, y], axis=1), torch.cat([z, z], axis=2), torch.cat(tensors=[y, x], dim=1)
        means = torch.mean(y, axis=(2, 3)), y.mean(axis=(2, 3), keepdims=True)
        return *joined, *means, torch.mul(y, x, out=None), torch.sigmoid(y, out=None), torch.add(input=y, other=x)


def test_arguments_that_only_pytorch_knows():
    model = UsesOtherNames(*chain()).eval()
    net = nin.fuse(model).compile()
    agrees(net, model, images(2, 8, 5, 4))
    assert net.reason == ""


class CallsByName(nn.Module):
    """A chain, a block of ConvNeXt, a single layer, each of which gets its input by name."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.depthwise, self.norm = nn.Conv2d(8, 8, 7, padding=3, groups=8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.last = nn.Conv2d(8, 4, 3)

    def forward(self, x):
        x = self.second(F.relu(self.first(input=x)))
        y = self.norm(self.depthwise(input=x).permute(0, 2, 3, 1))
        x = x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)
        return self.last(input=x)


def test_layers_called_by_name():
    model = CallsByName().eval()
    fused = nin.fuse(model)
    agrees(fused.model, model, images(2, 8, 9, 9))
    net = fused.compile()
    agrees(net, model, images(2, 8, 9, 9))
    assert net.reason == ""


def test_other_limits_than_those_of_relu6():
    for limit in (6.0, 0.5):
        model = inverted_bottleneck(limit)
        fused = nin.fuse(model)
        net = fused.compile()
        net(1e-3 * images(2, 8, 9, 9))  # within both limits
        agrees(net, model, 100 * images(2, 8, 9, 9))
        agrees(fused.model, model, 100 * images(2, 8, 9, 9))
        assert net.reason == ""
    x = images(2, 8, 5, 4)
    assert find_step(nn.Hardtanh(0, 6), (x,), {}) is not None
    assert find_step(nn.Hardtanh(), (x,), {}) is None


class TakesACovariance(nn.Sequential):
    """Another matrix than a covariance's is refused, as the check's would be."""

    def forward(self, x, covariance):
        return super().forward(x) * torch.linalg.cholesky(covariance)[-1, -1]


def test_a_forward_that_refuses_other_values():
    model = TakesACovariance(*chain()).eval()
    net = nin.fuse(model).compile()
    with pytest.raises(RuntimeError, match="expected input"):  # of wrong inputs, the modules' own
        net(images(2, 7, 5, 4), torch.eye(3))
    assert net.reason == ""
    agrees(net, model, images(2, 8, 5, 4), torch.eye(3) + 0.1)
    assert "LinAlgError" in net.reason


def test_a_snapshot_is_taken_whatever_the_default_device_is():
    model, x = nn.Sequential(*chain()).eval(), images(2, 8, 5, 4)
    with torch.device("meta"):
        net = nin.fuse(model).compile()
    agrees(net, model, x)
    assert net.reason == ""


class AddsWhereItIsLarge(nn.Sequential):
    """Values under two names that change in place, but not for the first inputs."""

    def forward(self, x):
        y = skip = super().forward(x)
        y += F.relu(y - 20)
        first, second = y.chunk(2, 1)
        first *= 1 + F.relu(second - 20)
        x -= F.relu(x - 20)
        return skip, x


def test_changes_in_place_that_the_first_input_does_not_show():
    model = AddsWhereItIsLarge(*chain()).eval()
    net = nin.fuse(model).compile()
    net(images(2, 8, 5, 4))
    assert net.reason == ""
    x = 200 * images(2, 8, 5, 4)
    mine, theirs = x.clone(), x.clone()
    with torch.no_grad():
        torch.testing.assert_close(net(mine), model(theirs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine, theirs)
    assert not torch.equal(mine, x)
