"""One training step: forward, loss, backward, optimiser and EMA; with DDP or replayed as a CUDA graph."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nin import models
from nin.config import ResolvedConfig, step_seed
from nin.errors import UserError
from nin.layers import StandardisedConv2d
from nin.models.factory import explain_refused_images
from nin.models.initial_weights import InitialWeights
from nin.optim import OptimizerWithEMA, adamw, ema_decay_at_step, muon, one_cycle_learning_rate, sgd
from nin.recipes import MUON_SGD_FACTOR
from nin.runtime import distributed
from nin.runtime.cuda_graph import CUDAGraphRunner
from nin.runtime.device import choose_device, choose_dtype
from nin.runtime.model_copy import copy_model
from nin.runtime.single_value_norm import normalise_single_values


class TrainStep:
    """A network, its EMA and its optimiser; a call takes one step of the optimiser.

    The optimiser's `state_dict` is all that a step changes: a training that loads it goes on with the same bits.

    Args:
        build_model: returns the network; called once.
        config: the training settings.

    Attributes:
        model: the trained network, on the device, in channels_last.
        ema_model: the same network with the averaged weights.
        optimizer: updates both.
        class_weights: what the loss of an image of each class counts, float32 (classes,) with a mean of 1 over the
            images; None counts all alike.

    Raises:
        UserError: the device is unknown.
    """

    def __init__(self, build_model: Callable[[], nn.Module], config: ResolvedConfig) -> None:
        self.config = config
        self.device = choose_device(config.device)
        torch.manual_seed(config.seed)
        self.model = self._to_device(build_model())
        self.dtype = _choose_dtype(config.precision, self.device, self.model)
        # a second network, so that the averages are tested without swapping weights
        self.ema_model = copy_model(self.model)
        self.class_weights: Tensor | None = None
        self.forward_model: nn.Module = self.model  # in DDP's wrapper where several processes train
        self.optimizer = OptimizerWithEMA(self.model, self.ema_model, _make_optimizer(self.model, config, self.dtype))
        # dropout's mask is a function of the step's seed; a replayed graph does not promise that
        drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.model.modules())
        uses_graph = self.device.type == "cuda" and config.recipe == "speed" and not drops
        self._run = CUDAGraphRunner(self._run_eagerly, self.device) if uses_graph else self._run_eagerly

    def _to_device(self, model: nn.Module) -> nn.Module:
        return model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def __call__(self, x: Tensor, labels: Tensor, step: int, steps: int) -> tuple[Tensor, Tensor]:
        """Take one step of the optimiser. It does not synchronise with a GPU.

        Args:
            x: images (B, C, H, W); this process's part of the batch. B may be 0 where there are several processes.
            labels: int64 (B,), or the probability of each class, float32 (B, classes).
            step: which one it is, from 0.
            steps: in the whole training.

        Returns:
            The loss, a scalar, and the scores (B, classes). A loss that is not finite changes nothing on a CPU; a GPU
            is not waited for to find out, so there the weights are lost, and what was saved before is not.
        """
        rate, decay = self.learning_rate(step, steps), ema_decay_at_step(self.config.ema, step)
        return self._step(self._run, x, labels, step, rate, decay)

    def step_at(self, x: Tensor, labels: Tensor, *, learning_rate: float, step: int) -> tuple[Tensor, Tensor]:
        """Take one step of the optimiser at a learning rate of its own, and leave the averages as they are.

        Args:
            x: images (B, C, H, W); this process's part of the batch.
            labels: int64 (B,), or float32 (B, classes).
            learning_rate: of the step.
            step: which one it is, for dropout.

        Returns:
            The loss, a scalar, and the scores (B, classes).
        """
        return self._step(self._run_eagerly, x, labels, step, learning_rate, 1.0)

    def _step(
        self, run: Callable[..., tuple[Tensor, ...]], x: Tensor, labels: Tensor, step: int, rate: float, decay: float
    ) -> tuple[Tensor, Tensor]:
        self.model.train()
        if self.config.batch_norm == "frozen":
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        torch.manual_seed(step_seed(self.config.seed, step))  # of dropout
        self.optimizer.set_hyperparameters(learning_rate=rate, ema_decay=decay)
        loss, scores = run(x, labels)
        return loss, scores

    def learning_rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        c = self.config
        return one_cycle_learning_rate(step, steps, peak=c.learning_rate, warmup=c.warmup, schedule=c.schedule)

    def _run_eagerly(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        autocast = torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)
        with autocast, normalise_single_values(self.model):
            # DDP's all-reduce waits for every process, so one without images runs a blank one
            scores = self.forward_model(x if len(x) else x.new_zeros(1, *x.shape[1:]))[: len(x)]
        scores = scores.float()
        mean_loss, local_loss = self._loss(scores, labels)
        if self.device.type == "cuda" or torch.isfinite(mean_loss):
            self.optimizer.backward_and_update(local_loss, gradient_clip=self.config.gradient_clip)
        return mean_loss.detach(), scores.detach()

    def _loss(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean cross entropy over the batch of all processes, and the loss that this one differentiates.

        DDP averages the gradients of the processes, whose parts of a batch may differ in size. So each differentiates
        its sum divided by the size of the whole batch, times the number of processes: the average of those gradients is
        the gradient of the mean over the whole batch.
        """
        smoothing, world_size = self.config.label_smoothing, distributed.world_size()
        if world_size == 1 and self.class_weights is None:
            loss = F.cross_entropy(scores, labels, label_smoothing=smoothing)
            return loss, loss
        if self.class_weights is None:
            local_sum = F.cross_entropy(scores, labels, label_smoothing=smoothing, reduction="sum")
        else:
            # not the weights of F.cross_entropy, which weigh the smoothed part by the other classes: with few images
            # of a class, each image of another would be pulled to it as much as to its own
            losses = F.cross_entropy(scores, labels, label_smoothing=smoothing, reduction="none")
            weights = self.class_weights[labels] if labels.dim() == 1 else labels @ self.class_weights
            local_sum = (losses * weights).sum()
        sums = distributed.all_reduce_sum(torch.stack([local_sum.detach(), local_sum.new_tensor(len(labels))]))
        batch_size = sums[1].clamp(min=1)
        return sums[0] / batch_size, local_sum * (world_size / batch_size)

    @contextlib.contextmanager
    def data_parallel(self, batch_size: int) -> Iterator[None]:
        """Average gradients over the processes of the job within the block; nothing happens where there is one.

        Args:
            batch_size: of all processes together.
        """
        if distributed.world_size() == 1:
            yield
            return
        use_distributed_dropout(self.model, batch_size)
        # The strides of a 1×1 weight are written in several ways for one layout; DDP copies its few numbers.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        devices = [self.device.index] if self.device.type == "cuda" else None
        self._run = self._run_eagerly
        self.forward_model = nn.parallel.DistributedDataParallel(
            self.model, device_ids=devices, gradient_as_bucket_view=True
        )
        try:
            yield
        finally:
            self.forward_model = self.model  # DDP's wrapper holds the process group


def _choose_dtype(precision: str, device: torch.device, model: nn.Module) -> torch.dtype:
    """Return the dtype for a precision; "auto" is float32 for depthwise convolutions on a CPU.

    PyTorch 2.15 has no fast bf16 kernel for their gradient there: of EfficientNet-Lite0 at 224×224 pixels on an EPYC of
    2024 forward and backward take 57 ms an image in bf16, and 46 in float32.
    """
    is_depthwise = any(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in model.modules())
    return choose_dtype("fp32" if precision == "auto" and device.type == "cpu" and is_depthwise else precision, device)


def _make_optimizer(model: nn.Module, config: ResolvedConfig, dtype: torch.dtype) -> torch.optim.Optimizer:
    """Return the optimiser of the settings; all layers before the class layer are slower by ``body_rate``."""
    body: list[nn.Parameter] = []
    if isinstance(model, models.Network):
        class_layer = f"{models.class_layer_name(model)}."
        body = [p for name, p in model.named_parameters() if not name.startswith(class_layer)]
    rates: dict[str, Any] = {"slower": body, "slower_rate": config.body_rate}
    # that of the first step, which is set then
    rates |= {"learning_rate": 0.0, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return adamw(model, betas=(0.9, 0.999), **rates)
    if config.optimizer == "muon":
        layers = [module for module in model.modules() if isinstance(module, StandardisedConv2d)]
        matrices = [p for layer in layers for name, p in layer.named_parameters() if name == "weight"]
        rates |= {"sgd_factor": MUON_SGD_FACTOR, "dtype": dtype}
        return muon(model, momentum=config.momentum, matrices=matrices, **rates)
    return sgd(model, momentum=config.momentum, **rates)


class DistributedDropout(nn.Dropout):
    """Dropout with the mask of one process for the whole batch, of which each process holds every n-th image.

    Each process draws the mask of the whole batch: so the losses do not depend on the number of processes.
    """

    def __init__(self, p: float, batch_size: int) -> None:
        super().__init__(p)
        self.batch_size = batch_size

    def forward(self, x: Tensor) -> Tensor:
        """Return x with some values set to zero while training, the others multiplied by 1 / (1 - p)."""
        if not self.training or self.p == 0:
            return x
        # the generator fills memory in its order, so the mask must lie in memory as x does
        layout = torch.channels_last if x.dim() == 4 and x.stride(1) == 1 else torch.contiguous_format
        ones = torch.ones((self.batch_size, *x.shape[1:]), dtype=x.dtype, device=x.device)
        mask = F.dropout(ones.contiguous(memory_format=layout), self.p)
        return x * mask[distributed.rank() :: distributed.world_size()][: len(x)]


def use_distributed_dropout(model: nn.Module, batch_size: int) -> None:
    """Replace every dropout of a network by `DistributedDropout`, in place."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Dropout):
                setattr(parent, name, DistributedDropout(child.p, batch_size))


def make_model(
    config: ResolvedConfig,
    *,
    channels: int,
    classes: int,
    size: int,
    weights: InitialWeights | None = None,
    on_note: Callable[[str], None] = lambda note: None,
) -> nn.Module:
    """Return a network for images (channels, size, size), with random weights unless others are given.

    Args:
        config: the settings.
        channels: of the images.
        classes: their number.
        size: height and width of the images, in pixels.
        weights: to begin with.
        on_note: called with a line that says what of the weights fits.

    Raises:
        UserError: the model is unknown, needs larger images, or does not have what the settings ask for; or the weights
            cannot be had, or are of another network.
    """
    options: dict[str, Any] = {"in_channels": channels, "dropout": config.dropout}
    is_mlpconv = config.model.startswith("nin_")
    if is_mlpconv:
        options["normalisation"] = None if config.normalisation == "none" else config.normalisation
        options["last_activation"] = config.last_activation
    for name in ("normalisation", "last_activation"):
        if not is_mlpconv and getattr(config, name) != "none":
            raise UserError(
                f"{name} must be none for {config.model}, got {getattr(config, name)}: nin_… networks have it"
            )
    if config.model not in models.MODELS:
        options["pretrained"] = config.pretrained
        if weights is not None and not weights.is_of_classifier:
            options["prepare"] = lambda network, layer: on_note(weights.load_into(network, layer))
    model = models.create(config.model, classes, **options)
    if weights is not None and "prepare" not in options:
        on_note(weights.load_into(model, models.class_layer_name(model)))
    for side in {size, config.train_size or size}:
        check_takes_images(model, config.model, channels=channels, classes=classes, size=side)
    return model


def check_takes_images(model: nn.Module, name: str, *, channels: int, classes: int, size: int) -> None:
    """Check that a network gives a score for each class of an image of that size.

    Raises:
        UserError: it does not.
    """
    smallest = getattr(model, "smallest_input", 1)
    if size < smallest:
        raise UserError(
            f"{name} needs images of at least {smallest}×{smallest} pixels, got {size}×{size}: "
            f"give a larger --size, or another --model ({', '.join(models.MODELS)})"
        )
    if not isinstance(model, models.ExternalClassifier):
        return
    shape, given = f"{channels}×{size}×{size}", "nin gives it one batch of images"
    with torch.no_grad(), explain_refused_images(model, name, shape, given=given):
        scores = model.eval()(torch.zeros(1, channels, size, size))
    if not isinstance(scores, Tensor) or scores.shape != (1, classes):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise UserError(f"{name} must give scores of shape (1, {classes}) for one image, got {got}")
