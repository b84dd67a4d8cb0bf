"""After narrowing: how far the result is from the original's, and BatchNorm statistics measured again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nin.models.layer_shape import inputs_of
from nin.runtime import distributed


@torch.no_grad()
def calibration_error(model: nn.Module, original: nn.Module, batches: list[Any]) -> float:
    """Return the squared distance of two models' results, as a share of the original's variance."""
    distance, total = 0.0, 0.0
    for args, kwargs in inputs_of(batches):
        wanted, given = _floats(original(*args, **kwargs)), _floats(model(*args, **kwargs))
        for a, b in zip(wanted, given, strict=True):
            distance += float((a.double() - b.double()).square().sum())
            total += float((a.double() - a.double().mean(0)).square().sum())
    distance, total = distributed.all_reduce_sum(torch.tensor([distance, total], dtype=torch.float64)).tolist()
    return distance / total if total else distance


def _floats(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


@torch.no_grad()
def renormalise(model: nn.Module, batches: list[Any]) -> nn.Module:
    """Return a copy in which every BatchNorm has the mean and variance of these images."""
    model = copy.deepcopy(model)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over all batches
        norm.train()
    for args, kwargs in inputs_of(batches):
        model(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        _average(norm, len(batches))
        norm.momentum = momentum
        norm.eval()
    return model


def _average(norm: nn.Module, batches: int) -> None:
    """Make a BatchNorm's statistics the plain average over the batches of all processes."""
    count = distributed.all_reduce_sum(torch.tensor(float(batches)))
    for name in ("running_mean", "running_var"):
        value = norm.get_buffer(name)
        value.copy_(distributed.all_reduce_sum(value * batches) / count.to(value.device))


def correct(model: nn.Module, original: nn.Module, batches: list[Any]) -> tuple[nn.Module, float, bool]:
    """Measure BatchNorm statistics again and keep them where that brings the result nearer to the original's.

    Returns:
        The better model, its `calibration_error`, and whether the statistics were changed.
    """
    error = calibration_error(model, original, batches)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) and m.track_running_stats]
    # a single image, or one place of one image, has no variance
    single = sum(next(_rows(args, kwargs), 2) < 2 for args, kwargs in inputs_of(batches))
    if not norms or distributed.all_reduce_sum(torch.tensor(float(single))) > 0:
        return model, error, False
    again = renormalise(model, batches)
    other = calibration_error(again, original, batches)
    return (again, other, True) if other < error else (model, error, False)


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[int]:
    return iter([t.shape[0] for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()])
