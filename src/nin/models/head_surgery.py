"""Cut a network before its head, where pooling and class layer commute: the class layer then gives class maps."""

import dataclasses
import inspect
import operator
from collections.abc import Collection
from typing import Any

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
        reason: why the class layer gives no exact maps; empty where it does.
    """

    body: nn.Module
    class_layer: str | None
    between: tuple[nn.Module, ...] = ()
    activation: str = "none"
    pools_last: bool = False
    channels_last: bool = False
    reason: str = ""


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
        pools_last, activation = False, "none"
        while not self._is_class_layer(node):
            if self._is_neutral(node):
                pass
            elif self._pooling(node) == "NCHW":
                pools_last = True
            elif pools_last and activation == "none" and self._is_relu(node):
                activation = "relu"
            else:
                self._stop(node, "its scores come out of {}, not of a linear layer")
            node = self._input(node)
        name, before = str(node.target), self._input(node)
        if pools_last:
            return Cut(self._body(before), name, (), activation, pools_last)
        self.class_layer = name
        features, between, layout = self._features(before)
        return Cut(self._body(features), name, tuple(between), channels_last=layout == "NHWC")

    def _features(self, node: fx.Node) -> tuple[fx.Node, list[nn.Module], str]:
        """Return the node of the feature maps, the layers between pooling and class layer, and the maps' layout."""
        between: list[nn.Module] = []
        while not (pooling := self._pooling(node)):
            module = self._module(node)
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.track_running_stats:
                between.insert(0, module)
            elif not self._is_neutral(node):
                self._stop(node, "between its feature maps and its class layer stands {}, which is not averaging")
            node = self._input(node)
        return self._input(node), between, pooling

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

    def _pooling(self, node: fx.Node) -> str:
        """Return "NCHW" or "NHWC" where a node averages feature maps of that layout over all pixels, else ""."""
        module = self._module(node)
        if isinstance(module, nn.AdaptiveAvgPool2d):
            return "NCHW" if module.output_size in (1, (1, 1)) else ""
        if node.target is F.adaptive_avg_pool2d:
            size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
            return "NCHW" if size in (1, (1, 1), [1, 1]) else ""
        if node.target == "mean" or node.target is torch.mean:
            dims: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
            if isinstance(dims, list | tuple) and all(isinstance(dim, int) for dim in dims):
                return {(2, 3): "NCHW", (1, 2): "NHWC"}.get(tuple(sorted(dim % 4 for dim in dims)), "")
        return ""

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


def _is_pytorchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")
