"""BatchNorm recalibration after narrowing, kept where it brings the output nearer to the original's."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nin.narrowing.calibration import float_tensors, model_inputs
from nin.runtime import distributed
from nin.runtime.model_copy import copy_model


@torch.no_grad()
def calibration_error(model: nn.Module, original: nn.Module, batches: list[Any]) -> float:
    """Return the squared distance of two models' outputs, as a fraction of the original's variance."""
    distance, total = 0.0, 0.0
    for args, kwargs in model_inputs(batches):
        wanted, given = float_tensors(original(*args, **kwargs)), float_tensors(model(*args, **kwargs))
        for a, b in zip(wanted, given, strict=True):
            distance += float((a.double() - b.double()).square().sum())
            total += float((a.double() - a.double().mean(0)).square().sum())
    distance, total = distributed.all_reduce_sum(torch.tensor([distance, total], dtype=torch.float64)).tolist()
    return distance / total if total else distance


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, batches: list[Any]) -> nn.Module:
    """Return a copy in which every BatchNorm has the mean and variance of these images."""
    originals, model = _batchnorms(model), copy_model(model)
    norms = _batchnorms(model)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over all batches
        norm.train()
    for args, kwargs in model_inputs(batches):
        model(*args, **kwargs)
    count = distributed.all_reduce_sum(torch.tensor(float(len(batches))))  # of all processes
    for norm, original in zip(norms, originals, strict=True):
        for value in (norm.running_mean, norm.running_var):
            assert value is not None
            value.copy_(distributed.all_reduce_sum(value * len(batches)) / count.to(value.device))
        norm.momentum = original.momentum
        norm.eval()
    return model


def _batchnorms(model: nn.Module) -> list[nn.BatchNorm1d | nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) and m.track_running_stats]


def recalibrate_if_better(model: nn.Module, original: nn.Module, batches: list[Any]) -> tuple[nn.Module, float, bool]:
    """Recalibrate BatchNorm and keep that where it brings the output nearer to the original's.

    Returns:
        The better model, its `calibration_error`, and whether it is the recalibrated one.
    """
    error = calibration_error(model, original, batches)
    # a single image, or one position of one image, has no variance
    single = any(_first_dimension(args, kwargs) < 2 for args, kwargs in model_inputs(batches))
    if not _batchnorms(model) or distributed.all_reduce_sum(torch.tensor(float(single))) > 0:
        return model, error, False
    recalibrated = recalibrate_batchnorm(model, batches)
    new_error = calibration_error(recalibrated, original, batches)
    return (recalibrated, new_error, True) if new_error < error else (model, error, False)


def _first_dimension(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the images in a batch: the length of its first tensor; 2 where it has none."""
    sizes = [t.shape[0] for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
    return sizes[0] if sizes else 2
