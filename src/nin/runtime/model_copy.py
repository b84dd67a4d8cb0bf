"""Copies of models, those included whose weights are computed from others: pruned ones, weight_norm, spectral_norm."""

import copy
from collections.abc import Mapping
from typing import Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from nin.errors import UserError, is_out_of_memory


@runtime_checkable
class Replaceable(Protocol):
    """What `nin.fuse` puts into a model: a layer that stands for one of PyTorch's."""

    def make_plain(self) -> None:
        """Become the layer of PyTorch's, in place."""


Model = TypeVar("Model", bound=nn.Module)


def copy_model(model: Model, shared: Mapping[int, Tensor] | None = None, *, keep_fused: bool = False) -> Model:
    """Return a copy of a model that shares no tensors with it.

    ``copy.deepcopy`` refuses a tensor that was computed with gradients, such as the ``weight`` that
    ``torch.nn.utils.prune`` and the old ``weight_norm`` keep in a layer. Its value is copied; the hooks that compute it
    again before every forward are part of the copy. A model of `nin.fuse` gives one of plain layers, unless it is asked
    to stay fused.

    Args:
        model: any model.
        shared: tensors by their ``id``, which take the place of those in the copy.
        keep_fused: keep what `nin.fuse` put into it.

    Raises:
        UserError: it cannot be copied; the message says what ``copy.deepcopy`` says.
    """
    memo: dict[int, object] = dict(shared or {})
    for module in model.modules():
        for value in vars(module).values():
            for t in _tensors_in(value):
                if not t.is_leaf:
                    memo[id(t)] = t.detach().clone().requires_grad_(t.requires_grad)
    try:
        new = copy.deepcopy(model, memo)
    except Exception as error:  # somebody's own module may raise anything in its __deepcopy__
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"the model must be one that copy.deepcopy copies, got {type(model).__name__}, of which it says "
            f"{type(error).__name__}: {reason}"
        ) from error
    for module in [] if keep_fused else list(new.modules()):
        if isinstance(module, Replaceable):
            module.make_plain()
    return new


def keep_computed_weights(model: nn.Module) -> None:
    """Replace weights that are computed before every forward by their values, in place, for a model that is final.

    They are those of ``torch.nn.utils.prune``, of parametrisations and of the old ``weight_norm`` and
    ``spectral_norm``.

    Args:
        model: in evaluation mode, in which computing a weight changes nothing.
    """
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            # by hand: remove_parametrizations changes the class, which the layer shares with those it was copied from
            values = {name: getattr(module, name).detach() for name in module.parametrizations}  # type: ignore[union-attr]
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module.parametrizations
            for name, value in values.items():
                setattr(module, name, nn.Parameter(value))
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
            elif isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)


def _tensors_in(value: object) -> list[Tensor]:
    """Return the tensors in an attribute, and in its lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _tensors_in(item)] if isinstance(value, list | tuple) else []
