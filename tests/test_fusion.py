"""Fused models: the same results and gradients, the same names, and only where nothing can go wrong."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import nin
from nin.fusion import CHAIN_FORMS, Chain, rewrite
from nin.fusion import chain as chain_module
from nin.ops.cpu import dispatch
from nin.runtime.timer import Timing


def conv_bn(cin, cout, k=1, **options):
    norm = nn.BatchNorm2d(cout)
    with torch.no_grad():
        for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            t.uniform_(0.5, 1.5)
    return [nn.Conv2d(cin, cout, k, **options), norm]


class Residual(nn.Module):
    """A bottleneck in which one ReLU module serves three times, as torchvision's."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(12, 4, bias=False)
        self.conv2, self.bn2 = conv_bn(4, 4, 3, padding=1, stride=2, bias=False)
        self.conv3, self.bn3 = conv_bn(4, 12, bias=False)
        self.downsample = nn.Sequential(*conv_bn(12, 12, stride=2, bias=False))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class PerPixel(nn.Module):
    """ConvNeXt's and Mixers' way: fully connected layers over the last dimension."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.act = nn.LayerNorm(12), nn.Linear(12, 24), nn.GELU()
        self.drop, self.fc2 = nn.Dropout(0.0), nn.Linear(24, 12)

    def forward(self, x):
        y = x.permute(0, 2, 3, 1)
        y = self.drop(self.fc2(self.drop(self.act(self.fc1(self.norm(y))))))
        return x + y.permute(0, 3, 1, 2)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(12, 5, 1), nn.Conv2d(5, 7, 1, bias=False), nn.Conv2d(7, 3, 1)

    def forward(self, x):
        return self.c(F.silu(self.b(torch.relu(self.a(x)))).relu())


class Branching(nn.Module):
    """What is needed elsewhere too is not hidden."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 6, 1)

    def forward(self, x):
        y = self.a(x)
        return self.b(y) + y


class DecidesByValue(nn.Module):
    """Control flow that cannot be traced, around a block that can."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(12, 6, 1), nn.ReLU(), nn.Conv2d(6, 12, 1))

    def forward(self, x):
        return self.block(x) if x.sum() > 0 else self.block(-x)


class WithOption(nn.Module):
    """What an argument with a default decides is not decided for ever."""

    def __init__(self):
        super().__init__()
        self.block = Optional()

    def forward(self, x):
        return self.block(x) + self.block(x, x) + self.block(x, shortcut=2 * x)


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 12, 1)

    def forward(self, x, shortcut=None):
        if shortcut is None:
            shortcut = 3 * x
        return self.b(torch.relu(self.a(x))) + shortcut


class InvertedResidual(nn.Module):
    """MobileNetV2's block: bottleneck, sum, bottleneck of the next."""

    def __init__(self):
        super().__init__()
        self.first = self.block(12, 1)
        self.second = self.block(10, 2)

    def block(self, cout, stride):
        up, down = conv_bn(12, 20, bias=False), conv_bn(20, 12 if stride == 1 else cout, bias=False)
        depthwise = conv_bn(20, 20, 3, stride=stride, padding=1, groups=20, bias=False)
        return nn.Sequential(*up, nn.ReLU6(inplace=True), *depthwise, nn.ReLU6(inplace=True), *down)

    def forward(self, x):
        return self.second(x + self.first(x))


class Squeezed(nn.Module):
    """Squeeze-and-excitation as timm writes it."""

    def __init__(self):
        super().__init__()
        self.up, self.depthwise = nn.Conv2d(12, 20, 1), nn.Conv2d(20, 20, 5, padding=2, groups=20)
        self.reduce, self.act, self.expand = nn.Conv2d(20, 4, 1), nn.SiLU(inplace=True), nn.Conv2d(4, 20, 1)
        self.gate, self.down = nn.Sigmoid(), nn.Conv2d(20, 12, 1)

    def forward(self, x):
        y = F.silu(self.depthwise(F.silu(self.up(x))))
        factors = self.expand(self.act(self.reduce(y.mean((2, 3), keepdim=True))))
        return x + self.down(y * self.gate(factors))


class Excitation(nn.Module):
    """Squeeze-and-excitation as torchvision writes it."""

    def __init__(self):
        super().__init__()
        self.pool, self.reduce, self.expand = nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)

    def forward(self, x):
        return F.hardsigmoid(self.expand(torch.relu(self.reduce(self.pool(x))))) * x


class SqueezeExcite(nn.Module):
    """A scale for each channel, by one layer, between the depthwise layer and the last: not this form."""

    def __init__(self):
        super().__init__()
        self.up, self.depthwise = nn.Conv2d(12, 20, 1), nn.Conv2d(20, 20, 5, padding=2, groups=20)
        self.scale, self.down = nn.Conv2d(20, 20, 1), nn.Conv2d(20, 7, 1)

    def forward(self, x):
        y = F.hardswish(self.depthwise(F.relu6(self.up(x))))
        return self.down(y * torch.sigmoid(self.scale(y.mean((2, 3), keepdim=True))))


class FunctionalBottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.depthwise = (
            nn.Conv2d(12, 20, 1),
            nn.Conv2d(20, 20, (3, 5), padding=(2, 2), dilation=(2, 1), groups=20),
        )
        self.down, self.after = nn.Conv2d(20, 7, 1), nn.Conv2d(7, 3, 1)

    def forward(self, x):
        y = F.silu(self.depthwise(F.hardswish(self.up(x))))
        return self.after(F.relu6(self.down(y)))


MODELS = {
    "inverted bottleneck": (InvertedResidual, [3, 3]),
    "squeeze-excite": (SqueezeExcite, [1]),
    "squeezed": (Squeezed, [5]),
    "squeezed, separable": (
        lambda: nn.Sequential(
            *conv_bn(12, 12, 3, padding=1, groups=12, stride=2),
            nn.Hardswish(),
            Excitation(),
            *conv_bn(12, 8),
            nn.ReLU6(),
        ),
        [4],
    ),
    "squeezed without a layer behind": (
        lambda: nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12), Excitation(), nn.Conv2d(12, 4, 3)),
        [2],
    ),
    "functional bottleneck": (FunctionalBottleneck, [3]),
    "separable": (
        lambda: nn.Sequential(
            *conv_bn(12, 12, 3, padding=1, groups=12), nn.Hardswish(), *conv_bn(12, 8), nn.ReLU6(), *conv_bn(8, 5)
        ),
        [2, 1],
    ),
    "depthwise with a multiplier": (
        lambda: nn.Sequential(nn.Conv2d(12, 24, 3, groups=12), nn.ReLU(), nn.Conv2d(24, 8, 1), nn.ReLU()),
        [1],
    ),
    "two depthwise layers": (
        lambda: nn.Sequential(
            nn.Conv2d(12, 12, 3, padding=1, groups=12),
            *(nn.Conv2d(12, 16, 1), nn.ReLU6(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 8, 1)),
        ),
        [3],
    ),
    "ends with ReLU6": (
        lambda: nn.Sequential(nn.Conv2d(12, 8, 3), nn.ReLU6(inplace=True), nn.Conv2d(8, 5, 1), nn.Hardswish()),
        [1, 1],
    ),
    "ends with hardswish after BatchNorm": (
        lambda: nn.Sequential(nn.Conv2d(12, 9, 1), nn.ReLU(), *conv_bn(9, 5), nn.Hardswish(), nn.Conv2d(5, 4, 1)),
        [2],
    ),
    "an option": (WithOption, []),
    "an option alone": (Optional, [2]),
    "sequential": (lambda: nn.Sequential(nn.Conv2d(12, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.SiLU()), [2]),
    "k×k first": (lambda: nn.Sequential(nn.Conv2d(12, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(8, 5, 1)), [2]),
    "dilated, odd kernel": (
        lambda: nn.Sequential(nn.Conv2d(12, 8, (1, 3), dilation=2), nn.GELU(), nn.Conv2d(8, 5, 1)),
        [2],
    ),
    "with BatchNorm": (lambda: nn.Sequential(*conv_bn(12, 8), nn.ReLU(), *conv_bn(8, 5), nn.ReLU()), [2]),
    "BatchNorm without its own weights": (
        lambda: nn.Sequential(nn.Conv2d(12, 8, 1), nn.BatchNorm2d(8, affine=False), nn.ReLU()),
        [1],
    ),
    "residual": (Residual, [1, 2, 1]),
    "per pixel": (PerPixel, [2]),
    "functional": (Functional, [2]),
    "branching": (Branching, []),
    "decides by value": (DecidesByValue, [2]),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(12, 12, 3, groups=12), nn.ReLU(), nn.Conv2d(12, 8, 1, groups=4)), []),
    "other activations": (
        lambda: nn.Sequential(nn.Conv2d(12, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.GELU("tanh")),
        [1],
    ),
    "reflecting": (lambda: nn.Sequential(nn.Conv2d(12, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU()), []),
}


def make(name, dtype=torch.float64):
    return MODELS[name][0]().to(dtype).eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_results_are_the_originals(name, layout):
    model = make(name)
    fused = nin.fuse(model)
    assert sorted(len(chain.layers) for chain in fused.chains) == sorted(MODELS[name][1])
    assert all(chain.form == "operator" for chain in fused.chains)
    for shape in ((2, 12, 7, 5), (1, 12, 5, 5), (0, 12, 6, 6)):
        x = torch.randn(shape, dtype=torch.float64).to(memory_format=layout)
        torch.testing.assert_close(fused.model(x), model(x), rtol=1e-10, atol=1e-12)
    for form in CHAIN_FORMS:
        for found in fused.chains:
            found.chain.form = form if form in found.chain.forms else "operator"
        x = torch.randn(2, 12, 6, 6, dtype=torch.float64)
        torch.testing.assert_close(fused.model(x), model(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_names_tensors_and_classes_stay(name):
    model = make(name)
    before = copy.deepcopy(model.state_dict())
    fused = nin.fuse(model).model
    assert isinstance(fused, type(model))
    assert list(fused.state_dict()) == list(before)
    assert not any(isinstance(module, Chain) for module in model.modules())
    file = io.BytesIO()
    torch.save({key: t + 1 for key, t in before.items()}, file)
    file.seek(0)
    changed = torch.load(file, weights_only=True)
    model.load_state_dict(changed)
    x = torch.randn(2, 12, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        fused(x)  # weights are folded now, and must be folded again
        fused.load_state_dict(changed)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-10)
        again = copy.deepcopy(fused)
        fused.load_state_dict(before)
        torch.testing.assert_close(again(x), model(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["inverted bottleneck", "squeezed", "with BatchNorm", "residual", "per pixel", "functional", "k×k first"]
)
@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_the_originals(name, training):
    model = make(name)
    fused = nin.fuse(model, training=training).model
    assert not fused.training
    x = torch.randn(2, 12, 6, 6, dtype=torch.float64)
    gradients = []
    for network in (model.train(training), fused.train(training)):
        inputs = x.clone().requires_grad_()
        network(inputs).square().sum().backward()
        gradients.append({"x": inputs.grad, **{key: p.grad for key, p in network.named_parameters()}})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-8, atol=1e-9)
    for key, buffer in model.named_buffers():  # running statistics
        torch.testing.assert_close(fused.get_buffer(key), buffer, rtol=1e-9, atol=1e-11)


def test_training_fuses_between_the_batch_norms():
    model = nn.Sequential(
        *conv_bn(12, 8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Dropout(0.5)
    )
    fused = nin.fuse(model, training=True)
    assert [chain.layers for chain in fused.chains] == [("3", "5")]
    assert fused.left == {"0": "nothing follows it that the operator does"}


def test_the_mode_that_was_not_asked_for_runs_as_before():
    model = make("with BatchNorm")
    fused = nin.fuse(model).model
    x = torch.randn(2, 12, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(fused.train()(x), model.train()(x))
    torch.testing.assert_close(fused.eval()(x), model.eval()(x))
    assert len(fused) == len(model)  # who runs the children one by one runs what there was
    for network in (fused, model):
        network[1].train()  # somebody lets one BatchNorm learn
    torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(fused[1].running_mean, model[1].running_mean)


def test_an_example_decides_by_measuring():
    model = make("with BatchNorm", torch.float32)
    x = torch.randn(4, 12, 16, 16)
    fused = nin.fuse(model, x, runs=3)
    (chain,) = fused.chains
    assert tuple(chain.times) == chain.chain.forms == tuple(form for form in CHAIN_FORMS if form != "1×1 operators")
    assert chain.form in chain.times
    assert fused.speedup == fused.before.median_ms / fused.after.median_ms
    torch.testing.assert_close(fused.model(x), model(x), rtol=1e-5, atol=1e-5)
    assert "as fast" in str(fused.__rich__().title)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["residual", "inverted bottleneck", "squeezed", "squeezed, separable"])
def test_dtypes_agree_within_rounding(name, dtype):
    model = make(name)
    fused = nin.fuse(copy.deepcopy(model).to(dtype)).model
    x = torch.randn(2, 12, 9, 9).to(dtype)
    with torch.no_grad():
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(fused(x).double(), model(x.double()), rtol=tolerance, atol=tolerance)


def count_operators(monkeypatch):
    """Return a list that gets the name of every operator that a chain calls."""
    calls = []
    for name in ("mlpconv", "inverted_bottleneck"):
        called = getattr(chain_module, name)
        monkeypatch.setattr(
            chain_module, name, lambda *a, name=name, called=called, **k: calls.append(name) or called(*a, **k)
        )
    return calls


@pytest.mark.skipif(dispatch.KERNELS is None, reason="no compiled kernels here")
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float64, False)],
)
@pytest.mark.parametrize(
    ("name", "blocks", "pointwise"),
    [("inverted bottleneck", 2, 4), ("functional bottleneck", 1, 2), ("separable", 1, 1), ("squeezed", 1, 4)],
)
def test_a_block_is_one_operator_or_where_that_has_no_kernel_its_pointwise_layers_are(
    name, blocks, pointwise, dtype, autocast, monkeypatch
):
    calls = count_operators(monkeypatch)
    model = make(name, dtype)
    fused = nin.fuse(model)
    x = torch.randn(2, 12, 9, 9).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result, expected = fused.model(x), model(x)
    has_kernel = dtype != torch.float64
    tolerance = 0.05 if autocast or dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    others = len(fused.chains) - blocks
    called = calls.count("inverted_bottleneck"), calls.count("mlpconv")
    assert called == ((blocks, others) if has_kernel else (0, pointwise + others))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_forms_that_are_timed_differ(dtype):
    model = make("inverted bottleneck", dtype)
    chains = nin.fuse(model, torch.randn(2, 12, 9, 9).to(dtype), runs=2).chains
    whole = dtype != torch.float64 and dispatch.KERNELS is not None
    expected = {"1×1 operators", "folded", "original", *(["operator"] if whole else [])}
    assert all(set(chain.times) == expected for chain in chains)


def test_a_model_that_is_slower_with_its_chains_keeps_none(monkeypatch):
    model = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval()
    times = iter([(2.0, 2.1), (2.0, 2.0)])
    monkeypatch.setattr(rewrite, "_measure", lambda *_: tuple(Timing(ms, ms, ms, 9) for ms in next(times)))
    fused = nin.fuse(model, torch.randn(1, 8, 6, 6), runs=2)
    assert [chain.form for chain in fused.chains] == ["original"]
    assert fused.left == {"0, 2": "the whole model took 2.10 ms with them and 2.00 ms without"}
    assert fused.speedup == 1
    x = torch.randn(1, 8, 6, 6)
    torch.testing.assert_close(fused.model(x), model(x))


def test_hooked_and_shared_layers_are_left_alone():
    model = make("sequential")
    seen = []
    model[0].register_forward_hook(lambda *what: seen.append(1))
    fused = nin.fuse(model)
    assert fused.left["0"] == "a hook looks at it"
    fused.model(torch.randn(1, 12, 4, 4, dtype=torch.float64))
    assert seen == [1]
    shared = nn.Conv2d(12, 12, 1)
    fused = nin.fuse(nn.Sequential(shared, nn.ReLU(), shared).eval())
    assert fused.left == {"0": "it is called more than once"}
    parametrised = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(12, 8, 1)), nn.ReLU()).eval()
    assert nin.fuse(parametrised).chains == ()


def test_nins_own_layers_stay():
    model = nin.models.nin_digits().eval()
    fused = nin.fuse(model)
    assert fused.chains == ()
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(fused.model(x), model(x))


def test_only_modules_are_fused():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got function"):
        nin.fuse(lambda x: x)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1", "convnext_tiny"])
def test_known_networks(name):
    model = torchvision.models.get_model(name, weights=None).eval()
    fused = nin.fuse(model)
    assert len(fused.chains) >= 8
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, got = model(x), fused.model(x)
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-4
    assert list(fused.model.state_dict()) == list(model.state_dict())


def test_export_decomposes_to_what_runs_elsewhere():
    model = make("residual", torch.float32)
    x = torch.randn(2, 12, 8, 8)
    exported = torch.export.export(nin.fuse(model).model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiles():
    model = make("residual", torch.float32)
    fused = torch.compile(nin.fuse(model).model)
    x = torch.randn(2, 12, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)
