"""What learns: the network, its averaged weights and the optimiser, one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nin import machine, models
from nin.descent import Descent, averaging
from nin.errors import UserError
from nin.recipe import ResolvedConfig, learning_rate
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
        self.average = self.place(make())
        self.descent = Descent(
            self.model,
            self.average,
            learning_rate=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
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
        self.descent.prepare(learning_rate=learning_rate(step, steps, config), decay=averaging(config.ema, step))
        loss, scores = self._take_step(x, labels)
        return loss, scores

    def _plain_step(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            scores = self.model(x)
        scores = scores.float()
        loss = F.cross_entropy(scores, labels, label_smoothing=self.config.label_smoothing)
        if self.device.type == "cuda" or torch.isfinite(loss):
            self.descent.follow(loss, gradient_clip=self.config.gradient_clip)
        return loss.detach(), scores.detach()

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights, their averages and the optimiser's momentum, by name."""
        return self.descent.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to the state that `tensors` returned."""
        self.descent.load(tensors)


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
