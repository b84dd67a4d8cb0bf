"""What learns: the network, its averaged weights and the optimiser, one step at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nin import models
from nin.config import ResolvedConfig, learning_rate
from nin.errors import UserError
from nin.optim import Descent, averaging, sgd
from nin.runtime import device, distributed
from nin.runtime.cuda_graph import Replay


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
        self.device = device.choose_device(
            config.device, gpu=distributed.local_rank() if distributed.count() > 1 else None
        )
        self.dtype = device.choose_dtype(config.precision, self.device)
        torch.manual_seed(config.seed)
        self.model = self.place(make())
        # The average lives in a second network, so that testing it needs no swapping of weights.
        self.average = self.place(make())
        self.network: nn.Module = self.model  # what a step calls
        optimizer = sgd(
            self.model,
            learning_rate=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.descent = Descent(self.model, self.average, optimizer)
        drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.model.modules())
        replays = self.device.type == "cuda" and config.recipe == "speed" and not drops
        self._take_step = Replay(self._plain_step, self.device) if replays else self._plain_step

    def join(self, batch_size: int) -> None:
        """Share the steps with the other processes of the job: each sees its part of a batch, all change alike.

        Args:
            batch_size: images in the batch of all processes together.
        """
        if distributed.count() > 1:
            share_dropout(self.model, batch_size)
            # The strides of a 1×1 weight are written in several ways for one layout; DDP copies its few numbers.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            devices = [self.device.index] if self.device.type == "cuda" else None
            self._take_step = self._plain_step
            self.network = nn.parallel.DistributedDataParallel(
                self.model, device_ids=devices, gradient_as_bucket_view=True
            )

    def leave(self) -> None:
        """Take steps alone again."""
        self.network = self.model

    def place(self, model: nn.Module) -> nn.Module:
        """Return the network on the device, with its filters' channels side by side in memory."""
        return model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def step(self, x: Tensor, labels: Tensor, step: int, steps: int) -> tuple[float, Tensor]:
        """Take one step of the optimiser.

        Args:
            x: images (B, C, H, W); of this process, where several share the batch. It may be none then.
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
            scores = self.network(x if len(x) else x.new_zeros(1, *x.shape[1:]))[: len(x)]
        scores = scores.float()
        loss, share = self._loss(scores, labels)
        if self.device.type == "cuda" or torch.isfinite(loss):
            self.descent.follow(share, gradient_clip=self.config.gradient_clip)
        return loss.detach(), scores.detach()

    def _loss(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean cross entropy over the batch of all processes, and what this one differentiates.

        DDP takes the mean of the processes' gradients. Their parts of a batch may differ in size, so each
        differentiates its sum divided by the size of the whole batch, times the number of processes: the mean of
        those gradients is that of the whole batch.
        """
        smoothing, size = self.config.label_smoothing, distributed.count()
        if size == 1:
            loss = F.cross_entropy(scores, labels, label_smoothing=smoothing)
            return loss, loss
        part = F.cross_entropy(scores, labels, label_smoothing=smoothing, reduction="sum")
        whole = distributed.total(torch.stack([part.detach(), part.new_tensor(len(labels))]))
        images = whole[1].clamp(min=1)
        return whole[0] / images, part * (size / images)

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights, their averages and what the optimiser remembers, by name."""
        return self.descent.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to the state that `tensors` returned."""
        self.descent.load(tensors)


class SharedDropout(nn.Dropout):
    """Drops what one process would drop from the whole batch, where each of several holds every n-th image of it.

    Each process draws for the whole batch: that is what makes their losses those of one process.
    """

    def __init__(self, p: float, batch_size: int) -> None:
        super().__init__(p)
        self.batch_size = batch_size

    def forward(self, x: Tensor) -> Tensor:
        """Return x, some values of which are zero while training and the others larger by 1 / (1 - p)."""
        if not self.training or self.p == 0:
            return x
        layout = torch.channels_last if x.dim() == 4 and x.stride(1) == 1 else torch.contiguous_format
        ones = torch.ones((self.batch_size, *x.shape[1:]), dtype=x.dtype, device=x.device)
        kept = F.dropout(ones.contiguous(memory_format=layout), self.p)
        return x * kept[distributed.rank() :: distributed.count()][: len(x)]


def share_dropout(model: nn.Module, batch_size: int) -> None:
    """Put `SharedDropout` in the place of every dropout of a network."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Dropout):
                setattr(parent, name, SharedDropout(child.p, batch_size))


def make_model(config: ResolvedConfig, *, channels: int, classes: int, size: int) -> nn.Module:
    """Return a fresh network for images of so many channels, classes, and pixels in height and width.

    Raises:
        UserError: the model is unknown, needs larger images, or cannot be as the recipe says.
    """
    options: dict[str, Any] = {"in_channels": channels, "dropout": config.dropout}
    if config.model.startswith("nin_"):
        options["normalisation"] = None if config.normalisation == "none" else config.normalisation
        options["last_activation"] = config.last_activation
    for name in ("normalisation", "last_activation"):
        if config.model == "googlenet" and getattr(config, name) != "none":
            raise UserError(f"{name} must be none for googlenet, got {getattr(config, name)}: nin_… networks have it")
    model = models.create(config.model, classes, **options)
    least = getattr(model, "smallest_input", 1)
    if size < least:
        raise UserError(
            f"{config.model} needs images of at least {least}×{least} pixels, got {size}×{size}: "
            f"give a larger --size, or another --model ({', '.join(models.MODELS)})"
        )
    return model
