"""Which layers of a model can be narrowed, and why the others cannot."""

import fnmatch
from collections import Counter

import torch
from torch import Tensor, nn

from nin.errors import UserError

_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


def find_eligible_layers(model: nn.Module, skip: tuple[str, ...] = ()) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the layers that can be narrowed, and the reasons why others cannot, each by name.

    Args:
        model: of plain layers, see `to_plain_layers`.
        skip: patterns of names to leave alone, such as "layer1.*".

    Raises:
        UserError: a pattern matches no layer.
    """
    uses = Counter(id(module._parameters.get("weight")) for module in model.modules())
    weighted: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, _WEIGHTED)}
    skipped = _match_patterns(list(weighted), skip)
    layers, reasons = {}, {}
    for name, module in weighted.items():
        reason = "asked for" if name in skipped else _ineligibility(module, uses)
        if reason is None:
            layers[name] = module
        else:
            reasons[name] = reason
    return layers, reasons


def _ineligibility(module: nn.Module, uses: Counter[int]) -> str | None:
    """Return why a layer cannot be narrowed, or None."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "a transposed convolution"
    if isinstance(module, nn.Conv1d | nn.Conv3d):
        return f"a convolution in {1 if isinstance(module, nn.Conv1d) else 3} dimensions"
    if type(module) not in (nn.Conv2d, nn.Linear):
        return f"a {type(module).__name__}, whose forward may differ"
    if module._forward_pre_hooks:  # weight_norm, spectral_norm and torch.nn.utils.prune
        return "something else sets its weight before each call"
    if not isinstance(module.weight, Tensor) or isinstance(module.weight, nn.parameter.UninitializedParameter):
        return "it has no weight yet"
    if module.weight.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"its weight is {module.weight.dtype}"
    if uses[id(module.weight)] > 1:
        return "it shares its weight with another layer"
    return None


def _match_patterns(names: list[str], patterns: tuple[str, ...]) -> set[str]:
    """Return the layers that match a pattern, or lie in a module of that name."""
    found: set[str] = set()
    for pattern in patterns:
        matched = {n for n in names if fnmatch.fnmatchcase(n, pattern) or n.startswith(f"{pattern}.")}
        if not matched:
            raise UserError(f"skip must match a layer's name, got {pattern!r}; layers are {_abbreviate(names)}")
        found |= matched
    return found


def _abbreviate(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
