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
        self.blend: float | Tensor = 0.0  # how far the averages move
        device = next(model.parameters()).device
        if device.type == "cuda":
            self.blend = torch.zeros((), device=device)
            for group in self.optimizer.param_groups:
                group["lr"] = torch.zeros((), device=device)

    def step(self, loss: Tensor, *, learning_rate: float, gradient_clip: float, decay: float) -> None:
        """Follow the gradient of a loss.

        Args:
            loss: of the model, a single number.
            learning_rate: of this step.
            gradient_clip: largest norm of the gradient of all parameters together.
            decay: of the averaged weights.
        """
        self.prepare(learning_rate=learning_rate, decay=decay)
        self.follow(loss, gradient_clip=gradient_clip)

    def prepare(self, *, learning_rate: float, decay: float) -> None:
        """Set the numbers of the next step; see `step`.

        On a GPU they lie in its memory, where a step that is replayed as a graph finds them.
        """
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate
        if isinstance(self.blend, Tensor):
            self.blend.fill_(1 - decay)
        else:
            self.blend = 1 - decay

    def follow(self, loss: Tensor, *, gradient_clip: float) -> None:
        """Follow the gradient of a loss, by the numbers that were set; see `step`. It does not wait for a GPU."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), gradient_clip)
        self.optimizer.step()
        averages: list[Tensor] = list(self.average.parameters())
        currents: list[Tensor] = list(self.model.parameters())
        with torch.no_grad():
            if isinstance(self.blend, Tensor):
                for average, current in zip(averages, currents, strict=True):
                    average.lerp_(current, self.blend)
            else:
                torch._foreach_lerp_(averages, currents, self.blend)
            for average, current in zip(self.average.buffers(), self.model.buffers(), strict=True):
                average.lerp_(current, self.blend) if average.is_floating_point() else average.copy_(current)

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
