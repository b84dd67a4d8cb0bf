"""What learns: the network, its averaged weights and the optimiser, one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nin import machine, models
from nin.errors import UserError
from nin.recipe import ResolvedConfig, TrainConfig, learning_rate


class Learner:
    """The network and all that a step changes; `tensors` and `load` carry it over an interruption, bit for bit.

    Args:
        make: builds the network, the same each time it is called after the same seed.
        config: the recipe.

    Raises:
        UserError: the device is unknown.
    """

    def __init__(self, make: Callable[[], nn.Module], config: ResolvedConfig) -> None:
        self.config = config
        self.device = machine.choose_device(config.device)
        self.dtype = machine.choose_dtype(config.precision, self.device)
        torch.manual_seed(config.seed)
        self.model = self.place(make())
        # The average lives in a second network, so that testing it needs no swapping of weights.
        self.average = self.place(make()).eval()
        self.average.load_state_dict(self.model.state_dict())
        self.optimizer = make_optimizer(self.model, config)

    def place(self, model: nn.Module) -> nn.Module:
        """Return the network on the device, with its filters' channels side by side in memory."""
        return model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def step(self, x: Tensor, labels: Tensor, step: int, steps: int) -> tuple[float, Tensor]:
        """Take one step of the optimiser.

        Args:
            x: images (B, C, H, W).
            labels: int64 (B,).
            step: which one it is, from 0.
            steps: in the whole training.

        Returns:
            The loss, and the scores (B, classes). Where the loss is no finite number, nothing has changed.
        """
        config = self.config
        self.model.train()
        torch.manual_seed(config.seed * 1_000_003 + step)  # dropout, as a function of (seed, step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, config)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            scores = self.model(x)
        scores = scores.float()
        loss = F.cross_entropy(scores, labels, label_smoothing=config.label_smoothing)
        if torch.isfinite(loss):
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_clip)
            self.optimizer.step()
            self._update_average(step)
        return loss.item(), scores.detach()

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        """Move the averaged weights towards the current ones; quickly in the first steps."""
        decay = min(self.config.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)

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


def make_model(config: ResolvedConfig, *, channels: int, classes: int, size: int) -> nn.Module:
    """Return a fresh network for images of so many channels, classes, and pixels in height and width.

    Raises:
        UserError: the model is unknown, or needs larger images.
    """
    options: dict[str, Any] = {"in_channels": channels}
    if config.model.startswith("nin_"):
        options["normalisation"] = None if config.normalisation == "none" else config.normalisation
        options["last_activation"] = config.last_activation
    if config.model != "nin_digits":
        options["dropout"] = config.dropout
    model = models.create(config.model, classes, **options)
    least = getattr(model, "smallest_input", 1)
    if size < least:
        raise UserError(
            f"{config.model} needs images of at least {least}×{least} pixels, got {size}×{size}: "
            f"give a larger --size, or another --model ({', '.join(models.MODELS)})"
        )
    return model


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """Return SGD with Nesterov momentum; weight decay on the weights, not on biases and gains (one-dimensional)."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    nesterov = config.momentum > 0
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=nesterov, fused=True)
