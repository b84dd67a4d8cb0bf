"""What learns: the network, its averaged weights and the optimiser, one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nin import data, machine, models
from nin.descent import Descent, averaging
from nin.errors import UserError
from nin.recipe import ResolvedConfig, learning_rate

# What makes a fresh network for images and a recipe.
Network = Callable[[data.Data, ResolvedConfig], nn.Module]


class Learner:
    """The network and all that a step changes; `tensors` and `load` carry it over an interruption, bit for bit.

    Args:
        images: what it will learn from; decides the network's channels and classes.
        config: the recipe.
        make: makes the network; if not given, the one that the recipe names.

    Raises:
        UserError: the model or the device is unknown, or the model needs larger images.
    """

    def __init__(self, images: data.Data, config: ResolvedConfig, make: Network | None = None) -> None:
        make = make or make_model
        self.config = config
        self.device = machine.choose_device(config.device)
        self.dtype = machine.choose_dtype(config.precision, self.device)
        torch.manual_seed(config.seed)
        self.model = self.place(make(images, config))
        # The average lives in a second network, so that testing it needs no swapping of weights.
        self.average = self.place(make(images, config))
        self.descent = Descent(
            self.model,
            self.average,
            learning_rate=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )

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
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            scores = self.model(x)
        scores = scores.float()
        loss = F.cross_entropy(scores, labels, label_smoothing=config.label_smoothing)
        if torch.isfinite(loss):
            self.descent.step(
                loss,
                learning_rate=learning_rate(step, steps, config),
                gradient_clip=config.gradient_clip,
                decay=averaging(config.ema, step),
            )
        return loss.item(), scores.detach()

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights, their averages and the optimiser's momentum, by name."""
        return self.descent.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to the state that `tensors` returned."""
        self.descent.load(tensors)


def make_model(images: data.Data, config: ResolvedConfig) -> nn.Module:
    """Return a fresh network for these images.

    Raises:
        UserError: the model is unknown, or needs larger images.
    """
    options: dict[str, Any] = {"in_channels": images.channels}
    if config.model.startswith("nin_"):
        options["normalisation"] = None if config.normalisation == "none" else config.normalisation
        options["last_activation"] = config.last_activation
    if config.model != "nin_digits":
        options["dropout"] = config.dropout
    model = models.create(config.model, len(images.classes), **options)
    least = getattr(model, "smallest_input", 1)
    if images.size < least:
        raise UserError(
            f"{config.model} needs images of at least {least}×{least} pixels, got {images.size}×{images.size}: "
            f"give a larger --size, or another --model ({', '.join(models.MODELS)})"
        )
    return model
