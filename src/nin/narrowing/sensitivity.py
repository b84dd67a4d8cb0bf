"""The sensitivity of a model's output to each layer's: its Fisher information, without labels."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nin.models.layer_spec import LayerSpec
from nin.narrowing.calibration import float_tensors, in_parts, model_inputs, record_calls
from nin.narrowing.patches import extract_outputs
from nin.runtime import distributed

# Scores are divided by this before the softmax: a network that is sure of its answers still has gradients, and
# the probabilities of the wrong classes count, as in distillation (Hinton, Vinyals, Dean 2015, arXiv 1503.02531).
# A CIFAR ResNet-20 kept 73.5, 74.3 and 75.3 % of right answers with 1, 4 and 10.
TEMPERATURE = 10.0


def measure_sensitivities(model: nn.Module, specs: dict[str, LayerSpec], batches: list[Any]) -> dict[str, Tensor]:
    """Return the Fisher information of every layer's output y: float64 (groups, C / groups, C / groups).

    ``G = E[∂ℓ/∂y ∂ℓ/∂yᵀ]`` over images and positions, where ℓ is the cross entropy with a class drawn from the model's
    own prediction: ``tr(G Cov(y - ŷ))`` is how much an error of y changes the prediction. Where the output is no table
    of scores, ℓ is its product with normal noise, in units of its standard deviation.

    Args:
        model: in evaluation mode.
        specs: of the layers.
        batches: calibration images.
    """
    layers = {name: model.get_submodule(name) for name in specs}
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(specs, 0)

    def record(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            g = extract_outputs(gradient, specs[name]).double()
            sums[name] = sums.get(name, 0) + g @ g.mT
            counts[name] += g.shape[2]

        if y.requires_grad:
            y.register_hook(add)

    generator = torch.Generator()
    with _frozen(model), record_calls(layers, record), torch.enable_grad():
        for number, batch in enumerate(model_inputs(batches)):
            # each process of a job has every n-th batch: its labels are those that one process would draw for it
            generator.manual_seed(distributed.rank() + number * distributed.world_size())
            for part in in_parts(*batch):
                args, kwargs = pytree.tree_map(_require_gradient, part)
                loss = _loss(model(*args, **kwargs), generator)
                if loss.requires_grad:
                    loss.backward()
    return {name: _mean(spec, sums.get(name), counts[name], _device(layers[name])) for name, spec in specs.items()}


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Compute no gradients of the parameters; only those of layers' outputs are needed."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


def _require_gradient(value: Any) -> Any:
    """Return a floating-point tensor that gradients flow to."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_() * 1  # no leaf, so that the model may change it in place
    return value


def _loss(output: Any, generator: torch.Generator) -> Tensor:
    tensors = float_tensors(output)
    if len(tensors) == 1 and tensors[0].dim() == 2 and tensors[0].shape[1] > 1:
        scores = tensors[0].float() / TEMPERATURE
        probabilities = scores.detach().softmax(1).cpu()
        labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(scores.device)
        return F.cross_entropy(scores, labels, reduction="sum")
    total = torch.zeros(())
    for tensor in tensors:
        noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
        per_image = max(1, tensor.numel() // max(1, tensor.shape[0] if tensor.dim() else 1))
        spread = tensor.detach().float().std(correction=0).clamp_min(1e-12)
        total = total.to(tensor.device) + (tensor.float() * noise).sum() / spread / per_image**0.5
    return total


def _device(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device


def _mean(spec: LayerSpec, total: Tensor | None, samples: int, device: torch.device) -> Tensor:
    """Return the mean over the samples of all processes; zeros where no gradient reached the layer."""
    if total is None:
        width = spec.out_channels // spec.groups
        total = torch.zeros(spec.groups, width, width, dtype=torch.float64, device=device)
    count = distributed.all_reduce_sum(torch.tensor(samples, dtype=torch.float64, device=total.device))
    return distributed.all_reduce_sum(total) / count.clamp_min(1)
