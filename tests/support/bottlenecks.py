"""Inverted bottlenecks to test the operator with: their shapes and their definition in PyTorch."""

import dataclasses

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "silu": F.silu,
}


# PyTorch's derivative of hardsigmoid multiplies by a sixth in float32
GATES = {"sigmoid": torch.sigmoid, "hardsigmoid": lambda z: F.relu6(z + 3) / 6}


@dataclasses.dataclass(frozen=True)
class Block:
    """The shape of one call.

    ``hidden=None``: without the first layer; ``squeezed``: with squeeze-and-excitation; ``norm_eps``: ConvNeXt's order.
    """

    channels: int
    hidden: int | None
    out: int
    size: tuple[int, int]
    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    activation: tuple[str, ...] = ("relu6", "relu6", "none")
    bias: bool = True
    residual: bool = False
    images: int = 2
    squeezed: int | None = None
    excitation: tuple[str, str] = ("relu", "sigmoid")
    norm_eps: float | None = None

    @property
    def count(self):
        """How many weights it has."""
        return (3 if self.hidden else 2) + (2 if self.squeezed else 0)

    @property
    def options(self):
        up, depthwise, down = self.activation
        if self.norm_eps is not None:
            names = depthwise, up, down
            return {**self.geometry, "activation": names, "residual": self.residual, "norm_eps": self.norm_eps}
        names = (*([up] if self.hidden else []), depthwise, *(self.excitation if self.squeezed else []), down)
        return {**self.geometry, "activation": names, "residual": self.residual}

    @property
    def geometry(self):
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    @property
    def op_options(self):
        """In the order of torch.ops.nin.inverted_bottleneck."""
        options = self.options
        return *self.geometry.values(), list(options["activation"]), self.residual, self.norm_eps

    def tensors(self, dtype=torch.float64, layout=torch.contiguous_format):
        """Return x, weights and biases with values of order 1 in every layer."""
        wide = self.hidden or self.channels
        shapes = [(wide, self.channels, 1, 1)] if self.hidden else []
        shapes += [(wide, 1, *self.kernel_size)]
        shapes += [(self.squeezed, wide, 1, 1), (wide, self.squeezed, 1, 1)] if self.squeezed else []
        shapes += [(self.out, wide, 1, 1)]
        if self.norm_eps is not None:
            shapes = [(self.channels, 1, *self.kernel_size), (wide, self.channels, 1, 1), (self.out, wide, 1, 1)]
        weights = [(torch.randn(s) * (s[1] * s[2] * s[3]) ** -0.5).to(dtype) for s in shapes]
        biases = [torch.randn(s[0]).to(dtype) if self.bias else None for s in shapes]
        x = torch.randn(self.images, self.channels, *self.size).to(dtype).contiguous(memory_format=layout)
        return x, weights, biases


def plain_block(x, weights, biases, options):
    """The definition, in PyTorch's own convolutions."""
    names, geometry = options["activation"], [options[key] for key in ("stride", "padding", "dilation")]
    if options.get("norm_eps") is not None:
        y = ACTIVATIONS[names[0]](F.conv2d(x, weights[0], biases[0], *geometry, weights[0].shape[0]))
        y = y - y.mean(1, keepdim=True)
        y = y / (y.square().mean(1, keepdim=True) + options["norm_eps"]).sqrt()
        y = ACTIVATIONS[names[1]](F.conv2d(y, weights[1], biases[1]))
        y = ACTIVATIONS[names[2]](F.conv2d(y, weights[2], biases[2]))
        return y + x if options["residual"] else y
    y, i = x, len(weights) % 2  # of three or five layers the second is the depthwise one
    if i == 1:
        y = ACTIVATIONS[names[0]](F.conv2d(y, weights[0], biases[0]))
    y = ACTIVATIONS[names[i]](F.conv2d(y, weights[i], biases[i], *geometry, weights[i].shape[0]))
    if len(weights) >= 4:
        s = F.adaptive_avg_pool2d(y, 1)
        for j, choice in ((i + 1, ACTIVATIONS), (i + 2, GATES)):
            s = choice[names[j]](F.conv2d(s, weights[j], biases[j]))
        y = y * s
    y = ACTIVATIONS[names[-1]](F.conv2d(y, weights[-1], biases[-1]))
    return y + x if options["residual"] else y


CONVNEXT = {"padding": (3, 3), "activation": ("gelu", "none", "none"), "residual": True, "norm_eps": 1e-6}
BLOCKS = {
    "3x3": Block(6, 20, 6, (9, 8), residual=True),
    "stride 2": Block(5, 35, 7, (9, 7), stride=(2, 2), activation=("relu", "hardswish", "silu")),
    "5x5": Block(3, 33, 17, (7, 7), (5, 5), padding=(2, 2), activation=("hardswish", "silu", "gelu")),
    "7x7": Block(16, 64, 16, (14, 5), (7, 7), padding=(3, 3), residual=True, activation=("gelu", "none", "relu6")),
    "no first layer": Block(19, None, 8, (6, 10), activation=("none", "relu6", "none")),
    "residual of two": Block(19, None, 19, (6, 10), residual=True),
    "dilated": Block(4, 18, 3, (9, 11), padding=(2, 2), dilation=(2, 2), bias=False),
    "uneven": Block(5, 7, 1, (8, 9), (3, 2), (1, 3), (0, 2), (2, 1)),
    "more padding than image": Block(2, 4, 3, (1, 2), (3, 3), (2, 2), (4, 4)),
    "one pixel": Block(3, 40, 33, (1, 1), (1, 1), padding=(0, 0)),
    "no images": Block(3, 8, 5, (4, 4), images=0),
    "squeezed": Block(6, 20, 6, (9, 8), residual=True, squeezed=5, images=3),
    "squeezed, stride 2": Block(
        *(5, 35, 7, (9, 7), (3, 3), (2, 2)),
        activation=("hardswish", "hardswish", "none"),
        squeezed=33,
        excitation=("relu", "hardsigmoid"),
    ),
    "squeezed, no first layer": Block(
        19, None, 8, (6, 10), activation=("none", "silu", "relu"), squeezed=1, excitation=("silu", "sigmoid")
    ),
    "squeezed without biases": Block(3, 18, 40, (1, 3), bias=False, squeezed=4, excitation=("gelu", "hardsigmoid")),
    "squeezed, no images": Block(3, 8, 5, (4, 4), images=0, squeezed=2),
    "normed": Block(6, 20, 6, (9, 8), activation=("gelu", "none", "none"), residual=True, norm_eps=0.01, images=3),
    "normed, 7x7": Block(
        *(33, 70, 33, (14, 5), (7, 7)),
        **CONVNEXT,
    ),
    "normed, stride 2": Block(
        *(5, 35, 7, (9, 7), (5, 3), (2, 1)), padding=(2, 0), activation=("hardswish", "silu", "relu"), norm_eps=0.1
    ),
    "normed without biases": Block(18, 40, 1, (3, 11), dilation=(1, 3), padding=(1, 2), bias=False, norm_eps=0.01),
    "normed, one channel": Block(1, 4, 1, (4, 4), norm_eps=0.5),
    "normed, no images": Block(3, 8, 5, (4, 4), images=0, norm_eps=0.1),
}
