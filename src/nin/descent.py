"""A network, the average of its weights and its optimiser: one step at a time, carried over an interruption."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Descent:
    """Stochastic gradient descent with Nesterov momentum, and the averaged weights, which are the ones to use.

    Args:
        model: learns, in place.
        average: a network of the same architecture, which takes the averaged weights.
        learning_rate: at the first step; `step` is told each one's.
        momentum: of the gradients.
        weight_decay: per step, on weights, not on biases and gains (one-dimensional).
    """

    def __init__(
        self, model: nn.Module, average: nn.Module, *, learning_rate: float, momentum: float, weight_decay: float
    ) -> None:
        self.model, self.average = model, average.eval()
        average.load_state_dict(model.state_dict())
        weights = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=momentum > 0, fused=True)

    def step(self, loss: Tensor, *, learning_rate: float, gradient_clip: float, decay: float) -> None:
        """Follow the gradient of a loss.

        Args:
            loss: of the model, a single number.
            learning_rate: of this step.
            gradient_clip: largest norm of the gradient of all parameters together.
            decay: of the averaged weights.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), gradient_clip)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
            for average, current in zip(self.average.buffers(), self.model.buffers(), strict=True):
                average.lerp_(current, 1 - decay) if average.is_floating_point() else average.copy_(current)

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights, their averages and the optimiser's momentum, by name."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for name, p in self.model.named_parameters():
            if "momentum_buffer" in self.optimizer.state[p]:
                tensors[f"momentum.{name}"] = self.optimizer.state[p]["momentum_buffer"]
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to the state that `tensors` returned."""
        for network, prefix in ((self.model, "model."), (self.average, "average.")):
            network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        for name, p in self.model.named_parameters():
            if f"momentum.{name}" in tensors:
                self.optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(tensors[f"momentum.{name}"])


def averaging(decay: float, step: int) -> float:
    """Return the decay of the averaged weights at a step, from 0: they move quickly in the first ones."""
    return min(decay, (1 + step) / (10 + step))
