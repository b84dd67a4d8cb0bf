"""Random small models for hypothesis, and the same models in plain PyTorch."""

import copy

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

import nin
from support.chains import PLAIN

FUNCTIONS = {
    **PLAIN,
    "method": lambda z: z.relu(),
    "in place": lambda z: F.relu(z, inplace=True),
    "tanh": lambda z: F.gelu(z, approximate="tanh"),
    "leaky": lambda z: F.leaky_relu(z, 0.1),
}
MODULES = {
    "relu": nn.ReLU,
    "in place": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": lambda: nn.GELU(approximate="tanh"),
    "hardswish": nn.Hardswish,
}


class Functional(nn.Module):
    """A layer, then an activation called as a function or method in ``forward``."""

    def __init__(self, layer, name):
        super().__init__()
        self.layer, self.name = layer, name

    def forward(self, x):
        return FUNCTIONS[self.name](self.layer(x))


class Residual(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


class Twice(nn.Module):
    """The same layers, called twice."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(self.body(x) / 2)


class Gated(nn.Module):
    """A branch that is used twice: what is inside it must stay visible."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        y = self.body(x)
        return torch.cat((x, y * torch.sigmoid(y)), 1)


class Tokens(nn.Module):
    """Fully connected layers on every pixel, as in ConvNeXt."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PlainLayer(nn.Module):
    """One of nin's layers in plain PyTorch, with its parameters under the same names."""

    def __init__(self, layer):
        super().__init__()
        self.__dict__["_modules"], self.__dict__["_parameters"] = layer._modules, layer._parameters
        self.stride = layer.stride
        self.activations = layer.activations if isinstance(layer, nin.MLPConv) else [layer.activation or "none"]

    def forward(self, x):
        if "convs" not in self._modules:
            bias = getattr(self, "bias", None)
            return PLAIN[self.activations[0]](F.conv2d(x, self.weight, bias, self.stride))
        for conv, activation in zip(self.convs, self.activations, strict=True):
            x = PLAIN[activation](conv(x))
        return x


def in_plain_pytorch(model):
    """Return a copy whose nin layers are PyTorch's."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nin.MLPConv | nin.Conv1x1):
                setattr(module, name, PlainLayer(child))
    return model


@st.composite
def layer(draw, channels):
    """Draw a convolution with what follows it, and return it with its number of output channels."""
    out = draw(st.integers(1, 6))
    size = draw(st.sampled_from([1, 1, 1, 3]))
    options = {"bias": draw(st.booleans()), "padding": size // 2}
    if draw(st.booleans()) and channels % 2 == 0 and out % 2 == 0:
        options["groups"] = draw(st.sampled_from([1, 1, 2]))
    if size > 1:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "zeros", "reflect"]))
    modules = [nn.Conv2d(channels, out, size, **options)]
    if draw(st.booleans()):
        modules.append(nn.BatchNorm2d(out, affine=draw(st.booleans())))
    if draw(st.integers(0, 3)) == 0:
        modules.append(nn.Dropout(0.5))
    if draw(st.booleans()):
        modules.append(MODULES[draw(st.sampled_from(list(MODULES)))]())
        return modules, out
    body = modules[0] if len(modules) == 1 else nn.Sequential(*modules)
    return [Functional(body, draw(st.sampled_from(list(FUNCTIONS))))], out


@st.composite
def stage(draw, channels):
    """Draw a part of a network, and return its modules with the number of output channels."""
    kind = draw(st.sampled_from(["layers", "layers", "residual", "twice", "gated", "tokens", "pool", "mlpconv", "nin"]))
    if kind == "pool":
        pools = [nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.Identity(), nn.Dropout2d(0.5)]
        return [draw(st.sampled_from(pools))], channels
    if kind == "tokens":
        wide = draw(st.integers(1, 6))
        body = [nn.Linear(channels, wide), MODULES[draw(st.sampled_from(list(MODULES)))](), nn.Linear(wide, channels)]
        return [Tokens(nn.Sequential(*body))], channels
    if kind == "mlpconv":
        widths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
        size = draw(st.sampled_from([1, 3]))
        norm = "weight_standardisation" if draw(st.booleans()) and min(channels, *widths) > 1 else None
        activation = draw(st.sampled_from(list(PLAIN)))
        options = {"kernel_size": size, "padding": size // 2, "activation": activation, "normalisation": norm}
        return [nin.MLPConv(channels, widths, bias=draw(st.booleans()), **options)], widths[-1]
    if kind == "nin":
        activation = draw(st.sampled_from(list(PLAIN)))
        if draw(st.booleans()):
            return [nin.Inception(channels, 1, 2, 1, 1, 2, 1, activation=activation)], 5
        return [nin.Conv1x1(channels, 3, activation=activation, bias=draw(st.booleans()))], 3
    modules, width = [], channels
    for _ in range(draw(st.integers(1, 3))):
        more, width = draw(layer(width))
        modules += more
    if kind == "layers":
        return ([nn.Sequential(*modules)] if draw(st.booleans()) else modules), width
    body = nn.Sequential(*modules, nn.Conv2d(width, channels, 1))
    wrapper = {"residual": Residual, "twice": Twice, "gated": Gated}[kind]
    return [wrapper(body)], channels * 2 if kind == "gated" else channels


@st.composite
def models(draw):
    """Draw a model of images with three channels, whose values stay of order 1."""
    torch.manual_seed(draw(st.integers(0, 1 << 16)))
    modules, channels = [], 3
    for _ in range(draw(st.integers(1, 3))):
        more, channels = draw(stage(channels))
        modules += more
    head = draw(st.sampled_from(["none", "linear", "maps"]))
    if head == "linear":
        modules += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, 2)]
    elif head == "maps":
        modules.append(nin.GlobalAveragePooling())
    model = nn.Sequential(*modules)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if getattr(module, "bias", None) is not None:
                module.bias.normal_()
    return model.eval()
