"""After narrowing: BatchNorm statistics measured again, and training by the original network's answers."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nin.narrowing.structure import inputs_of


@torch.no_grad()
def calibration_error(model: nn.Module, original: nn.Module, batches: list[Any]) -> float:
    """Return the squared distance of two models' results, as a share of the original's variance."""
    distance, total = 0.0, 0.0
    for args, kwargs in inputs_of(batches):
        wanted, given = _floats(original(*args, **kwargs)), _floats(model(*args, **kwargs))
        for a, b in zip(wanted, given, strict=True):
            distance += float((a.double() - b.double()).square().sum())
            total += float((a.double() - a.double().mean(0)).square().sum())
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
        norm.momentum = momentum
        norm.eval()
    return model


def correct(model: nn.Module, original: nn.Module, batches: list[Any]) -> tuple[nn.Module, float, bool]:
    """Measure BatchNorm statistics again and keep them where that brings the result nearer to the original's.

    Returns:
        The better model, its `calibration_error`, and whether the statistics were changed.
    """
    error = calibration_error(model, original, batches)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) and m.track_running_stats]
    # a single image, or one place of one image, has no variance
    if not norms or any(next(_rows(args, kwargs), 2) < 2 for args, kwargs in inputs_of(batches)):
        return model, error, False
    again = renormalise(model, batches)
    other = calibration_error(again, original, batches)
    return (again, other, True) if other < error else (model, error, False)


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[int]:
    return iter([t.shape[0] for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()])


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """How a narrowed network is trained by the original's answers.

    Attributes:
        epochs: passes over the images.
        learning_rate: at the start; it falls to zero along a cosine.
        momentum: of Nesterov's accelerated gradient.
        weight_decay: per step, on weights of more than one dimension.
        temperature: scores are divided by it before the softmax.
        label_weight: share of the cross entropy with the labels, where there are any.
        gradient_clip: largest norm of the gradient.
    """

    epochs: int = 5
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    temperature: float = 3.0
    label_weight: float = 0.3
    gradient_clip: float = 1.0


def finetune(
    model: nn.Module,
    teacher: nn.Module,
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor | None]]],
    config: FinetuneConfig,
    *,
    steps_per_epoch: int,
    on_progress: Callable[[int, int, float], None] | None = None,
) -> nn.Module:
    """Train a network to answer as its teacher does, in place, and return it in evaluation mode.

    ``(1 - w) · T² · KL(softmax(teacher / T) ‖ softmax(model / T)) + w · cross entropy(model, labels)``

    Args:
        model: gives scores (N, classes).
        teacher: the original network.
        batches: for an epoch's number, the (images, labels) to train on; labels (N,) may be None.
        config: the recipe.
        steps_per_epoch: batches in an epoch, for the learning rate.
        on_progress: called with the steps done, all steps, and the loss.

    Source:
        Hinton, Vinyals, Dean: Distilling the knowledge in a neural network, 2015, arXiv 1503.02531.
    """
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0)
    steps, step = config.epochs * steps_per_epoch, 0
    teacher.eval()
    for epoch in range(config.epochs):
        model.train()
        for x, labels in batches(epoch):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
            with torch.no_grad():
                answers = teacher(x)
            loss = distillation_loss(model(x), answers, labels, config)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
            optimizer.step()
            step += 1
            if on_progress:
                on_progress(step, steps, float(loss.detach()))
    return model.eval()


def distillation_loss(scores: Tensor, answers: Tensor, labels: Tensor | None, config: FinetuneConfig) -> Tensor:
    """Return the loss of `finetune` for one batch."""
    t = config.temperature
    soft = F.kl_div(
        F.log_softmax(scores / t, 1), F.log_softmax(answers / t, 1), reduction="batchmean", log_target=True
    ) * (t * t)
    if labels is None:
        return soft
    return (1 - config.label_weight) * soft + config.label_weight * F.cross_entropy(scores, labels)
