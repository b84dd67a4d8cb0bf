"""Cut a network before its head, where pooling and class layer commute: the class layer then gives class maps."""

import dataclasses
import inspect
import operator
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from nin.runtime.fx_trace import TracingError, trace


@dataclasses.dataclass(frozen=True)
class Cut:
    """A network in two parts.

    Attributes:
        body: from images to feature maps where the maps are exact, else the whole network.
        class_layer: the name of the class layer in the network, whose output are the scores; or None.
        between: BatchNorm layers between pooling and class layer; they commute in evaluation.
        activation: after the class layer, "none" or "relu"; what follows the class layer then is the pooling.
        pools_last: whether the pooling follows the class layer.
        channels_last: whether the feature maps are (N, h, w, C).
        window: the pooling where it averages so many pixels, however many there are; None where it averages all.
        reason: why the class layer gives no exact maps; empty where it does.
    """

    body: nn.Module
    class_layer: str | None
    between: tuple[nn.Module, ...] = ()
    activation: str = "none"
    pools_last: bool = False
    channels_last: bool = False
    window: nn.AvgPool2d | None = None
    reason: str = ""


class _Pooling(NamedTuple):
    """Averaging over the pixels of feature maps.

    Attributes:
        features: the node of the feature maps.
        layout: of these, "NCHW" or "NHWC".
        window: as in `Cut`.
    """

    features: fx.Node
    layout: str
    window: nn.AvgPool2d | None = None


class _CannotCutError(Exception):
    """The reason why a class layer gives no exact maps, with its name where it was found."""

    def __init__(self, reason: str, class_layer: str | None = None) -> None:
        super().__init__(reason)
        self.class_layer = class_layer


class _OpenError(Exception):
    """A module whose inside must be seen to go on."""


def cut_head(network: nn.Module) -> Cut:
    """Return a network cut before its head; the parts share its layers.

    ``score = W mean(f) + b = mean(W f + b)``: a global average pooling and the linear layer behind it commute, and what
    stands between them may be the identity in evaluation (dropout) or affine in each channel (BatchNorm). The network
    is traced from its end, as far as the feature maps only, so that its body stays as its own package made it.

    Args:
        network: in evaluation mode, scores (N, classes) from images (N, C, H, W).

    Source:
        Zhou et al.: Learning Deep Features for Discriminative Localization, 2015, arXiv 1512.04150, section 2.
    """
    opened: set[str] = set()
    while True:
        try:
            graph = trace(network, _TailTracer(opened), _defaults(network))
            return _Tail(network, graph).cut()
        except _OpenError as error:
            opened.add(str(error))
        except TracingError as error:
            return Cut(network, _usual_class_layer(network), reason=f"its head cannot be traced: {error}")
        except _CannotCutError as error:
            return Cut(network, error.class_layer, reason=str(error))


def _usual_class_layer(network: nn.Module) -> str | None:
    """Return the name of the class layer where its package knows it, for a network that cannot be traced."""
    get_classifier: Any = getattr(network, "get_classifier", None)  # timm's
    layer = get_classifier() if get_classifier is not None else None
    names = [name for name, module in network.named_modules() if module is layer and type(module) is nn.Linear]
    return names[0] if names else None


def _defaults(network: nn.Module) -> dict[str, Any]:
    """Return the default values of all arguments of the forward but the first, which is the images."""
    parameters = list(inspect.signature(network.forward).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not p.empty}


class _TailTracer(fx.Tracer):
    """Traces a network's own forward, and those of the modules that are opened."""

    def __init__(self, opened: Collection[str] = ()) -> None:
        super().__init__()
        self.opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return whether a module is one node."""
        return module_qualified_name not in self.opened


# Sizes of images, in pixels, of which one suits a network whose feature maps are looked at; most take any.
_PROBE_SIZES = (32, 64, 96, 128, 224, 256, 299, 384)

# What changes the shape only; where a linear layer follows, all of it is (N, C) or (N, C, 1, 1).
_RESHAPING_MODULES = (nn.Flatten, nn.Identity)
_RESHAPING_FUNCTIONS = (torch.flatten, torch.squeeze, torch.reshape, torch.unsqueeze)
_RESHAPING_METHODS = ("flatten", "squeeze", "view", "reshape", "contiguous", "unsqueeze")
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_DROPOUT_FUNCTIONS = (F.dropout, F.dropout2d, torch.dropout, F.alpha_dropout)


class _Tail:
    """The end of a traced network, read from the scores back to the feature maps."""

    def __init__(self, network: nn.Module, graph: fx.Graph) -> None:
        self.network, self.graph = network, graph
        self.class_layer: str | None = None

    def cut(self) -> Cut:
        """Return the network's parts.

        Raises:
            _CannotCutError: there are no exact maps.
            _OpenError: a module must be looked into.
        """
        node = self._output()
        pooled, activation = None, "none"
        while not self._is_class_layer(node):
            if self._is_neutral(node):
                node = self._input(node)
            elif (pooling := self._pooling(node)) and pooling.layout == "NCHW":
                pooled, node = pooling, pooling.features
            elif pooled and activation == "none" and self._is_relu(node):
                activation, node = "relu", self._input(node)
            else:
                self._stop(node, "its scores come out of {}, not of a linear layer")
        name, before = str(node.target), self._input(node)
        if pooled and pooled.window is None:
            return Cut(self._body(before), name, (), activation, pools_last=True)
        if pooled and activation == "none":
            return Cut(self._body(before), name, window=pooled.window)
        if pooled:
            raise _CannotCutError("its ReLU stands before an AvgPool2d that averages a part of each map")
        self.class_layer = name
        pooling, between = self._features(before)
        body = self._body(pooling.features)
        if pooling.window is not None and not self._leaves_one_pixel(node, body):
            raise _CannotCutError("its AvgPool2d leaves more than one pixel of each feature map", name)
        is_last = pooling.layout == "NHWC"
        return Cut(body, name, tuple(between), channels_last=is_last, window=pooling.window)

    def _leaves_one_pixel(self, node: fx.Node, body: nn.Module) -> bool:
        """Return whether the class layer takes as many numbers as there are feature maps: one pixel of each."""
        layer = self._module(node)
        if not isinstance(layer, nn.Linear):
            return True
        channels = next((m.in_channels for m in self.network.modules() if isinstance(m, nn.Conv2d)), 3)
        tensor = next(self.network.parameters())
        for size in _PROBE_SIZES:
            try:
                with torch.no_grad():
                    features = body(tensor.new_zeros(1, channels, size, size))
            except RuntimeError:  # too small for it, or another size than it is for
                continue
            return bool(features.shape[1] == layer.in_features)
        return False

    def _features(self, node: fx.Node) -> tuple[_Pooling, list[nn.Module]]:
        """Return the pooling of the feature maps, and the layers between it and the class layer."""
        between: list[nn.Module] = []
        while not (pooling := self._pooling(node)):
            module = self._module(node)
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.track_running_stats:
                between.insert(0, module)
            elif not self._is_neutral(node):
                self._stop(node, "between its feature maps and its class layer stands {}, which is not averaging")
            node = self._input(node)
        return pooling, between

    def _body(self, features: fx.Node) -> fx.GraphModule:
        """Return the network up to the feature maps; its modules are those of the network."""
        needed, waiting = set[fx.Node](), [features]
        while waiting:
            node = waiting.pop()
            if node not in needed:
                needed.add(node)
                waiting += node.all_input_nodes
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self.graph.nodes:
            if node in needed:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(copies[features])
        return fx.GraphModule(self.network, graph, type(self.network).__name__)

    def _output(self) -> fx.Node:
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        result = output.args[0]
        if not isinstance(result, fx.Node):
            raise _CannotCutError("it gives more than one table of scores")
        return result

    def _input(self, node: fx.Node) -> fx.Node:
        """Return the node whose value a node takes."""
        first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))
        if not isinstance(first, fx.Node):
            self._stop(node, "its scores come out of {}")
        assert isinstance(first, fx.Node)
        return first

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.network.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _is_class_layer(self, node: fx.Node) -> bool:
        module = self._module(node)
        if isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward:
            return (
                module.kernel_size == module.stride == (1, 1) and module.groups == 1 and module.padding in (0, (0, 0))
            )
        # timm's own casts under torch.jit.script only
        linear = isinstance(module, nn.Linear) and type(module).__module__ == "timm.layers.linear"
        return linear or (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward)

    def _is_neutral(self, node: fx.Node) -> bool:
        """Return whether a node changes nothing in evaluation but the shape."""
        if node.op == "call_module":
            return isinstance(self._module(node), (*_RESHAPING_MODULES, *_DROPOUTS))
        if node.op == "call_method":
            return node.target in _RESHAPING_METHODS
        if node.target is operator.getitem:  # x[:, :, 0, 0]
            index = node.args[1]
            return isinstance(index, tuple) and all(i in (0, slice(None)) for i in index)
        return node.target in (*_RESHAPING_FUNCTIONS, *_DROPOUT_FUNCTIONS)

    def _is_relu(self, node: fx.Node) -> bool:
        return type(self._module(node)) is nn.ReLU or node.target in (F.relu, torch.relu, "relu", "relu_")

    def _pooling(self, node: fx.Node) -> _Pooling | None:
        """Return what of feature maps a node averages, or None where it does something else."""
        module = self._module(node)
        if isinstance(module, nn.AvgPool2d) or node.target is F.avg_pool2d:
            return self._average_pooling(node, module)
        sizes: tuple[Any, ...] = ()
        if isinstance(module, nn.AdaptiveAvgPool2d):
            sizes = (module.output_size,)
        elif node.target is F.adaptive_avg_pool2d:
            sizes = (node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size"),)
        if sizes:
            return _Pooling(self._input(node), "NCHW") if sizes[0] in (1, (1, 1), [1, 1]) else None
        source, averaged = self._averaged_axes(node)
        layouts = {frozenset({2, 3}): "NCHW", frozenset({1, 2}): "NHWC"}
        layout = layouts.get(frozenset(averaged))
        return None if layout is None else _Pooling(source, layout)

    def _average_pooling(self, node: fx.Node, module: nn.Module | None) -> _Pooling | None:
        """Return the pooling of an AvgPool2d; None for one whose mean is not that of the pixels in its window."""
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        if isinstance(module, nn.AvgPool2d):
            given = {name: getattr(module, name) for name in names}
        else:
            given = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
        size = given.get("kernel_size")
        if given.get("padding") not in (None, 0, (0, 0)) or given.get("ceil_mode") or given.get("divisor_override"):
            return None
        if isinstance(size, fx.Node):
            return _Pooling(self._input(node), "NCHW") if _is_size_of(size, self._input(node)) else None
        window = nn.AvgPool2d(size, given.get("stride") or None)  # type: ignore[arg-type]  # traced as it was called
        return _Pooling(self._input(node), "NCHW", window)

    def _averaged_axes(self, node: fx.Node) -> tuple[fx.Node, set[int]]:
        """Return the axes of (N, C, h, w) that a chain of means averages, and what the first one takes."""
        means: list[fx.Node] = []
        while node.target == "mean" or node.target is torch.mean:
            means.insert(0, node)
            node = self._input(node)
        axes, averaged = [0, 1, 2, 3], set[int]()
        for each in means:
            dims: Any = each.kwargs.get("dim", each.args[1] if len(each.args) > 1 else None)
            dims = [dims] if isinstance(dims, int) else dims
            keeps: Any = each.kwargs.get("keepdim", each.args[2] if len(each.args) > 2 else False)
            if not isinstance(dims, list | tuple) or not all(
                isinstance(dim, int) and -len(axes) <= dim < len(axes) for dim in dims
            ):
                return node, set()
            found = {axes[dim] for dim in dims}
            averaged |= found
            axes = axes if keeps else [axis for axis in axes if axis not in found]
        return node, averaged

    def _stop(self, node: fx.Node, reason: str) -> None:
        """Look into a module of somebody's own, or say what stands in the way."""
        module = self._module(node)
        if module is not None and (any(True for _ in module.children()) or not _is_pytorchs(module)):
            raise _OpenError(str(node.target))
        raise _CannotCutError(reason.format(self._describe(node)), self.class_layer)

    def _describe(self, node: fx.Node) -> str:
        """Return what a node is: the kind of the innermost module that it belongs to, or its function."""
        module = self._module(node)
        if module is None:
            stack = list(node.meta.get("nn_module_stack", {}).values())
            path, kind = stack[-1] if stack else ("", type(self.network))
            own = self.network.get_submodule(path) if path else self.network
            if own is self.network or any(True for _ in own.children()):
                return f"{getattr(node.target, '__name__', node.target)}()"
            return f"a {getattr(kind, '__name__', kind)}"
        return f"a {type(module).__name__}"


def _is_size_of(node: fx.Node, features: fx.Node) -> bool:
    """Return whether a node is height and width of feature maps: x.shape[2:], x.size()[-2:]."""
    if node.target is not operator.getitem or node.args[1] not in (slice(2, None), slice(-2, None), slice(2, 4)):
        return False
    shape = node.args[0]
    if not isinstance(shape, fx.Node) or shape.args[0] is not features:
        return False
    return bool(shape.target == "size" or (shape.target is getattr and shape.args[1] == "shape"))


def _is_pytorchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")
