"""A network, the average of its weights and its optimiser: one step at a time, carried over an interruption."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Descent:
    """An optimiser at work on a network, and the averaged weights, which are the ones to use.

    Args:
        model: learns, in place.
        average: a network of the same architecture, which takes the averaged weights.
        optimizer: of the model's parameters, such as `sgd` or `adamw` give; `step` is told each step's learning rate.
    """

    def __init__(self, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.average, self.optimizer = model, average.eval(), optimizer
        average.load_state_dict(model.state_dict())
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
        """Return the weights, their averages and what the optimiser remembers of each, by name."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for name, p in self.model.named_parameters():
            remembered = {k: v for k, v in self.optimizer.state[p].items() if isinstance(v, Tensor)}
            tensors |= {f"optimizer.{k}.{name}": v for k, v in remembered.items()}
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to the state that `tensors` returned."""
        for network, prefix in ((self.model, "model."), (self.average, "average.")):
            network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        parameters = dict(self.model.named_parameters())
        for key, value in tensors.items():
            if key.startswith("momentum."):  # states of before there were several optimisers
                key = "optimizer.momentum_buffer." + key.removeprefix("momentum.")
            if not key.startswith("optimizer."):
                continue
            kind, name = key.removeprefix("optimizer.").split(".", 1)
            p = parameters[name]
            # as the parameter lies in memory; the number of the step is a single number
            place = torch.empty_like(p) if value.shape == p.shape else torch.empty_like(value, device=p.device)
            self.optimizer.state[p][kind] = place.copy_(value)


def sgd(model: nn.Module, *, learning_rate: float, momentum: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return stochastic gradient descent with Nesterov momentum.

    Args:
        model: whose parameters it changes.
        learning_rate: at the first step.
        momentum: of the gradients.
        weight_decay: per step, on weights, not on biases and gains (one-dimensional).
    """
    groups = _groups(model, weight_decay)
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=momentum > 0, fused=True)


def adamw(
    model: nn.Module, *, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """Return Adam with decoupled weight decay.

    Args:
        model: whose parameters it changes.
        learning_rate: at the first step.
        betas: how much of the averages of the gradient and of its square is kept in a step.
        weight_decay: times the learning rate per step, on weights, not on biases and gains (one-dimensional).

    Source:
        Loshchilov, Hutter: Decoupled weight decay regularization, 2017, arXiv 1711.05101.
    """
    return torch.optim.AdamW(_groups(model, weight_decay), lr=learning_rate, betas=betas, fused=True)


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameters for an optimiser: those that decay, and those that do not."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def averaging(decay: float, step: int) -> float:
    """Return the decay of the averaged weights at a step, from 0: they move quickly in the first ones."""
    return min(decay, (1 + step) / (10 + step))
