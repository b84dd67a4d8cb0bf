"""Compiled networks in bfloat16, with every instruction set: against float64, and no step left to PyTorch."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nin
from nin.fusion import compiled
from nin.fusion.compiled_kernels import find_step
from nin.fusion.compiled_plan import TorchAction
from nin.fusion.compiled_recorder import Recorder
from nin.ops.cpu import dispatch
from nin.ops.cpu.steps import StepKind, run_step

pytestmark = pytest.mark.skipif(dispatch.KERNELS is None, reason="steps need the compiled library")

ROUNDING = 2**-8  # the most that one rounding to bfloat16 changes a value, relative to it


class Block(nn.Module):
    """An inverted bottleneck with squeeze-and-excitation and its input added, or one in ConvNeXt's order."""

    def __init__(self, channels, hidden, *, normalizes=False):
        super().__init__()
        self.normalizes = normalizes
        wide = channels if normalizes else hidden
        self.first = nn.Conv2d(channels, hidden, 1)
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.squeeze, self.excite = nn.Conv2d(hidden, 5, 1), nn.Conv2d(5, hidden, 1)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.last = nn.Conv2d(hidden, channels, 1)

    def forward(self, x):
        if self.normalizes:
            y = self.norm(self.depthwise(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return x + self.last(F.gelu(self.first(y)))
        y = F.hardswish(self.depthwise(F.hardswish(self.first(x))))
        factors = self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True))))
        return x + self.last(y * torch.sigmoid(factors))


class Network(nn.Module):
    """Every kind of step, and nothing else."""

    def __init__(self, width=11, hidden=37):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width, hidden), Block(width, hidden, normalizes=True), Block(width, hidden))
        self.first, self.second = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)
        self.head = nn.Linear(width, 6)

    def forward(self, x):
        x = self.blocks(F.relu6(self.norm(self.stem(x))))
        x = F.avg_pool2d(F.max_pool2d(x, 3, 2, 1), 2, 1)
        x = F.silu(x + F.relu(self.second(F.relu(self.first(x)))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def network(dtype=torch.bfloat16, kind=Network):
    torch.manual_seed(0)
    model = kind().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.to(dtype)


def images(batch, height, width, layout, dtype=torch.bfloat16):
    return torch.randn(batch, 3, height, width).to(dtype).contiguous(memory_format=layout)


def exact(model, x):
    with torch.no_grad():
        return copy.deepcopy(model).double()(x.double())


def error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_network_is_one_native_call_with_equal_bits_for_any_number_of_threads(isa, batch, monkeypatch):
    model, x = network(), images(batch, 37, 29, torch.channels_last)
    net = nin.fuse(model).compile()
    net(x)
    assert net.reason == ""
    step_by_step, plan = Recorder(net.network, net._graph, dispatch.KERNELS).record([x])
    assert len(plan.parts) == 1
    assert not isinstance(plan.parts[0], TorchAction)
    monkeypatch.setattr(net, "network", None)  # not called any more
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(net(x))
    torch.set_num_threads(before)
    assert results[0].dtype == torch.bfloat16
    assert all(torch.equal(y, results[0]) for y in results)
    wanted = exact(model, x)
    assert error(step_by_step, wanted) < 3 * ROUNDING
    # not further off than PyTorch's layers one by one
    assert error(results[0], wanted) < max(1.5 * error(model(x).detach(), wanted), 2 * ROUNDING)


@pytest.mark.parametrize("isa", ["portable", "avx512_bf16"], indirect=True)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(1, 8, 8), (2, 19, 33), (5, 24, 9)])
def test_odd_shapes_in_both_layouts(isa, layout, size):
    model, x = network(), images(*size, layout)
    net = nin.fuse(model).compile()
    for changed in (x, x[:1], x.transpose(2, 3), x.flip(0)):
        assert error(net(changed), exact(model, changed)) < 5 * ROUNDING
    assert net.reason == ""


POOLS = [(F.max_pool2d, (3, 2, 1)), (F.max_pool2d, (2, 1, 1, 2)), (F.avg_pool2d, (3, 2, 1, True, False))]
POOLS += [(F.avg_pool2d, ((3, 2), (2, 1), (1, 0), True, False, 5)), (F.adaptive_avg_pool2d, ((1, 1),))]
POOLS += [(torch.mean, ([2, 3], True)), (torch.mean, ((-1, 2),))]
ACTIVATIONS = [(f, ()) for f in (F.relu, F.relu6, F.hardswish, F.silu, F.gelu, F.hardsigmoid, torch.sigmoid)]


@pytest.mark.parametrize("shape", [(1, 2, 3, 2), (2, 37, 11, 9), (3, 64, 5, 4)])
def test_steps_round_once(isa, shape):
    x = (3 * torch.randn(shape)).bfloat16().to(memory_format=torch.channels_last)
    other = torch.randn(shape).bfloat16().to(memory_format=torch.channels_last)
    x[0, 0, 0, 0], x[-1, -1, 1, 1], x[-1, 0, 2, 0] = float("nan"), float("inf"), -1e-39
    kinds = set()
    for function, args in [*((f, (x, *options)) for f, options in POOLS + ACTIVATIONS), (torch.add, (x, other))]:
        found = find_step(function, args, {})
        kinds.add(found.step.kind)
        run_step(dispatch.KERNELS, found.step, x, found.other, found.y.fill_(7))
        wanted = function(*(t.double() if isinstance(t, torch.Tensor) else t for t in args))
        assert (found.y.dtype, found.y.shape) == (torch.bfloat16, wanted.shape)
        torch.testing.assert_close(
            found.y.double(),
            wanted,
            rtol=1.01 * ROUNDING,
            atol=1e-6,
            equal_nan=True,
            msg=lambda m, f=function: f"{f}: {m}",
        )
    assert kinds == {StepKind.ADD, StepKind.MAX_POOL, StepKind.AVERAGE_POOL}


@pytest.mark.parametrize("bias", [True, False])
def test_fully_connected_layers_round_once(isa, bias):
    for batch, channels, outputs in [(1, 1, 1), (1, 130, 7), (3, 17, 6), (9, 33, 40), (70, 8, 3)]:
        x, layer = torch.randn(batch, channels).bfloat16(), nn.Linear(channels, outputs, bias=bias).bfloat16()
        with torch.no_grad():
            found = find_step(layer, (x,), {})
            assert found.step.kind == StepKind.LINEAR
            run_step(dispatch.KERNELS, found.step, x, None, found.y.fill_(7))
            alone = find_step(layer, (x[-1:],), {})
            run_step(dispatch.KERNELS, alone.step, x[-1:], None, alone.y)
            wanted = copy.deepcopy(layer).double()(x.double())
        torch.testing.assert_close(found.y.double(), wanted, rtol=1.01 * ROUNDING, atol=1e-5)
        assert torch.equal(alone.y[0], found.y[-1])  # whatever the batch


def in_double(function):
    return copy.deepcopy(function).double() if isinstance(function, nn.Module) else function


@pytest.mark.parametrize("channels", [2, 37, 64])
def test_norms_products_and_depthwise_layers_round_once(isa, channels):
    x = (3 * torch.randn(2, channels, 6, 5)).bfloat16()
    last = x.to(memory_format=torch.channels_last)
    norm, batch_norm = nn.LayerNorm(channels, eps=1e-3), nn.BatchNorm2d(channels).eval()
    for t in (*norm.parameters(), *batch_norm.parameters(), *batch_norm.buffers()):
        t.requires_grad_(False)
        if t.is_floating_point():
            t.uniform_(0.5, 2)
    depthwise = nn.Conv2d(channels, channels, (3, 5), (2, 1), 2, groups=channels)
    each, all_images = torch.randn(2, channels, 1, 1).bfloat16(), torch.randn(channels, 1, 1).bfloat16()
    calls = [(norm.bfloat16(), (last.permute(0, 2, 3, 1),)), (norm, (x.permute(0, 2, 3, 1),)), (norm, (x[:, :, 0, 0],))]
    calls += [(batch_norm.bfloat16(), (last,)), (copy.deepcopy(batch_norm).float(), (last,))]
    calls += [(torch.mul, (last, each)), (torch.mul, (all_images, last))]
    calls += [(depthwise.bfloat16(), (last,)), (depthwise, (x,))]
    kinds = set()
    with torch.no_grad():
        for function, args in calls:
            found = find_step(function, args, {})
            kinds.add(found.step.kind)
            run_step(dispatch.KERNELS, found.step, found.x, found.other, found.y.fill_(7))
            wanted = in_double(function)(*(t.double() for t in args))
            torch.testing.assert_close(found.y.double(), wanted, rtol=1.01 * ROUNDING, atol=1e-5)
    assert kinds == {StepKind.LAYER_NORM, StepKind.SCALE_SHIFT, StepKind.DEPTHWISE}


class Views(nn.Module):
    """Channels that are joined, divided and moved, and layers of two dtypes in a row."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(12, 6, 3, padding=1, groups=3)
        self.norm = nn.LayerNorm(9)

    def forward(self, x):
        a = F.relu(self.first(x))
        b, c = self.second(torch.cat((a, a.sigmoid()), 1)).chunk(2, 1)
        c = torch.cat((b, a), 1).permute(0, 2, 3, 1)
        return self.norm(c).permute(0, 3, 1, 2), b


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_views_in_bfloat16(layout):
    model, x = network(kind=Views), images(2, 7, 9, layout)
    net = nin.fuse(model).compile()
    with torch.no_grad():
        for _ in range(2):
            for y, wanted in zip(net(x), exact(model, x), strict=True):
                assert y.dtype == torch.bfloat16
                assert error(y, wanted) < 3 * ROUNDING
    assert net.reason == ""


def test_tensors_of_two_dtypes_have_no_step():
    a = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last)
    b, rows = a.bfloat16(), torch.randn(2, 4)
    assert find_step(torch.add, (a, b), {}) is None
    assert find_step(F.linear, (rows.bfloat16(), torch.randn(3, 4)), {}) is None
    assert find_step(F.linear, (rows, torch.randn(3, 4), torch.randn(3).bfloat16()), {}) is None
    assert find_step(F.relu, (a.half(),), {}) is None


class Mixed(nn.Module):
    """In float32, bfloat16 and float32 again; sums of both."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 1) for i in range(6))
        self.convs[2:4].bfloat16()

    def forward(self, x):
        a = F.relu(self.convs[1](F.relu(self.convs[0](x))))
        b = F.max_pool2d(a.bfloat16(), 3, 1, 1)
        b = F.hardswish(b + self.convs[3](F.relu(self.convs[2](b))))
        c = F.hardswish(a + b)
        return self.convs[5](F.relu(self.convs[4](c))), b.mean((2, 3))


def test_a_network_of_two_dtypes_is_recorded():
    model, x = network(None, Mixed), images(2, 9, 7, torch.channels_last, torch.float32)
    net = nin.fuse(model).compile()
    with torch.no_grad():
        for _ in range(2):
            for y, wanted in zip(net(x), model(x), strict=True):
                assert y.dtype == wanted.dtype
                assert error(y, wanted.double()) < 2 * ROUNDING
    assert net.reason == ""
    (plan,) = net._plans.values()
    assert plan.dtypes == {torch.float32, torch.bfloat16}


def test_each_dtype_has_its_steps_and_its_memory():
    """The same shapes in half the bytes; a copy that is cast records anew."""
    sizes = []
    for dtype in (torch.float32, torch.bfloat16):
        net = nin.fuse(network(dtype)).compile()
        net(images(1, 37, 29, torch.channels_last, dtype))
        (plan,) = net._plans.values()
        sizes.append(plan.memory_bytes)
    assert sizes[1] <= 0.6 * sizes[0]


class Off(nn.Sequential):
    """Gives a little more where it is traced than where it runs."""

    def forward(self, x):
        return super().forward(x) * (1 if type(x) is torch.Tensor else 1 + self.part)


def test_the_check_finds_errors_above_what_roundings_make():
    for seed, part in itertools.product(range(3), (0, 0.05)):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(8, 8, 1), nn.Hardswish(), nn.Conv2d(8, 8, 1), nn.SiLU(), nn.AvgPool2d(2)]
        model = Off(*layers).bfloat16().eval()
        model.part = part
        net = nin.fuse(model).compile()
        net(torch.randn(2, 8, 6, 6).bfloat16())
        assert bool(net.reason) == bool(part), net.reason


def test_what_is_allowed_grows_with_what_roundings_make():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.02, 0.0])
    assert not compiled._are_alike(b, a, a, compiled.BF16_ROUNDING)
    assert compiled._are_alike(b, a, a * 1.01, compiled.BF16_ROUNDING)
    numbers = torch.arange(100)
    one, two = (numbers + (numbers < n) for n in (1, 2))
    assert not compiled._are_alike(two, numbers, numbers, compiled.BF16_ROUNDING)
    assert compiled._are_alike({"a": [two, None]}, {"a": [numbers, None]}, {"a": [one, None]}, 0)
    assert not compiled._are_alike({"a": [two, 1]}, {"a": [numbers, 2]}, {"a": [one, 2]}, 1)
