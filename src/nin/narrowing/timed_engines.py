"""The engines that layers and whole networks are timed in for a plan: each turns them into calls."""

import importlib.metadata
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nin import exporters, fusion, ops
from nin.engines.catalog import CPU_ENGINES, ENGINES
from nin.engines.sessions import (
    Call,
    explain_refusal,
    onnxruntime_call,
    onnxruntime_session,
    openvino_call,
    openvino_request,
)
from nin.errors import UserError
from nin.layers import MLPConv
from nin.models.layer_spec import LayerSpec
from nin.models.surgery import to_layout
from nin.narrowing.onnx_layers import chain_to_onnx, input_shape
from nin.runtime.model_copy import copy_model
from nin.version import installed_version

# from the arguments of the network to its call
Bind = Callable[[tuple[Any, ...], dict[str, Any]], Call]


class TimedEngine(ABC):
    """An engine in which layers and networks are timed.

    Args:
        like: a tensor on the device and in the dtype to measure in.
        layout: of the weights in PyTorch, "contiguous" or "channels_last".
    """

    def __init__(self, like: Tensor, layout: str) -> None:
        self.like, self.layout = like, layout

    @property
    def description(self) -> tuple[str, ...]:
        """What times depend on beside the machine: the engine with its version; nothing for PyTorch, which is known."""
        return ()

    @abstractmethod
    def chain(self, chain: tuple[LayerSpec, ...], batch: int) -> Call:
        """Return the call of a chain of layers with random weights on that many images; the values do not matter."""

    @property
    def empty(self) -> Call | None:
        """The call of a network that computes nothing, where a call takes time that is no layer's."""
        return None

    @abstractmethod
    def network(self, model: nn.Module) -> Bind:
        """Return what makes the calls of a network, which is left as it is.

        Raises:
            UserError: the engine cannot compute it.
        """

    def in_layout(self, value: Any) -> Any:
        """Return images (N, C, H, W) in the memory layout, and everything else as it is."""
        if self.layout == "channels_last" and isinstance(value, Tensor) and value.dim() == 4:
            return value.contiguous(memory_format=torch.channels_last)
        return value

    def random_input(self, chain: tuple[LayerSpec, ...], batch: int) -> Tensor:
        """Return an input of a chain."""
        x = torch.randn((batch, *input_shape(chain)), device=self.like.device, dtype=self.like.dtype)
        images: Tensor = self.in_layout(x)
        return images


class PyTorchEngine(TimedEngine):
    """PyTorch, each layer by itself."""

    def chain(self, chain: tuple[LayerSpec, ...], batch: int) -> Call:
        """Return the call of plain layers."""
        module: nn.Module = nn.Sequential(*_plain_layers(chain, self.like)).eval()
        module, x = to_layout(module, self.layout), self.random_input(chain, batch)
        return lambda: module(x)

    def network(self, model: nn.Module) -> Bind:
        """Return the calls of the model itself."""
        copied = to_layout(copy_model(model), self.layout).eval()
        return lambda args, kwargs: lambda: copied(*args, **kwargs)


class NinEngine(TimedEngine):
    """nin's operator, as `nin.fuse` puts it into a network; its kernels are for channels_last."""

    def __init__(self, like: Tensor, layout: str) -> None:
        super().__init__(like, "channels_last")

    @property
    def description(self) -> tuple[str, ...]:
        """The operator with its kernel and version."""
        kernel = ops.backends()[self.like.device.type].partition(" (")[0]
        return f"{ENGINES['nin'].title} {installed_version()}, {kernel}", *super().description

    def chain(self, chain: tuple[LayerSpec, ...], batch: int) -> Call:
        """Return the call of one operator for each run of layers that it can compute, and of PyTorch's other layers."""
        runs: list[list[LayerSpec]] = []
        for spec in chain:
            if runs and _is_pointwise(spec) and _is_dense(runs[-1][0]):
                runs[-1].append(spec)
            else:
                runs.append([spec])
        module: nn.Module = nn.Sequential(*(self._run(run, run is runs[-1]) for run in runs)).eval()
        module, x = ops.freeze(to_layout(module, self.layout)), self.random_input(chain, batch)
        return lambda: module(x)

    def _run(self, run: list[LayerSpec], last: bool) -> nn.Module:
        """Return the layers of a run; the last one has a ReLU, which stands for its activation."""
        first = run[0]
        if not _is_dense(first):
            layers = _plain_layers(run, self.like)
            return nn.Sequential(*layers, nn.ReLU()) if last else nn.Sequential(*layers)
        activations = ["none"] * (len(run) - 1) + ["relu" if last else "none"]
        padding = (0, 0) if isinstance(first.padding, str) else first.padding
        geometry: dict[str, Any] = {"stride": first.stride, "padding": padding, "dilation": first.dilation}
        widths = [spec.out_channels for spec in run]
        operator = MLPConv(first.in_channels, widths, kernel_size=first.kernel_size, activation=activations, **geometry)
        operator = operator.to(self.like.device, self.like.dtype)
        return nn.Sequential(nn.ZeroPad2d(first.own_padding), operator) if any(first.own_padding) else operator

    def network(self, model: nn.Module) -> Bind:
        """Return the calls of the fused model; chains are computed in the form that is fastest on the arguments."""
        copied = to_layout(copy_model(model), self.layout).eval()

        def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
            # the forms of chains are chosen on positional inputs only
            fused = fusion.fuse(copied, None if kwargs else args).compile()
            return lambda: fused(*args, **kwargs)

        return bind


class OnnxRuntimeEngine(TimedEngine):
    """ONNX Runtime on the CPU, float32; its threads do not spin while another network is timed."""

    package = "onnxruntime"

    def __init__(self, like: Tensor, layout: str) -> None:
        super().__init__(like, "contiguous")

    @property
    def description(self) -> tuple[str, ...]:
        """The engine with its version."""
        return f"{ENGINES[self.package].title} {importlib.metadata.version(self.package)}", *super().description

    def bind_file(self, content: bytes) -> Callable[[Any], Call]:
        """Return what makes the call of a network on an array."""
        session = onnxruntime_session(content, torch.get_num_threads(), spinning=False)
        return lambda x: onnxruntime_call(session, x)

    @property
    def empty(self) -> Call | None:
        """The call of a graph that takes one number: a session is entered once for all layers of a network."""
        return self.bind_file(chain_to_onnx(()))(torch.zeros(1, 1, 1, 1).numpy())

    def chain(self, chain: tuple[LayerSpec, ...], batch: int) -> Call:
        """Return the call of a graph of these layers."""
        return self.bind_file(chain_to_onnx(chain))(self.random_input(chain, batch).numpy())

    def network(self, model: nn.Module) -> Bind:
        """Return the calls of the exported model.

        Raises:
            UserError: it cannot be exported, or is not a network of one tensor.
        """
        prepared: list[Callable[[Any], Call]] = []  # exported once, for the first arguments' shape

        def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
            if kwargs or len(args) != 1:
                raise UserError(f"engine {self.package} times networks of one input, got a batch of keyword arguments")
            x = args[0]
            content, refusal = None, f"engine {self.package} cannot take this network"
            if not prepared:
                copied = copy_model(model).to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
                try:
                    content = exporters.onnx_bytes(copied, torch.cat([x, x])[:2])
                except UserError as error:
                    raise UserError(f"{refusal}: {error}") from error
            with explain_refusal(refusal):
                if content is not None:
                    prepared.append(self.bind_file(content))
                return prepared[0](x.contiguous().numpy())

        return bind


class OpenVinoEngine(OnnxRuntimeEngine):
    """OpenVINO on the CPU, float32; compiled for each batch size."""

    package = "openvino"

    def __init__(self, like: Tensor, layout: str) -> None:
        super().__init__(like, layout)
        import openvino

        self.core = openvino.Core()

    def bind_file(self, content: bytes) -> Callable[[Any], Call]:
        """Return what makes the call of a network on an array."""

        def bind(x: Any) -> Call:
            request = openvino_request(self.core, content, x.shape, "float32", torch.get_num_threads())
            return openvino_call(request, x)

        return bind


_ENGINES: dict[str, type[TimedEngine]] = {
    "pytorch": PyTorchEngine,
    "nin": NinEngine,
    "onnxruntime": OnnxRuntimeEngine,
    "openvino": OpenVinoEngine,
}


def make_engine(name: str, like: Tensor, layout: str) -> TimedEngine:
    """Return an engine, ready to time.

    Args:
        name: one of `nin.engines.catalog.NARROWING_ENGINES`.
        like: a tensor on the device and in the dtype to measure in.
        layout: "contiguous" or "channels_last"; only PyTorch lets one choose.

    Raises:
        UserError: it is not one for this device and dtype.
    """
    if name in CPU_ENGINES:
        if like.device.type != "cpu":
            raise UserError(f"engine {name} is timed on the CPU, got a network on {like.device}: give --device cpu")
        if like.dtype != torch.float32:
            raise UserError(f"engine {name} is timed in float32, got a network in {str(like.dtype)[6:]}")
    return _ENGINES[name](like, layout)


def _plain_layers(chain: Iterable[LayerSpec], like: Tensor) -> list[nn.Module]:
    """Return PyTorch's layers of a chain, and those of what a layer pads itself."""
    layers: list[nn.Module] = []
    for spec in chain:
        if any(spec.own_padding):
            layers.append(nn.ZeroPad2d(spec.own_padding))
        layers.append(spec.make_layer(like))
    return layers


def _is_dense(spec: LayerSpec) -> bool:
    """Return whether nin's operator may begin with a layer."""
    return spec.kind == "conv" and spec.groups == 1 and spec.padding_mode == "zeros" and spec.padding != "same"


def _is_pointwise(spec: LayerSpec) -> bool:
    """Return whether nin's operator may go on with a layer."""
    return _is_dense(spec) and spec.taps == 1 and spec.stride == (1, 1) and spec.positions == math.prod(spec.input_size)
