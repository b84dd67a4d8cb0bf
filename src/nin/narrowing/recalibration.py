"""The distance of a narrowed network from the original, and BatchNorm recalibration, kept where it lessens that."""

import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nin.narrowing.calibration import float_tensors, in_parts, model_inputs
from nin.runtime import distributed
from nin.runtime.model_copy import copy_model
from nin.runtime.single_value_norm import normalise_single_values

# Fewer images that nothing was fitted to say less than those of the fit.
LEAST_HELD_OUT = 16


@torch.no_grad()
def calibration_error(model: nn.Module, original: nn.Module, batches: list[Any]) -> float:
    """Return the squared distance of two models' outputs, as a fraction of the original's variance.

    In a job of several processes it is that on the images of all of them.
    """
    distance = torch.zeros((), dtype=torch.float64)
    # of each output, by its number and the shape of one image's: how many there are, their squares, and the values
    sums: dict[str, Tensor] = {}
    for batch in model_inputs(batches):
        for args, kwargs in in_parts(*batch):
            wanted, given = float_tensors(original(*args, **kwargs)), float_tensors(model(*args, **kwargs))
            for number, (a, b) in enumerate(zip(wanted, given, strict=True)):
                values = a.double().reshape(len(a) if a.dim() else 1, -1).cpu()
                distance += (values - b.double().cpu().reshape(values.shape)).square().sum()
                found = torch.cat([torch.tensor([len(values), values.square().sum()]), values.sum(0)])
                key = json.dumps([number, *a.shape[1:]])
                sums[key] = sums.get(key, 0) + found
    total = 0.0
    sizes = {key: size for each in distributed.all_gather_text(_sizes(sums)) for key, size in json.loads(each).items()}
    for key, size in sorted(sizes.items()):
        count, squares, *_ = of_all = distributed.all_reduce_sum(sums.get(key, torch.zeros(size, dtype=torch.float64)))
        total += float(squares - of_all[2:].square().sum() / count)
    apart = float(distributed.all_reduce_sum(distance))
    return apart / total if total > 0 else apart


def _sizes(sums: dict[str, Tensor]) -> str:
    return json.dumps({key: len(values) for key, values in sums.items()})


def measure_error(
    model: nn.Module, original: nn.Module, fitted: list[Any], held_out: list[Any], on_fitted: float | None
) -> tuple[float, str]:
    """Return the `calibration_error` on images that nothing was fitted to, where there are enough, and on which images.

    Args:
        model: the narrowed model.
        original: the model before.
        fitted: batches that its layers were fitted to.
        held_out: other batches, or none.
        on_fitted: the error on the fitted batches, where it is known.
    """
    count = count_images(held_out)
    if count >= LEAST_HELD_OUT:
        return calibration_error(model, original, held_out), f"{count:,} images that nothing was fitted to"
    error = calibration_error(model, original, fitted) if on_fitted is None else on_fitted
    return error, f"the {count_images(fitted):,} images of the fit"


def count_images(batches: list[Any]) -> int:
    """Return the number of images in the batches of all processes: the rows of each batch's first tensor."""
    rows = [len(next(t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor))) for batch in batches]
    return int(distributed.all_reduce_sum(torch.tensor(float(sum(rows)))))


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, batches: list[Any]) -> nn.Module:
    """Return a copy in which every BatchNorm has the mean and variance of these images."""
    originals, model = _batchnorms(model), copy_model(model)
    norms = _batchnorms(model)
    for norm in norms:
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.zero_()
        norm.momentum = None  # the plain average over all batches, of which the first replaces what was there
        norm.train()
    with normalise_single_values(model):
        for args, kwargs in model_inputs(batches):
            model(*args, **kwargs)
    for norm, original in zip(norms, originals, strict=True):
        batches_seen = norm.num_batches_tracked
        assert batches_seen is not None
        count = distributed.all_reduce_sum(batches_seen.double())  # of all processes
        for value in (norm.running_mean, norm.running_var):
            assert value is not None
            if count:  # else it had single values only
                value.copy_(distributed.all_reduce_sum(value * batches_seen) / count)
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
    if not _batchnorms(model):
        return model, error, False
    recalibrated = recalibrate_batchnorm(model, batches)
    new_error = calibration_error(recalibrated, original, batches)
    return (recalibrated, new_error, True) if new_error < error else (model, error, False)
