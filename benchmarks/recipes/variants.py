"""The named changes of the study, each one against the default recipe: settings of nin, or a few lines here."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nin import models
from nin.config import ResolvedConfig
from nin.data.sampler import stream_key
from nin.layers import MLPConv, StandardisedConv2d
from nin.optim import muon, one_cycle_learning_rate
from nin.recipes import MUON_SGD_FACTOR
from nin.training.step import TrainStep, make_model

Batch = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One change against the default recipe.

    Attributes:
        change: what is different, for the table.
        settings: of `nin.TrainConfig`.
        times: factors of the default's settings; that of ``ema`` is of the number of steps it goes over.
        batch: called with images, labels, the share of the training that is done, and a generator of the step; returns
            what the step is given in their place.
        step: in the place of nin's training step.
        network: called with the settings and the images' channels, classes and size; returns the network.
        cost: whether a step takes another time than the default's, so that it has to be measured; where it does not,
            the variant takes as many steps.
        teacher: the variant whose network, trained before and kept, it learns from; its time is not counted.
        length: its time as a multiple of the default's; any other than 1 is no fair comparison, and the table says so.
    """

    change: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    times: Mapping[str, float] = dataclasses.field(default_factory=dict)
    batch: Callable[[Tensor, Tensor, float, torch.Generator], Batch] | None = None
    step: type[TrainStep] = TrainStep
    network: Callable[[ResolvedConfig, int, int, int], nn.Module] = lambda config, channels, classes, size: make_model(
        config, channels=channels, classes=classes, size=size
    )
    cost: bool = False
    teacher: str | None = None
    length: float = 1.0


def generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """Return the generator of one step's draws."""
    return torch.Generator().manual_seed(stream_key("study", seed, epoch, step) % 2**63)


# changes of a batch


def erase(area: tuple[float, float], *, probability: float, aspect: float = 10 / 3) -> Callable[..., Batch]:
    """Return a change that erases a box of some images: random erasing, or cutout where area and aspect are fixed."""

    def change(x: Tensor, labels: Tensor, done: float, random: torch.Generator) -> Batch:
        count, _, height, width = x.shape
        draw = torch.rand(5, count, generator=random)
        size = height * width * (area[0] + (area[1] - area[0]) * draw[0])
        ratio = aspect ** (2 * draw[1] - 1)
        h = (size * ratio).sqrt().clamp(max=height).round()
        w = (size / ratio).sqrt().clamp(max=width).round()
        top, left = (draw[2] * (height - h + 1)).floor(), (draw[3] * (width - w + 1)).floor()
        rows, columns = torch.arange(height), torch.arange(width)
        in_rows = (rows >= top[:, None]) & (rows < (top + h)[:, None])
        in_columns = (columns >= left[:, None]) & (columns < (left + w)[:, None])
        box = in_rows[:, None, :, None] & in_columns[:, None, None, :] & (draw[4] < probability)[:, None, None, None]
        return x.masked_fill(box.to(x.device), 0.0), labels  # 0 is the mean

    return change


def reflect_shift(most: int) -> Callable[..., Batch]:
    """Return a change that moves images by up to so many pixels; reflections fill the edge."""

    def change(x: Tensor, labels: Tensor, done: float, random: torch.Generator) -> Batch:
        count, _, height, width = x.shape
        offsets = torch.randint(-most, most + 1, (2, count, 1), generator=random)
        rows, columns = (_reflected(torch.arange(n) + o, n) for n, o in zip((height, width), offsets, strict=True))
        places = torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
        images, down, right = (place.to(x.device) for place in places)
        moved = x[images, :, down, right]  # (B, H, W, C)
        return moved.permute(0, 3, 1, 2), labels

    return change


def _reflected(places: Tensor, size: int) -> Tensor:
    """Return places beyond the edges as those that lie as far within."""
    places = places.abs()
    return torch.where(places >= size, 2 * (size - 1) - places, places)


def random_flip(x: Tensor, labels: Tensor, done: float, random: torch.Generator) -> Batch:
    """Mirror each image with probability 1/2, whatever was done in the epoch before."""
    mirrored = torch.rand(len(x), 1, 1, 1, generator=random) < 0.5
    return torch.where(mirrored.to(x.device), x.flip(3), x), labels


def progressive(smallest: float, until: float) -> Callable[..., Batch]:
    """Return a change that trains on small images first; the size grows in a straight line until a share is done."""

    def change(x: Tensor, labels: Tensor, done: float, random: torch.Generator) -> Batch:
        size = x.shape[-1]
        side = round(size * min(1.0, smallest + (1 - smallest) * done / until) / 2) * 2
        if side < size:
            x = F.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)
            x = x.contiguous(memory_format=torch.channels_last)
        return x, labels

    return change


# changes of a step


class MuonOf1x1(TrainStep):
    """Muon for the 1×1 layers, and SGD for the k×k ones too."""

    def __init__(self, build_model: Callable[[], nn.Module], config: ResolvedConfig) -> None:
        super().__init__(build_model, config)
        layers = [m for m in self.model.modules() if isinstance(m, StandardisedConv2d) and m.kernel_size == (1, 1)]
        rates: dict[str, Any] = {"learning_rate": config.learning_rate, "weight_decay": config.weight_decay}
        rates |= {
            "momentum": config.momentum,
            "dtype": self.dtype,
            "sgd_factor": MUON_SGD_FACTOR,
        }
        self.optimizer.optimizer = muon(self.model, matrices=[layer.weight for layer in layers], **rates)


def average_at_end(share: float) -> type[TrainStep]:
    """Return a step that takes the mean of the weights of the last part of the training, in place of the EMA."""

    class AverageAtEnd(TrainStep):
        def __call__(self, x: Tensor, labels: Tensor, step: int, steps: int) -> Batch:
            first = int(steps * (1 - share))
            decay = (step - first) / (step - first + 1) if step >= first else 0.0
            return self._step(self._run, x, labels, step, self.learning_rate(step, steps), decay)

    return AverageAtEnd


class EMAOfShare(TrainStep):
    """The average goes over a part of the steps before, 1 / 40: short in the beginning, long in the end."""

    def __call__(self, x: Tensor, labels: Tensor, step: int, steps: int) -> Batch:
        return self._step(self._run, x, labels, step, self.learning_rate(step, steps), max(0.0, 1 - 40 / (step + 1)))


def constant_then_linear(constant: float) -> type[TrainStep]:
    """Return a step whose rate stays at its peak for a part of the training and then falls in a straight line."""

    class Trapezoid(TrainStep):
        def learning_rate(self, step: int, steps: int) -> float:
            c, last = self.config, 1 - constant - self.config.warmup
            rise = one_cycle_learning_rate(step, steps, peak=c.learning_rate, warmup=c.warmup, schedule="triangle")
            return rise if step < c.warmup * steps else c.learning_rate * min(1.0, (1 - step / steps) / last)

    return Trapezoid


class SAM(TrainStep):
    """Sharpness-aware minimisation; the way up is computed on a quarter of the batch: 1.25 times the time.

    Foret et al. 2020, arXiv 2010.01412; on a part of the batch: Du et al. 2021, arXiv 2110.03141.
    """

    RADIUS = 0.05

    def _run_eagerly(self, x: Tensor, labels: Tensor) -> Batch:
        weights = [p for p in self.model.parameters() if p.dim() > 1]
        part, smoothing = len(x) // 4, self.config.label_smoothing
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            scores = self.model(x[:part]).float()
        loss = F.cross_entropy(scores, labels[:part], label_smoothing=smoothing)
        gradients = torch.autograd.grad(loss, weights)
        scale = self.RADIUS / (float(torch.stack([g.norm() for g in gradients]).norm()) + 1e-12)

        @torch.no_grad()
        def move(factor: float) -> None:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.add_(gradient, alpha=factor * scale)

        move(1)
        down_again = self.optimizer.optimizer.register_step_pre_hook(lambda *_: move(-1))
        try:
            return super()._run_eagerly(x, labels)
        finally:
            down_again.remove()


class Distilled(TrainStep):
    """Half of the loss is the divergence from a teacher's answers to the same images, at temperature 2.

    Hinton, Vinyals, Dean 2015, arXiv 1503.02531; the same augmented images for both: Beyer et al. 2022, arXiv
    2106.05237.
    """

    TEMPERATURE = 2.0
    teacher: nn.Module  # set by the run

    def _run_eagerly(self, x: Tensor, labels: Tensor) -> Batch:
        with torch.no_grad(), torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            self.wanted = (self.teacher(x).float() / self.TEMPERATURE).log_softmax(1)
        return super()._run_eagerly(x, labels)

    def _loss(self, scores: Tensor, labels: Tensor) -> Batch:
        own = (scores / self.TEMPERATURE).log_softmax(1)
        divergence = F.kl_div(own, self.wanted, log_target=True, reduction="batchmean") * self.TEMPERATURE**2
        loss = 0.5 * super()._loss(scores, labels)[0] + 0.5 * divergence
        return loss, loss


# other networks


class BatchNormConv(nn.Sequential):
    """A convolution and BatchNorm in the place of a standardised one."""


def batch_norm(config: ResolvedConfig, channels: int, classes: int, size: int) -> nn.Module:
    """Return the network with BatchNorm after each layer but the last, and plain convolutions."""
    plain = dataclasses.replace(config, normalisation="none")
    network = make_model(plain, channels=channels, classes=classes, size=size)
    for block in network.blocks:
        layer = block[0]
        parts: list[nn.Module] = []
        for conv, activation in zip(layer.convs, layer.activations, strict=True):
            is_last = block is network.blocks[-1] and conv is layer.convs[-1]
            parts += [conv] if is_last else [conv, nn.BatchNorm2d(conv.out_channels)]
            parts += [nn.ReLU()] if activation == "relu" else []
        block[0] = nn.Sequential(*parts)
    return network


def dirac(config: ResolvedConfig, channels: int, classes: int, size: int) -> nn.Module:
    """Return the network whose 1×1 layers begin near the identity: half of each filter's length is its own channel."""
    network = make_model(config, channels=channels, classes=classes, size=size)
    for layer in network.modules():
        if isinstance(layer, StandardisedConv2d) and layer.in_channels > 3:
            middle = layer.kernel_size[0] // 2
            with torch.no_grad():
                for row in range(min(layer.out_channels, layer.in_channels)):
                    layer.weight[row, row, middle, middle] += 1.0
    return network


class DroppedLayers(nn.Module):
    """An mlpconv layer of which, while training, a 1×1 layer as wide as its input is left out now and then."""

    def __init__(self, layer: MLPConv, probability: float) -> None:
        super().__init__()
        self.layer, self.probability = layer, probability

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's result."""
        for number, (conv, name) in enumerate(zip(self.layer.convs, self.layer.activations, strict=True)):
            can_drop = self.training and number and conv.in_channels == conv.out_channels
            if can_drop and torch.rand(()) < self.probability:
                x = x + 0 * sum(p.sum() for p in conv.parameters())  # gradients of zero: fused SGD takes all or none
                continue
            x = conv(x).relu() if name == "relu" else conv(x)
        return x


def stochastic_depth(probability: float) -> Callable[[ResolvedConfig, int, int, int], nn.Module]:
    """Return what makes the network with such layers."""

    def make(config: ResolvedConfig, channels: int, classes: int, size: int) -> nn.Module:
        network = make_model(config, channels=channels, classes=classes, size=size)
        for block in network.blocks:
            block[0] = DroppedLayers(block[0], probability)
        return network

    return make


def wider(config: ResolvedConfig, channels: int, classes: int, size: int) -> nn.Module:
    """Return the network with one and a half times the channels in each layer but the last: a teacher."""
    own = make_model(config, channels=channels, classes=classes, size=size).config

    def widened(block: models.BlockConfig) -> models.BlockConfig:
        widths = (width if width == classes else width * 3 // 2 for width in block.channels)
        return dataclasses.replace(block, channels=tuple(widths))

    return models.NiN(dataclasses.replace(own, blocks=tuple(map(widened, own.blocks))))


def paper(config: ResolvedConfig, channels: int, classes: int, size: int) -> nn.Module:
    """Return the paper's network: dropout of 0.5, average pooling as in most ports."""
    return models.create("nin_cifar", classes, in_channels=channels, dropout=0.5)


# the EMA goes over as many images as before
HALF_BATCH = {"batch_size": 0.5, "learning_rate": 0.5**0.5, "ema": 2}
DOUBLE_BATCH = {"batch_size": 2, "learning_rate": 2**0.5, "ema": 0.5}

VARIANTS: dict[str, Variant] = {
    "default": Variant("the recipe as it is"),
    # the optimiser
    "sgd": Variant("SGD for all weights", {"optimizer": "sgd"}, cost=True),
    "muon-1x1": Variant("SGD for the k×k layers, Muon for the 1×1 ones", step=MuonOf1x1, cost=True),
    "rate-quarter": Variant("a quarter of the learning rate", times={"learning_rate": 0.25}),
    "rate-half": Variant("half of the learning rate", times={"learning_rate": 0.5}),
    "rate-double": Variant("twice the learning rate", times={"learning_rate": 2}),
    "momentum-0.8": Variant("momentum 0.8 in place of 0.9", {"momentum": 0.8}),
    "momentum-0.95": Variant("momentum 0.95 in place of 0.9", {"momentum": 0.95}),
    "clip-off": Variant("the gradient's norm clipped at 100 in place of 1", {"gradient_clip": 100.0}),
    "decay-0.1": Variant("a tenth of the weight decay", times={"weight_decay": 0.1}),
    "decay-4": Variant("four times the weight decay", times={"weight_decay": 4}),
    "batch-half": Variant("half of the batch, the rate by the root", times=HALF_BATCH, cost=True),
    "batch-double": Variant("twice the batch, the rate by the root", times=DOUBLE_BATCH, cost=True),
    "sam": Variant("SAM with a radius of 0.05, upwards on a quarter of the batch", step=SAM, cost=True),
    # the schedule
    "triangle": Variant("the rate falls in a straight line", {"schedule": "triangle"}),
    "warmup-0.1": Variant("half of the warm-up", {"warmup": 0.1}),
    "trapezoid": Variant("the rate at its peak until 60 %, then a straight line", step=constant_then_linear(0.4)),
    "shorter": Variant("half of the epochs", length=0.5),
    "longer": Variant("twice the epochs", length=2.0),
    # the average
    "average-end": Variant("the mean of the last fifth's weights in place of the EMA", step=average_at_end(0.2)),
    "ema-longer": Variant("an EMA over twice as many steps", times={"ema": 2}),
    "ema-share": Variant("an EMA over the last 40th of the steps done", step=EMAOfShare),
    # the targets
    "smoothing-0": Variant("no label smoothing", {"label_smoothing": 0.0}),
    "smoothing-0.2": Variant("label smoothing 0.2", {"label_smoothing": 0.2}),
    # the images
    "erasing": Variant(
        "random erasing (half of the images, 2 to 33 %)", batch=erase((0.02, 0.33), probability=0.5), cost=True
    ),
    "cutout": Variant(
        "cutout (all images, a square of 1/12)", batch=erase((1 / 12, 1 / 12), probability=1, aspect=1), cost=True
    ),
    "mixup": Variant("mixup 0.2", {"mixup": 0.2}, cost=True),
    "cutmix": Variant("CutMix 1", {"cutmix": 1.0}, cost=True),
    "strong": Variant("TrivialAugment, colour jitter, random erasing", {"augment": "strong"}, cost=True),
    "flip-random": Variant("flips drawn anew in each epoch", {"flip": False}, batch=random_flip, cost=True),
    "shift-0": Variant("no shift", {"shift": 0}),
    "shift-1": Variant("shifts of up to 1 pixel", {"shift": 1}),
    "shift-4-reflect": Variant("shifts of up to 4 pixels, reflected", {"shift": 0}, batch=reflect_shift(4), cost=True),
    "shift-2-reflect": Variant("shifts of up to 2 pixels, reflected", {"shift": 0}, batch=reflect_shift(2), cost=True),
    "progressive": Variant("images grow from 2/3 of the size until 70 %", batch=progressive(0.667, 0.7), cost=True),
    # the network
    "batch-norm": Variant("BatchNorm in place of weight standardisation, SGD", network=batch_norm, cost=True),
    "dirac": Variant("weights begin near the identity", network=dirac),
    "dropout-0.2": Variant("dropout 0.2 after each pooling", {"dropout": 0.2}),
    "stochastic-depth": Variant("1×1 layers left out with probability 0.1", network=stochastic_depth(0.1), cost=True),
    "paper": Variant("the paper's network: dropout 0.5, no normalisation, SGD", network=paper, cost=True),
    # apart: these have another network's knowledge
    "wider": Variant(
        "one and a half times as wide, no NiN of the paper: a teacher", network=wider, cost=True, length=3
    ),
    "distilled": Variant("learns from `wider` of seed 0, too", step=Distilled, cost=True, teacher="wider"),
}
