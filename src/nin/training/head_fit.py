"""Fit the class layer to the features of a frozen network: multinomial logistic regression, by L-BFGS.

The features of a body that does not change need computing only once, so this takes as long as looking at the images.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nin import data, models
from nin.config import ResolvedConfig
from nin.errors import UserError
from nin.layers import Conv1x1
from nin.ops import ACTIVATIONS
from nin.runtime import distributed

# Before an image is seen, a score has this standard deviation: the Gaussian prior of each weight has this one, over the
# root of the number of features, of features with the variance 1. Five-fold cross-validation on 660 photos with 1,280
# features: 83.9 % with 1.5, 85.5 % with 2.5, 84.1 % with 5, 82.7 % with 8.
PRIOR_DEVIATION = 2.5

# Features that are held; of more images every n-th is taken.
MAX_FEATURE_BYTES = 4 << 30

FEATURE_BATCH_SIZE = 64
MAX_ITERATIONS = 200


@dataclasses.dataclass(frozen=True)
class HeadFit:
    """What the fitted class layer does on the images that it was fitted to.

    Attributes:
        loss: the mean cross entropy.
        hits: images that it classifies right.
        images: their number; of mirrored ones both count.
    """

    loss: float
    hits: int
    images: int


def no_fit_reason(model: nn.Module) -> str:
    """Return why the class layer of a network cannot be fitted alone; empty where it can."""
    if isinstance(model, models.Network) and isinstance(class_layer(model), nn.Linear | nn.Conv2d | Conv1x1):
        return ""
    return "its class layer cannot be told from the rest"


def class_layer(model: nn.Module) -> nn.Module:
    """Return the layer that gives the scores or the class maps of one of nin's networks."""
    return model.get_submodule(models.class_layer_name(model))


@torch.no_grad()
def class_layer_input(model: nn.Module, x: Tensor) -> Tensor:
    """Return what the class layer is given for images: (B, D), or (B, D, h, w) where an activation stands between."""
    layer, inputs = class_layer(model), list[Tensor]()
    with layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0])):
        model(x)
    (features,) = inputs
    if features.dim() == 4 and (_activation(model) == "none" or features.shape[2:] == (1, 1)):
        return features.mean((2, 3))
    return features


def fit_class_layer(
    model: nn.Module,
    images: data.Data,
    config: ResolvedConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    class_weights: Tensor | None = None,
    on_lost: Callable[[str, str], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> HeadFit:
    """Fit the class layer of a network to the training images, in place; several processes share the images.

    It minimises the mean cross entropy, with the label smoothing and the class weights of the training, plus the
    negative logarithm of a Gaussian prior. The images are not augmented, but for the mirrored ones.

    Args:
        model: one of nin's networks, on ``device``; the other layers stay as they are.
        images: the data set.
        config: the training settings.
        device: where to compute.
        dtype: of the autocast; float32 for none.
        class_weights: what the loss of an image of each class counts, (classes,); None counts all alike.
        on_lost: called for files that cannot be read any more, see `nin.data.batches`.
        on_progress: called with the number of images that this process has seen, and has to see.

    Raises:
        UserError: `no_fit_reason`, or no image can be read.
    """
    reason = no_fit_reason(model)
    if reason:
        raise UserError(f"freeze: {config.model} cannot be trained so: {reason}")
    model.eval()
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        features, labels = _features(model, images, config, device, on_lost, on_progress or (lambda *_: None))
    weights = torch.ones(len(images.classes), device=device) if class_weights is None else class_weights
    layer = cast(nn.Conv2d, class_layer(model))
    regression = _Regression(features, labels, weights[labels], layer, _activation(model))
    regression.minimise(config.label_smoothing)
    regression.write(layer)
    distributed.broadcast_model(layer)  # where the processes' machines differ
    loss, hits = regression.result()
    return HeadFit(loss, hits, len(labels))


class _Regression:
    """The minimisation, on features with the mean 0 and the variance 1, in which L-BFGS takes tens of steps.

    Args:
        features: (N, D) or (N, D, h, w).
        labels: (N,).
        counts: what the loss of each image counts, (N,).
        layer: that gives scores or class maps.
        activation: of the layer, before the maps' pixels are averaged.
    """

    def __init__(self, features: Tensor, labels: Tensor, counts: Tensor, layer: nn.Conv2d, activation: str) -> None:
        self.labels, self.counts, self.activation = labels, counts, activation
        axes = [0, *range(2, features.dim())]
        deviation, self.mean = torch.std_mean(features, axes, correction=0)
        self.deviation = deviation.clamp(min=1e-6)  # a feature that no image has
        shape = (-1, *[1] * (features.dim() - 2))
        self.features = (features - self.mean.view(shape)) / self.deviation.view(shape)
        options: dict[str, Any] = {"device": features.device, "requires_grad": True}
        self.weight = torch.zeros(layer.weight.shape[0], features.shape[1], **options)
        self.bias = torch.zeros(layer.weight.shape[0], **options)
        # without a bias of its own the layer cannot take the means away
        self.has_bias = layer.bias is not None
        if not self.has_bias:
            self.features, self.mean = features / self.deviation.view(shape), torch.zeros_like(self.mean)

    def scores(self) -> Tensor:
        """Return the scores (N, classes)."""
        if self.features.dim() == 2:
            return ACTIVATIONS[self.activation](F.linear(self.features, self.weight, self.bias))
        maps = F.conv2d(self.features, self.weight[:, :, None, None], self.bias)
        return ACTIVATIONS[self.activation](maps).mean((2, 3))

    def loss(self, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean cross entropy."""
        losses = F.cross_entropy(self.scores(), self.labels, label_smoothing=label_smoothing, reduction="none")
        return (losses * self.counts).sum() / self.counts.sum()

    def minimise(self, label_smoothing: float) -> None:
        """Find weight and bias."""
        parameters = [self.weight, self.bias] if self.has_bias else [self.weight]
        optimizer = torch.optim.LBFGS(parameters, max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")
        if self.activation != "none":  # at zero a ReLU's gradient is zero
            nn.init.constant_(self.bias, 1.0)
        precision = self.weight.shape[1] / PRIOR_DEVIATION**2 / len(self.labels)

        def objective() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(label_smoothing) + precision / 2 * self.weight.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(objective)

    @torch.no_grad()
    def write(self, layer: nn.Conv2d) -> None:
        """Give weight and bias to a layer that is given features as they are."""
        weight = self.weight / self.deviation
        layer.weight.copy_(weight.view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.copy_(self.bias - weight @ self.mean)

    @torch.no_grad()
    def result(self) -> tuple[float, int]:
        """Return the loss and the number of hits."""
        return self.loss().item(), int((self.scores().argmax(1) == self.labels).sum())


def _activation(model: nn.Module) -> str:
    """Return the activation between the class layer and the pooling of its maps."""
    if isinstance(model, models.NiN):
        return model.config.last_activation or "none"
    return getattr(class_layer(model), "activation", None) or "none"


def _features(
    model: nn.Module,
    images: data.Data,
    config: ResolvedConfig,
    device: torch.device,
    on_lost: Callable[[str, str], None] | None,
    on_progress: Callable[[int, int], None],
) -> tuple[Tensor, Tensor]:
    """Return the features of the training images and of the mirrored ones, and their labels."""
    size, channels = images.size, images.channels
    one = class_layer_input(model, torch.zeros(1, channels, size, size, device=device))
    views = 2 if config.flip else 1
    held = max(1, MAX_FEATURE_BYTES // (one[0].nbytes * views))
    stride = -(-len(images.train) // held)
    order = torch.arange(0, len(images.train), stride)
    if stride > 1 and distributed.rank() == 0:
        warnings.warn(
            f"the class layer is fitted to {len(order):,} of the {len(images.train):,} training images: the features "
            f"of all would take more than {MAX_FEATURE_BYTES >> 30} GiB",
            stacklevel=2,
        )
    own = order[distributed.rank() :: distributed.world_size()]
    features = torch.zeros(len(order), views, *one.shape[1:], device=device)
    labels = torch.full((len(order),), -1, device=device)
    seen = 0
    for pixels, batch_labels, indices in data.batches(images.train, own, FEATURE_BATCH_SIZE, on_lost=on_lost):
        x = data.to_float(pixels.to(device), images.mean, images.std, dtype=torch.float32)
        rows = (indices // stride).to(device)
        for view in range(views):
            features[rows, view] = class_layer_input(model, x.flip(3) if view else x).float()
        labels[rows] = batch_labels.to(device)
        seen += len(rows)
        on_progress(seen, len(own))
    if distributed.world_size() > 1:
        features, labels = distributed.all_reduce_sum(features), distributed.all_reduce_sum(labels + 1) - 1
    read = labels >= 0
    if not read.any():
        raise UserError("no training image can be read any more")
    return features[read].flatten(0, 1), labels[read].repeat_interleave(views)
