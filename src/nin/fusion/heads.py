"""The first layers of chains: layers of PyTorch's classes that leave their result pending."""

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from nin.fusion.chain import PLAIN_TYPES, Chain
from nin.fusion.link import Link
from nin.fusion.pending import conv_link, start

# What lies on the stack between a module's forward and the forward that calls the module.
_CALL_CODES = {nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__}


class _ChainHead(nn.Module):
    """The first layer of a chain; everything else about it is its class's."""

    nin_chain: Chain

    def make_plain(self) -> None:
        """Become a layer of PyTorch's class again, in place."""
        plain = next((plain for plain, head in HEADS.items() if head is type(self)), None)
        if plain is None:  # parametrised since: a class made for this layer
            self.nin_chain.form = "original"
        else:
            del self.nin_chain
            self.__class__ = plain  # type: ignore[assignment]

    def __prepare_scriptable__(self) -> nn.Module:
        """Return a layer of PyTorch's class with the same tensors, for ``torch.jit.script``."""
        plain = copy.copy(self)
        plain.make_plain()
        return plain

    def _get_name(self) -> str:
        """Return the name of PyTorch's class, for ``print``."""
        return next((plain.__name__ for plain, head in HEADS.items() if head is type(self)), super()._get_name())


class ChainConv2d(_ChainHead, nn.Conv2d):
    """An ``nn.Conv2d`` that begins a chain."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution, or a `Pending` while its chain is computed."""
        if torch.compiler.is_compiling() or self.padding_mode != "zeros" or not _begins(self.nin_chain, self, input):
            return super().forward(input)
        link = conv_link(self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return start(self.nin_chain, input, link)


class ChainLinear(_ChainHead, nn.Linear):
    """An ``nn.Linear`` that begins a chain."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the product, or a `Pending` while its chain is computed."""
        if torch.compiler.is_compiling() or not _begins(self.nin_chain, self, input):
            return super().forward(input)
        return start(self.nin_chain, input, Link(self.weight, self.bias, ()))


HEADS: dict[type[nn.Module], type[_ChainHead]] = {nn.Conv2d: ChainConv2d, nn.Linear: ChainLinear}


def begin_chain(layer: nn.Module, chain: Chain) -> None:
    """Let a layer begin a chain, in place."""
    layer.__class__ = HEADS[type(layer)]
    layer.nin_chain = chain  # type: ignore[assignment]


def _begins(chain: Chain, layer: nn.Module, x: Tensor) -> bool:
    """Return whether a layer may leave its result pending: the model runs as it was found, and nobody looks inside."""
    return (
        chain.form != "original"
        and layer.training == chain.training
        and type(x) in PLAIN_TYPES
        and x.layout == torch.strided
        and (x.dim() == 4 or not chain.convolves)
        and not torch._C._is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and forward_ad._current_level < 0
        and not _has_any_global_hook()
        and all(place.is_as_before() for place in chain.places)
        and _is_called_by(chain.callers)
    )


def _is_called_by(callers: tuple[nn.Module, ...]) -> bool:
    """Return whether a layer is called by the forwards of these modules, each called by the next.

    A forward may call methods of its own module, such as timm's ``forward_features``, which call the layer.
    The last one holds the whole chain: who calls a layer by itself, or in a part of the model, gets its result.
    """
    frame: Any = sys._getframe(3)  # behind this function, `_begins` and the layer's forward
    for module in callers:
        function: Any = type(module).forward
        codes = [function.__code__]
        while function := getattr(function, "__wrapped__", None):  # of a decorator such as torch.no_grad
            codes.insert(0, function.__code__)
        called: Any = None
        for code in codes:
            while frame is not None and (
                frame.f_code in _CALL_CODES or (frame.f_code not in codes and _is_method_of(module, frame))
            ):
                frame = frame.f_back
            if frame is None or frame.f_code is not code:
                return False
            called, frame = called or frame, frame.f_back
    return called.f_locals.get(called.f_code.co_varnames[0]) is callers[-1]


def _is_method_of(module: nn.Module, frame: Any) -> bool:
    """Return whether a frame is of a function whose first argument is a module."""
    code = frame.f_code
    return code.co_argcount > 0 and frame.f_locals.get(code.co_varnames[0]) is module
