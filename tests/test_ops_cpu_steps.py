"""The steps of compiled networks, one by one, against PyTorch in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nin
from nin.fusion.compiled_kernels import find_step
from nin.fusion.compiled_layers import convolution
from nin.fusion.compiled_plan import TorchAction
from nin.ops.cpu import abi, dispatch
from nin.ops.cpu.steps import run_step

pytestmark = pytest.mark.skipif(dispatch.KERNELS is None, reason="steps need the compiled library")

# of float32 the sets with dot products of bfloat16 have the kernels of avx512
each_isa_and_dtype = pytest.mark.parametrize(
    ("isa", "dtype"),
    [
        *((isa, torch.float32) for isa in ("portable", "avx2", "avx512")),
        *((isa, torch.bfloat16) for isa in ("portable", "avx2", "avx512_bf16", "avx512_amx")),
    ],
    indirect=["isa"],
)
each_layout = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)

# channels, channels out, groups, taps, stride, padding, dilation
CONVOLUTIONS = [
    *((3, 40, 1, 4, 4, 0, 1), (3, 17, 1, 7, 2, 3, 1), (40, 80, 1, 2, 2, 0, 1), (5, 6, 1, (3, 1), (1, 2), (2, 0), 2)),
    *((33, 8, 1, 3, 1, 1, 1), (130, 34, 1, 1, 2, 0, 1), (12, 18, 3, 3, 1, 1, 1), (64, 128, 8, (1, 3), 2, (0, 1), 1)),
    *((33, 33, 33, 3, 1, 1, 1), (70, 70, 70, 7, 2, 3, 1), (5, 5, 5, (2, 5), (3, 1), 4, 2), (6, 12, 6, 3, 1, 1, 1)),
]


@each_isa_and_dtype
@each_layout
@pytest.mark.parametrize("sizes", CONVOLUTIONS, ids=str)
def test_convolutions_of_any_geometry(isa, dtype, sizes, layout):
    torch.manual_seed(0)
    channels, out, groups, taps, *geometry = sizes
    layer = nn.Conv2d(channels, out, taps, *geometry, groups=groups, bias=taps != 2).to(dtype)
    wide = torch.randn(2, channels + 3, 15, 13).to(dtype).contiguous(memory_format=layout)
    threads = torch.get_num_threads()
    with torch.no_grad():
        wanted = F.hardswish(copy.deepcopy(layer).double()(wide[:, 2:-1].double()))
        for x in (wide[:, 2:-1], wide[:, 2:-1].clone()):
            found = convolution(x, layer.weight, layer.bias, *geometry, groups, "hardswish")
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                run_step(dispatch.KERNELS, found.step, x, None, found.y.fill_(7))
                results.append(found.y.clone())
            torch.set_num_threads(threads)
            plain = find_step(layer, (x,), {})
            run_step(dispatch.KERNELS, plain.step.with_activation(5), x, None, plain.y.fill_(7))
            assert all(torch.equal(y, results[0]) for y in (*results, plain.y))
            size = wanted.abs().max().item()
            rounding = 1.01 * 2**-8 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(results[0].double(), wanted, rtol=rounding, atol=1e-5 * size)


def results_of(found, x):
    """Return a step's result, the same for one, two and three threads."""
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        run_step(dispatch.KERNELS, found.step, x, found.other, found.y.fill_(7))
        results.append(found.y.clone())
    torch.set_num_threads(threads)
    bits = torch.int16 if found.y.dtype == torch.bfloat16 else torch.int32  # of NaNs too
    assert all(torch.equal(y.view(bits), results[0].view(bits)) for y in results)
    return results[0]


def close(result, wanted):
    """Compare with the float64 result: one rounding of bfloat16, or 1e-5."""
    assert result.shape == wanted.shape
    rounding = 1.01 * 2**-8 if result.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(result.double(), wanted, rtol=rounding, atol=1e-5 * wanted.abs().max().item())


def rows_of_some_layouts(channels, dtype):
    """Return values whose last axis is the channels: rows, images, a part of wider ones, images of NCHW."""
    images = (3 + torch.randn(2, channels + 5, 9, 11)).to(dtype)
    last = images.contiguous(memory_format=torch.channels_last)
    cut = images[:, 2 : 2 + channels]
    return [
        (3 + torch.randn(37, channels)).to(dtype),
        (3 + torch.randn(2, 6, channels)).to(dtype),
        last[:, 3 : 3 + channels].permute(0, 2, 3, 1),
        cut.permute(0, 2, 3, 1),
        cut.contiguous().permute(0, 2, 3, 1),
    ]


@each_isa_and_dtype
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels", [1, 7, 40, 130])
def test_layer_norm(isa, dtype, channels, affine):
    torch.manual_seed(0)
    norm = nn.LayerNorm(channels, 0.1, elementwise_affine=affine).to(dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
        for x in rows_of_some_layouts(channels, dtype):
            found = find_step(norm, (x,), {})
            close(results_of(found, x), copy.deepcopy(norm).double()(x.double()))
            same = find_step(F.layer_norm, (x, [channels]), {"weight": norm.weight, "bias": norm.bias, "eps": 0.1})
            assert torch.equal(results_of(same, x), found.y)


@each_isa_and_dtype
@pytest.mark.parametrize("channels", [5, 64, 70])
def test_factors_of_channels(isa, dtype, channels):
    """Squeeze-and-excitation's, of each image, and those of layer scale."""
    torch.manual_seed(0)
    wide = torch.randn(2, channels + 5, 9, 7).to(dtype).contiguous(memory_format=torch.channels_last)
    for x in (wide[:, 2 : 2 + channels], wide[:, 2 : 2 + channels].contiguous(memory_format=torch.channels_last)):
        for shape in [(2, channels, 1, 1), (1, channels, 1, 1), (channels, 1, 1)]:
            factors = torch.randn(shape).to(dtype)
            for args in ((x, factors), (factors, x)):
                close(results_of(find_step(torch.mul, args, {}), x), x.double() * factors.double())
        pixels, factors = x.permute(0, 2, 3, 1), torch.randn(channels).to(dtype)
        close(results_of(find_step(torch.mul, (pixels, factors), {}), pixels), pixels.double() * factors.double())


@each_isa_and_dtype
@pytest.mark.parametrize("channels", [5, 64, 70])
def test_sums_and_products_of_parts(isa, dtype, channels):
    """Of images of which one is a part of the channels of wider ones."""
    torch.manual_seed(0)
    wide = torch.randn(3, channels + 5, 9, 7).to(dtype).contiguous(memory_format=torch.channels_last)
    part, other = wide[:, 2 : 2 + channels], torch.randn(3, channels, 9, 7).to(dtype)
    other = other.contiguous(memory_format=torch.channels_last)
    for function, name in [(torch.add, "add"), (torch.mul, "mul")]:
        for args in [(part, other), (other, part), (part, wide[:, :channels])]:
            wanted = getattr(args[0].double(), name)(args[1].double())
            close(results_of(find_step(function, args, {}), args[0]), wanted)
    close(results_of(find_step(F.hardswish, (part,), {}), part), F.hardswish(part.double()))
    wanted = F.relu(part)
    found = find_step(torch.relu_, (part,), {})
    run_step(dispatch.KERNELS, found.step, part, None, part)
    assert torch.equal(part, wanted)


@each_isa_and_dtype
def test_batch_norm(isa, dtype):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(33).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2)
    norm, x = norm.to(dtype), torch.randn(2, 33, 5, 4).to(dtype).contiguous(memory_format=torch.channels_last)
    wanted = copy.deepcopy(norm).double()(x.double())
    for function, args in [
        (norm, (x,)),
        (F.batch_norm, (x, norm.running_mean, norm.running_var, norm.weight, norm.bias)),
    ]:
        found = find_step(function, args, {})
        close(results_of(found, x), wanted)
        activated = found._replace(step=found.step.with_activation(abi.ACTIVATION_CODES["silu"]))
        close(results_of(activated, x), F.silu(wanted))
    assert find_step(copy.deepcopy(norm).train(), (x,), {}) is None
    assert find_step(norm, (x.contiguous(),), {}) is None


def test_pixelwise_steps_keep_what_is_not_a_number():
    x = torch.randn(1, 19, 3, 3).contiguous(memory_format=torch.channels_last)
    x[0, 3, 1, 1], x[0, 18, 2, 0] = float("nan"), float("inf")
    rows = x.permute(0, 2, 3, 1)
    for function, args in [(torch.mul, (x, torch.randn(19, 1, 1))), (F.layer_norm, (rows, [19]))]:
        found = find_step(function, args, {})
        torch.testing.assert_close(results_of(found, args[0]), function(*args), rtol=1e-5, atol=1e-5, equal_nan=True)


class Views(nn.Module):
    """Images cut, turned, joined and read in other shapes, by the library and by PyTorch, some changed in place."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 24, 3, 2, 1), nn.LayerNorm(24), nn.Linear(44, 5)
        self.a, self.b, self.c = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding="same", groups=8), nn.Conv2d(12, 9, 1)

    def forward(self, x):
        x = self.norm(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        first, second, third = x.chunk(3, 1)
        first = self.a(first)
        third = torch.relu_(third)  # seen in x
        second = self.b(second[:, :, 1:]) + second[:, :, 1:].flip(3)
        y = torch.cat([first[:, :, 1:], second, self.c(x[:, 4:16, 1:]), third[:, :, 1:]], 1)
        whole = y.narrow(1, 0, 33).flatten(2)
        z = torch.cat([y, F.relu6(y[:, ::3])], dim=-3)
        return self.head(z.mean((2, 3))), whole, x, third.permute(0, 2, 3, 1), z[:, 4:9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_views_are_the_memory_that_they_look_at(batch, dtype):
    torch.manual_seed(0)
    model = Views().eval().to(dtype).to(memory_format=torch.channels_last)
    net = nin.fuse(model).compile()
    exact = copy.deepcopy(model).double()
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(batch, 3, 17, 13).to(dtype).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            results, wanted = net(x), exact(x.double())
        for result, value in zip(results, wanted, strict=True):
            assert result.shape == value.shape
            tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
            assert (result.double() - value).norm() <= tolerance * value.norm()
    assert net.reason == ""
    (plan,) = net._plans.values()
    torchs = [part.function.__name__ for part in plan.parts if isinstance(part, TorchAction)]
    assert sorted(set(torchs)) == ["_view_of", "flip", "relu6"]  # of channels that lie apart


@pytest.mark.parametrize("pad", [(0, 1, 2, 3), (1, 1, 0, 0), (0, 0, 0, 0)])
def test_zeros_around_images(pad):
    x = torch.randn(2, 19, 5, 4).contiguous(memory_format=torch.channels_last)
    x[0, 3, 1, 1] = float("nan")
    torch.testing.assert_close(
        results_of(find_step(F.pad, (x, pad), {}), x), F.pad(x, pad), rtol=0, atol=0, equal_nan=True
    )
    for args in [(x, (-1, 1, 0, 0)), (x, (1, 1)), (x, pad, "constant", 1.0), (x, pad, "reflect")]:
        assert find_step(F.pad, args, {}) is None


class PadsItself(nn.Conv2d):
    """A layer with a forward of its own."""

    def forward(self, x):
        height, width = x.shape[2:]
        return F.conv2d(F.pad(x, (width % 2, 1, 0, height % 2)), self.weight, self.bias, self.stride)


class WeightOfImages(nn.Module):
    """A layer whose weight depends on the images, between two that are steps."""

    def __init__(self):
        super().__init__()
        self.first, self.last = PadsItself(3, 8, 3, 2), nn.Conv2d(8, 6, 1)
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x):
        x = self.first(x)
        return self.last(F.conv2d(x, self.weight * x.mean(), None, 1, 1))


def test_layers_with_a_forward_of_their_own_and_weights_of_images():
    torch.manual_seed(0)
    model = WeightOfImages().eval()
    net, exact = nin.fuse(model).compile(), copy.deepcopy(model).double()
    with torch.no_grad():
        for size in [(9, 12), (10, 7)]:
            for _ in range(2):
                x = torch.randn(2, 3, *size).contiguous(memory_format=torch.channels_last)
                close(net(x), exact(x.double()))
    assert net.reason == ""
    torchs = [part.function.__name__ for part in next(iter(net._plans.values())).parts if isinstance(part, TorchAction)]
    assert torchs == ["mean", "mul", "conv2d"]
