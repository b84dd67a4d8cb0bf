"""How much a model's result depends on each direction of each layer's result, without labels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nin.models.layer_shape import LayerShape, inputs_of
from nin.narrowing.moments import observed_places, results, watch
from nin.runtime import distributed

# Scores are divided by this before the softmax: a network that is sure of its answers still has gradients, and
# what it says of the wrong classes counts, as in distillation (Hinton, Vinyals, Dean 2015, arXiv 1503.02531).
# A CIFAR ResNet-20 kept 73.5, 74.3 and 75.3 % of right answers with 1, 4 and 10.
TEMPERATURE = 10.0


def measure_sensitivity(model: nn.Module, shapes: dict[str, LayerShape], batches: list[Any]) -> dict[str, Tensor]:
    """Return G = E[∂ℓ/∂y ∂ℓ/∂yᵀ] of every layer, over images and places: float64 (groups, C / groups, C / groups).

    ℓ is the cross entropy with a class drawn from the model's own answer: G is the Fisher information, and
    ``tr(G Cov(y - ŷ))`` says which errors in y change the answer. Where the result is no table of scores, ℓ is its
    product with normal noise, in units of its spread.

    Args:
        model: in evaluation mode.
        shapes: of the layers.
        batches: images.
    """
    layers = {name: model.get_submodule(name) for name in shapes}
    places = {name: observed_places(shape) for name, shape in shapes.items()}
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(shapes, 0)

    def record(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            g = results(gradient, shapes[name], places[name]).double()
            sums[name] = sums.get(name, 0) + g @ g.mT
            counts[name] += g.shape[2]

        if y.requires_grad:
            y.register_hook(add)

    generator = torch.Generator()
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        with watch(layers, record), torch.enable_grad():
            for number, (args, kwargs) in enumerate(inputs_of(batches)):
                # each process of a job has every n-th batch: what is drawn for it is what one process would draw
                generator.manual_seed(distributed.rank() + number * distributed.world_size())
                args, kwargs = pytree.tree_map(_with_gradient, (args, kwargs))
                loss = _loss(model(*args, **kwargs), generator)
                if loss.requires_grad:
                    loss.backward()
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
    return {name: _mean(name, shapes[name], sums, counts) for name in shapes}


def _with_gradient(value: Any) -> Any:
    """Return a floating-point tensor that gradients flow to; it is no leaf, so that it can be changed in place."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_() * 1
    return value


def _loss(output: Any, generator: torch.Generator) -> Tensor:
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    if len(tensors) == 1 and tensors[0].dim() == 2 and tensors[0].shape[1] > 1:
        scores = tensors[0].float() / TEMPERATURE
        shares = scores.detach().softmax(1).cpu()
        labels = torch.multinomial(shares, 1, generator=generator)[:, 0].to(scores.device)
        return F.cross_entropy(scores, labels, reduction="sum")
    total = torch.zeros(())
    for tensor in tensors:
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
        per_image = max(1, tensor.numel() // max(1, tensor.shape[0] if tensor.dim() else 1))
        spread = tensor.detach().float().std(correction=0).clamp_min(1e-12)
        total = total.to(tensor.device) + (tensor.float() * noise).sum() / spread / per_image**0.5
    return total


def _mean(name: str, shape: LayerShape, sums: dict[str, Tensor], counts: dict[str, int]) -> Tensor:
    width = shape.out_channels // shape.groups
    total = sums.get(name)
    if total is None:
        total = torch.zeros(shape.groups, width, width, dtype=torch.float64)
    count = distributed.all_reduce_sum(torch.tensor(counts[name], dtype=torch.float64, device=total.device))
    return distributed.all_reduce_sum(total) / count.clamp_min(1)
