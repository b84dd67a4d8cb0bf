"""The layers of a network of another package, from its traced forward: whatever gives feature maps is one."""

import weakref
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from nin import models
from nin.errors import UserError
from nin.layers import Conv1x1
from nin.runtime.fx_trace import TracingError, trace
from nin.server.layers import POOLINGS, Layer, LayerNode

# Height and width at which it is found out which values are feature maps; where it is too small, the network's own.
PROBE_SIZE = 64

_cache: weakref.WeakKeyDictionary[nn.Module, list[LayerNode]] = weakref.WeakKeyDictionary()


def traced_nodes(model: models.ExternalClassifier) -> list[LayerNode]:
    """Return the layers in order, from the image to the class maps, or to the scores as maps of one pixel.

    Raises:
        UserError: the network's forward cannot be traced.
    """
    if model not in _cache:
        _cache[model] = _Builder(model).nodes
    return _cache[model]


class _MapsOf(nn.Module):
    """A network that gives its class maps; without exact ones, its scores as maps of one pixel."""

    def __init__(self, model: models.ExternalClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.maps(x) if self.model.maps_are_exact else self.model(x)[:, :, None, None]


class _LayerTracer(fx.Tracer):
    """Traces down to PyTorch's own layers, 1×1 convolutions and whatever has no parts."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is one node."""
        is_simple = not any(True for _ in m.children()) or isinstance(m, Conv1x1 | nn.BatchNorm2d)
        return is_simple or super().is_leaf_module(m, module_qualified_name)


class _Builder:
    def __init__(self, model: models.ExternalClassifier) -> None:
        self.root = _MapsOf(model).eval()
        for module in model.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]  # a layer's output stays what was shown
        try:
            self.graph = trace(self.root, _LayerTracer())
        except TracingError as error:
            raise UserError(f"{model.name} cannot be looked into: {error}") from error
        self.values = _Shapes(self.root, self.graph)
        self.values.find(model)
        self.index: dict[fx.Node, int] = {}
        self.nodes: list[LayerNode] = []
        blocks: dict[str, int] = {}
        for node in self.graph.nodes:
            if node.op in ("output", "get_attr") or node not in self.values.channels:
                continue
            path = str(node.target) if node.op == "call_module" else _owner(node)
            block = blocks.setdefault(".".join(path.split(".")[:3]), len(blocks)) if self.nodes else 0
            self.index[node] = len(self.nodes)
            self.nodes.append(self.layer(node, path, block))

    def layer(self, node: fx.Node, path: str, block: int) -> LayerNode:
        """Return a node of the graph as a layer."""
        channels = self.values.channels[node]
        if node.op == "placeholder":
            return LayerNode(Layer("image", "image", 0, "image", (), channels, channels))
        name = path.removeprefix("model.").removeprefix("body.")
        if node.op != "call_module":
            kind = str(getattr(node.target, "__name__", node.target)).strip("_")
            name = f"{name}, {kind}" if name else kind
        name += "" if all(each.layer.name != name for each in self.nodes) else f" ({len(self.nodes)})"
        sources = self.sources(node)
        inputs = tuple(self.index[source] for source in sources)
        module = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        in_channels = self.values.channels[sources[0]] if sources else channels
        if module is not None and is_plain_convolution(module):
            k, stride, padding = (_first(getattr(module, key, 1)) for key in ("kernel_size", "stride", "padding"))
            if isinstance(module, Conv1x1):
                k, padding = 1, 0
            conv = cast(nn.Conv2d, module)
            activation = getattr(module, "activation", None) or "none"
            sizes = (channels, in_channels, k, stride, padding, activation)
            return LayerNode(Layer(name, "convolution", block, name, inputs, *sizes), conv.weight, conv.bias)
        if type(module) in POOLINGS:
            k, stride, padding = (_first(getattr(module, key)) for key in ("kernel_size", "stride", "padding"))
            layer = Layer(name, "pooling", block, name, inputs, channels, in_channels, k, stride, padding)
            return LayerNode(layer, module=module)
        layer = Layer(name, "computation", block, name, inputs, channels, in_channels)
        return LayerNode(layer, function=lambda values: self.compute(node, dict(zip(sources, values, strict=True))))

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """Return the layers that a node's value is computed of, in the order in which it takes them."""
        found: list[fx.Node] = []
        for source in node.all_input_nodes:
            found += [source] if source in self.index else self.sources(source)
        return list(dict.fromkeys(found))

    def compute(self, node: fx.Node, values: dict[fx.Node, Tensor]) -> Any:
        """Return a node's value from those of the layers before it."""
        known: dict[fx.Node, Any] = dict(values)

        def value(each: fx.Node) -> Any:
            if each not in known:
                known[each] = self.compute_one(each, value)
            return known[each]

        return self.compute_one(node, value)

    def compute_one(self, node: fx.Node, value: Any) -> Any:
        """Call what a node stands for."""
        if node.op == "get_attr":
            return _attribute(self.root, str(node.target))
        args, kwargs = fx.node.map_arg(node.args, value), dict(fx.node.map_arg(node.kwargs, value))
        if kwargs.get("inplace"):
            kwargs["inplace"] = False
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return cast(Any, node.target)(*args, **kwargs)


class _Shapes(fx.Interpreter):
    """Finds the nodes whose values are feature maps (N, C, h, w), and their channels."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph)
        self.channels: dict[fx.Node, int] = {}

    @torch.no_grad()
    def find(self, model: models.ExternalClassifier) -> None:
        """Run the network on a blank image."""
        device = next(model.parameters()).device
        sizes = sorted({PROBE_SIZE, model.input_config.size})
        for size in sizes:
            try:
                self.run(torch.zeros(1, model.in_channels, size, size, device=device))
            except (RuntimeError, AssertionError):
                if size == sizes[-1]:
                    raise
            else:
                return

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node, and keep its channels."""
        result = super().run_node(n)
        is_conversion = getattr(n.target, "__name__", "") == "fastest_layout"  # of the memory, nothing to look at
        if isinstance(result, Tensor) and result.dim() == 4 and result.shape[0] == 1 and not is_conversion:
            self.channels[n] = result.shape[1]
        return result


def is_plain_convolution(module: nn.Module) -> bool:
    """Return whether a module is a convolution of all channels, with one number for each of its sizes."""
    if isinstance(module, Conv1x1):
        return True
    if type(module) is not nn.Conv2d or module.groups != 1 or module.padding_mode != "zeros":
        return False
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    return all(not isinstance(s, str) and len(set(s)) == 1 for s in sizes) and module.dilation == (1, 1)


def _owner(node: fx.Node) -> str:
    """Return the path of the innermost module whose forward a node belongs to."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _first(value: Any) -> int:
    return int(value if isinstance(value, int) else value[0])
