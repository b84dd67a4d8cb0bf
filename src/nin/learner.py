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
from nin.replaying import Replay


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
        # Numbers that change from step to step lie on a GPU, where the graph of a step finds them.
        self.blend = torch.zeros((), device=self.device)
        if self.device.type == "cuda":
            for group in self.optimizer.param_groups:
                group["lr"] = torch.zeros((), device=self.device)
        drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.model.modules())
        replays = self.device.type == "cuda" and config.recipe == "speed" and not drops
        self._take_step = Replay(self._plain_step) if replays else self._plain_step

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
            The loss, and the scores (B, classes). Where the loss is no finite number, nothing has changed on a CPU;
            a GPU is not waited for to ask, so there the weights are lost, and what was saved before is not.
        """
        loss, scores = self.advance(x, labels, step, steps)
        return loss.item(), scores

    def advance(self, x: Tensor, labels: Tensor, step: int, steps: int) -> tuple[Tensor, Tensor]:
        """Take a step as `step` does, without waiting for the device: the loss is still a tensor."""
        config = self.config
        self.model.train()
        torch.manual_seed(config.seed * 1_000_003 + step)  # dropout, as a function of (seed, step)
        rate, decay = learning_rate(step, steps, config), min(config.ema, (1 + step) / (10 + step))
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.blend.fill_(1 - decay)
        loss, scores = self._take_step(x, labels)
        return loss, scores

    def _plain_step(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            scores = self.model(x)
        scores = scores.float()
        loss = F.cross_entropy(scores, labels, label_smoothing=self.config.label_smoothing)
        if self.device.type == "cuda" or torch.isfinite(loss):
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
            self.optimizer.step()
            self._update_average()
        return loss.detach(), scores.detach()

    @torch.no_grad()
    def _update_average(self) -> None:
        """Move the averaged weights towards the current ones; quickly in the first steps."""
        pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
        if self.device.type == "cuda":
            for average, current in pairs:
                average.lerp_(current, self.blend)
        else:
            averages, currents = zip(*pairs, strict=True)
            torch._foreach_lerp_(averages, currents, self.blend.item())

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
