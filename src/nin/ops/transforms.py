"""Who looks at a call of ``nin::mlpconv``: PyTorch's transforms, modes and tensor subclasses, or nobody.

The kernels compute values only. Under a transform (forward-mode AD, ``torch.func``, ``vmap``) the operator is the chain
of PyTorch's own convolutions, which carry every derivative to every order.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad

# exact types, as a subclass of either may do anything; None stands for a bias
PLAIN_TYPES = frozenset((Tensor, nn.Parameter, type(None)))


def is_transformed() -> bool:
    """Return whether a forward-mode level is entered, or a transform of ``torch.func`` is active.

    A tensor carries a tangent only while its level is entered, and is batched or tracked only while its transform is
    active, so that no tensor has to be asked.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def is_jit_traced() -> bool:
    """Return whether ``torch.jit.trace`` records the call."""
    # in this order: the compiler of PyTorch 2.10 cannot trace the second question
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def is_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether nobody but the kernels has to see a call whose tensors need no gradients.

    The autograd level then does nothing but pass the call on, and may be skipped: what it acts on besides gradients
    are tangents and the levels of ``torch.func``, and only modes, subclasses and tracers run code while it is off.
    """
    return not (
        torch.compiler.is_compiling()  # first: the compiler knows this one, and would break its graph at the others
        or forward_ad._current_level >= 0  # `is_transformed`, whose call would take as long as the question
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or not PLAIN_TYPES.issuperset(map(type, tensors))
    )


def is_wrapped(t: Tensor | None) -> bool:
    """Return whether a tensor is one that ``torch.func``, or PyTorch's older ``vmap``, made around another."""
    return t is not None and (is_functorch_wrapped_tensor(t) or is_legacy_batchedtensor(t))


def has_memory(t: Tensor) -> bool:
    """Return whether the values of a tensor on a device lie at its address.

    Those of a wrapper lie elsewhere, those of PyTorch's functional tensors and tensors of zeros, and of one whose
    storage was resized to 0, nowhere.
    """
    try:
        return t.data_ptr() != 0 or t.numel() == 0
    except RuntimeError:  # a wrapper has no storage
        return False


def overrides_dispatch(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether one of the tensors is of a subclass with operators of its own, as DTensor is.

    Such a class knows PyTorch's convolution and cannot know nin's. PyTorch's fake and functional tensors, with which it
    traces, do know it.
    """
    return not PLAIN_TYPES.issuperset(map(type, tensors)) and any(map(_overrides_dispatch, tensors))


def _overrides_dispatch(t: Any) -> bool:
    if type(t) in PLAIN_TYPES or not torch._C._dispatch_keys(t).has(torch._C.DispatchKey.Python):
        return False
    from torch._subclasses import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return not isinstance(t, FakeTensor | FunctionalTensor)
