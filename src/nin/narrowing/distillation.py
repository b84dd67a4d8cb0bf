"""Fine-tuning of a narrowed network by knowledge distillation from the original, with or without labels."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nin.errors import UserError
from nin.optim import OptimizerWithEMA, adamw, ema_decay_at_step, one_cycle_learning_rate
from nin.recipes import FINETUNE_STEPS
from nin.runtime import device
from nin.runtime.model_copy import copy_model
from nin.runtime.single_value_norm import normalise_single_values

LEARNING_RATE = 0.001


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """The settings of the fine-tuning by distillation, with AdamW.

    The layers of a narrowed network differ much in the norms of their weights and gradients, and most have no
    normalisation behind them any more: with SGD, one learning rate leaves some of them nearly as they were.
    `benchmarks/narrowing/README.md` compares both.

    Attributes:
        epochs: passes over the images.
        learning_rate: at the peak of a linear warmup and a cosine decay to zero; if None, 0.001, and below a hundred
            steps less in proportion: AdamW's first steps are as long as all others, and in a few nothing settles again.
        warmup: fraction of all steps in which it rises.
        betas: decay per step of the averages of the gradient and of its square.
        weight_decay: times the learning rate per step, on weights of more than one dimension.
        temperature: of the softmax, which divides the scores by it.
        label_weight: weight of the cross entropy with the labels, where there are any; the rest is distillation.
        gradient_clip: largest norm of the gradient.
        ema: decay per step of the exponential moving average of the weights, which is the result.
        precision: "auto" takes "bf16" where the processor multiplies in it, else "fp32".
    """

    epochs: int = 5
    learning_rate: float | None = None
    warmup: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.05
    temperature: float = 3.0
    label_weight: float = 0.3
    gradient_clip: float = 1.0
    ema: float = 0.99
    precision: str = "auto"

    def peak_learning_rate(self, steps: int) -> float:
        """Return the learning rate at the peak of a training of so many steps."""
        return LEARNING_RATE * min(1.0, steps / FINETUNE_STEPS) if self.learning_rate is None else self.learning_rate

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**dataclasses.asdict(self), "betas": list(self.betas)}


class DistillationStep:
    """One training step after the other of a student by its teacher; `tensors` and `load` save and restore it.

    ``(1 - w) · T² · KL(softmax(teacher / T) ‖ softmax(model / T)) + w · cross entropy(model, labels)``

    Args:
        model: the student, which gives scores (N, classes); trained in place.
        teacher: the original network.
        config: the settings.
        steps: of the whole training, for the learning rate.

    Source:
        Hinton, Vinyals, Dean: Distilling the knowledge in a neural network, 2015, arXiv 1503.02531.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, config: FinetuneConfig, steps: int) -> None:
        self.model, self.teacher, self.config, self.steps = model, teacher.eval(), config, steps
        self.step_number, self.learning_rate = 0, config.peak_learning_rate(steps)
        self.device = next(model.parameters()).device
        self.dtype = device.choose_dtype(config.precision, self.device)
        optimizer = adamw(model, learning_rate=self.learning_rate, betas=config.betas, weight_decay=config.weight_decay)
        self.optimizer = OptimizerWithEMA(model, copy_model(model), optimizer)

    def __call__(self, x: Tensor, labels: Tensor | None) -> float:
        """Train on one batch and return its loss.

        Args:
            x: images, as the network takes them.
            labels: int64 (N,), the probability of each class, float32 (N, classes), or None.

        Raises:
            UserError: the loss is no finite number; the weights are those before the step.
        """
        self.model.train()
        x = x.to(self.device)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            with torch.no_grad():
                teacher_scores = self.teacher(x)
            with normalise_single_values(self.model):
                scores = self.model(x)
        labels = None if labels is None else labels.to(self.device)
        loss = distillation_loss(scores.float(), teacher_scores.float(), labels, self.config)
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss of the fine-tuning became {loss.item()} at step {self.step_number + 1} of {self.steps}. "
                "Leave a larger share of the original, or, in Python, give FinetuneConfig a lower learning_rate than "
                f"{self.learning_rate:.2g}"
            )
        number, config = self.step_number, self.config
        learning_rate = one_cycle_learning_rate(number, self.steps, peak=self.learning_rate, warmup=config.warmup)
        ema_decay = ema_decay_at_step(config.ema, number)
        self.optimizer.step(loss, learning_rate=learning_rate, gradient_clip=config.gradient_clip, ema_decay=ema_decay)
        self.step_number += 1
        return loss.item()

    def finish(self) -> nn.Module:
        """Return the network with the averaged weights, in evaluation mode."""
        self.model.load_state_dict(self.optimizer.ema_model.state_dict())
        return self.model.eval()

    def tensors(self) -> dict[str, Tensor]:
        """Return the state of the training beside the number of the step."""
        return self.optimizer.state_dict()

    def load(self, tensors: Mapping[str, Tensor], step_number: int) -> None:
        """Restore the state that `tensors` returned after that many steps."""
        self.optimizer.load_state_dict(tensors)
        self.step_number = step_number


def finetune(
    model: nn.Module,
    teacher: nn.Module,
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor | None]]],
    config: FinetuneConfig,
    *,
    steps_per_epoch: int,
    on_progress: Callable[[int, int, float], None] | None = None,
) -> nn.Module:
    """Train a network by distillation from its teacher, in place, and return it in evaluation mode.

    Args:
        model: the student, which gives scores (N, classes).
        teacher: the original network.
        batches: returns the (images, labels) of an epoch, by its number; labels (N,) may be None.
        config: the settings.
        steps_per_epoch: batches in an epoch, for the learning rate.
        on_progress: called with the steps done, all steps, and the loss.

    Raises:
        UserError: a loss is no finite number.

    Source:
        Hinton, Vinyals, Dean: Distilling the knowledge in a neural network, 2015, arXiv 1503.02531.
    """
    step = DistillationStep(model, teacher, config, config.epochs * steps_per_epoch)
    for epoch in range(config.epochs):
        for x, labels in batches(epoch):
            loss = step(x, labels)
            if on_progress:
                on_progress(step.step_number, step.steps, loss)
    return step.finish()


def distillation_loss(scores: Tensor, teacher_scores: Tensor, labels: Tensor | None, config: FinetuneConfig) -> Tensor:
    """Return the loss of `DistillationStep` for one batch."""
    t = config.temperature
    student, teacher = F.log_softmax(scores / t, 1), F.log_softmax(teacher_scores / t, 1)
    # T² keeps the gradient's scale: that of softened scores is 1 / T² of it (Hinton, Vinyals, Dean 2015, section 2)
    soft = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * (t * t)
    if labels is None:
        return soft
    return (1 - config.label_weight) * soft + config.label_weight * F.cross_entropy(scores, labels)
