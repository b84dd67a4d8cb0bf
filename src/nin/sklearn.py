"""NiNClassifier: a scikit-learn estimator for images, and for tables as images of one pixel."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, check_random_state, column_or_1d, validate_data
from torch import Tensor, nn

from nin import data, models
from nin.config import ResolvedConfig, TrainConfig
from nin.data.arrays import to_nchw, to_squares
from nin.data.mixing import draw_mix, mix_batch, partner_positions
from nin.data.resizing import ResizeMode
from nin.errors import UserError
from nin.runtime.device import use_threads
from nin.training.batches import augmented_set, class_weights
from nin.training.step import TrainStep, make_model
from nin.value_checks import check_value

SKLEARN_BATCH_SIZE = 256

# The total number of steps for partial_fit, which does not know when it ends: the one-cycle schedule stays at its peak.
UNKNOWN_TOTAL_STEPS = 2**50

Array = NDArray[Any]


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class NiNClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn is not typed
    """A Network in Network for scikit-learn: images, or tables as images of one pixel.

    A table (n_samples, n_features) is taken as images of one pixel with n_features channels. There a network of 1×1
    convolutions is a multilayer perceptron, ``hidden_channels`` wide:
    ``score = W_L relu(… relu(W_1 z + b_1) …) + b_L``, where z are the features, each with mean 0 and variance 1.
    Images are (n_samples, H, W), (n_samples, H, W, C) or (n_samples, C, H, W), H = W unless ``resize`` is given, of any
    numbers; each channel is brought to mean 0 and variance 1.

    Args:
        model: for images, a name of `nin.models.MODELS`, or timm:NAME, torchvision:NAME, package.module:factory, with
            random weights; by their size if not given. Tables have no choice.
        hidden_channels: widths of the hidden layers, for tables; a number stands for one layer.
        epochs: passes over the samples; by their number if not given.
        batch_size: samples per step; by their number if not given.
        learning_rate: at the peak of the one-cycle schedule; `partial_fit` stays there. By the batch size if not given.
        weight_decay: per step, on weights only.
        label_smoothing: fraction of the target that is spread over all classes. `nin.train` takes 0.1; here 0 keeps
            `predict_proba` honest.
        dropout: after each pooling, for images; if not given, 0.2 for ``nin_digits`` and 0 for others.
        flip: mirror half of the images.
        shift: largest random translation, in pixels; by the size of the images if not given.
        augment: "none", "light" or "strong", for images, as in `nin.train`. What is done to the pixels of single images
            ("strong", and the random crops of images of 96 pixels and more) is for uint8, grey or RGB; "light" mirrors
            and translates all others.
        mixup: alpha of the Beta distribution of the shares in which samples are mixed in pairs, 0 for none.
        cutmix: likewise for a box of one image pasted into another.
        balance: what makes up for classes of unequal size, as in `nin.train`: "sampling" draws as many samples of each
            class in an epoch, "weights" counts the loss of a sample by the inverse of its class's size; if not given,
            nothing. It is for `fit`, which sees all samples.
        resize: how images that are no squares become some, of their shorter side: "crop", "squash", "letterbox" or
            `nin.data.ResizeOptions`; if not given, they are refused.
        device: "auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", "mps".
        precision: "fp32", "bf16", or "auto" for what is fastest here.
        random_state: a whole number for the same result every time, a RandomState, or None.

    Attributes:
        classes_: the labels, sorted, in the order of the scores.
        n_features_in_: columns of a table; for images, the size of the second axis as they were given.
        sample_shape_: (C, H, W) of a sample, (n_features, 1, 1) of a table.
        losses_: mean loss of each epoch.
        n_steps_: steps of the optimiser so far.

    Source:
        Lin, Chen, Yan: Network in Network, 2013, arXiv 1312.4400.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> NiNClassifier(epochs=20, random_state=0).fit(X, y).score(X, y) > 0.9
        True
    """

    # A dataclass writes the __init__ that scikit-learn asks for: it assigns the arguments, and checks them in `fit`.
    model: str | None = None
    hidden_channels: int | Sequence[int] = (64,)
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    dropout: float | None = None
    flip: bool = False
    shift: int | None = None
    augment: str = "light"
    mixup: float = 0.0
    cutmix: float = 0.0
    balance: str | None = None
    resize: data.ResizeOptions | ResizeMode | None = None
    device: str = "auto"
    precision: str = "fp32"
    random_state: Any = None

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Train from scratch.

        Args:
            X: a table (n_samples, n_features), or images (see the class).
            y: the class of each sample, numbers or strings.

        Returns:
            The estimator itself.

        Raises:
            ValueError: X and y do not fit together, there is only one class, or the loss is not finite.
        """
        samples, labels = self._validate(X, y, reset=True)
        self._initialize(samples, np.unique(labels))
        config = self._config
        steps_per_epoch = len(samples) // config.batch_size
        targets = self._targets(labels)
        if config.balance == "weights":
            self.train_step_.class_weights = class_weights(targets, len(self.classes_)).to(self.train_step_.device)
        with self._computing():
            for epoch in range(config.epochs):
                if config.balance == "sampling":
                    order = data.balanced_order(targets, seed=config.seed, epoch=epoch)
                else:
                    order = data.epoch_order(len(samples), seed=config.seed, epoch=epoch)
                order = order[: steps_per_epoch * config.batch_size]
                self._train_epoch(samples, targets, order, epoch=epoch, steps=config.epochs * steps_per_epoch)
        return self

    def partial_fit(self, X: ArrayLike, y: ArrayLike, classes: ArrayLike | None = None) -> Self:
        """Train for one epoch on these samples, in their order, at the full learning rate.

        Args:
            X: as for `fit`. The first call's samples decide mean and variance of the features.
            y: the class of each sample.
            classes: all classes of this and later calls; required in the first call.

        Returns:
            The estimator itself.

        Raises:
            ValueError: X and y do not fit together, a class is new, or ``balance`` is given.
        """
        if self.balance is not None:
            raise ValueError(f"balance goes by all samples, for fit: partial_fit takes None, got {self.balance!r}")
        first = not hasattr(self, "train_step_")
        samples, labels = self._validate(X, y, reset=first)
        if first:
            if classes is None:
                raise ValueError("classes must be given in the first call of partial_fit")
            self._initialize(samples, np.unique(np.asarray(classes)))
        elif classes is not None and not np.array_equal(np.unique(np.asarray(classes)), self.classes_):
            raise ValueError(f"classes must be those of the first call, {self.classes_}, got {classes}")
        with self._computing():
            order = torch.arange(len(samples))
            self._train_epoch(samples, self._targets(labels), order, epoch=len(self.losses_), steps=UNKNOWN_TOTAL_STEPS)
        return self

    def predict(self, X: ArrayLike) -> Array:
        """Return the most probable class of each sample, (n_samples,)."""
        scores = self._scores(X)  # first: it tells an estimator that was not fitted, which has no classes_
        return self.classes_[scores.argmax(1)]

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return the probability of each class, (n_samples, n_classes), in the order of ``classes_``."""
        return torch.from_numpy(self._scores(X)).softmax(1).numpy()

    def _scores(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return the scores before the softmax, (n_samples, n_classes)."""
        check_is_fitted(self)
        samples, _ = self._validate(X, None, reset=False)
        with self._computing(), torch.inference_mode():
            batches, model = samples.split(SKLEARN_BATCH_SIZE), self.train_step_.ema_model
            return torch.cat([model(self._inputs(batch)).double().cpu() for batch in batches]).numpy()

    def _initialize(self, samples: Tensor, classes: Array) -> None:
        """Make a new network for the shape of the samples, and measure the mean and variance of their channels."""
        if len(classes) < 2:
            raise ValueError(f"y must hold at least two classes, got one class: {classes[0]!r}")
        self.classes_ = classes
        self.sample_shape_ = tuple(samples.shape[1:])
        spread, mean = torch.var_mean(samples.double(), dim=(0, 2, 3), correction=0)
        self._mean, self._std = mean, torch.where(spread > 0, spread, 1.0).sqrt()
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self._config, self._widths = self._resolve(len(samples), seed), self._hidden_widths()
        with torch.random.fork_rng(devices=[]):
            self.train_step_ = TrainStep(self._make_network, self._config)
        self.losses_: list[float] = []
        self.n_steps_ = 0

    def _resolve(self, count: int, seed: int) -> ResolvedConfig:
        size = self.sample_shape_[1]
        if self.model is not None and size == 1:
            raise UserError(f"model is for images; a table takes hidden_channels, got model={self.model!r}")
        shift = data.default_shift(size) if size > 1 else 0
        if self.shift is not None:
            shift = check_value("shift", self.shift, int, lambda x: x >= 0, "at least 0 and finite")
        names = ("model", "epochs", "batch_size", "learning_rate", "weight_decay", "label_smoothing", "dropout")
        images_names = ("flip", "augment", "mixup", "cutmix", "balance", "device", "precision")
        given = {name: getattr(self, name) for name in (*names, *images_names)}
        if self.augment == "none":  # refuses a shift
            given["shift"] = self.shift
        config = TrainConfig(**given, seed=seed)
        if size == 1 and (config.augment == "strong" or config.cutmix):
            raise UserError('augment="strong" and cutmix are for images: give a table mixup alone')
        resolved = config.resolve(images=count, image_size=size, flip=False, shift=shift)
        return dataclasses.replace(resolved, batch_size=min(resolved.batch_size, count))

    def _hidden_widths(self) -> tuple[int, ...]:
        """Return the widths of the hidden layers."""
        given = self.hidden_channels
        is_several = isinstance(given, Sequence | np.ndarray) and not isinstance(given, str | bytes)
        widths = list(given) if is_several else [given]  # type: ignore[arg-type]  # checked in the next line
        return tuple(check_value("hidden_channels", n, int, lambda x: x >= 1, "at least 1") for n in widths)

    def _make_network(self) -> nn.Module:
        channels, size, _ = self.sample_shape_
        if size > 1:
            return make_model(self._config, channels=channels, classes=len(self.classes_), size=size)
        block = models.BlockConfig((*self._widths, len(self.classes_)), kernel_size=1)
        return models.NiN(models.NiNConfig("perceptron", channels, len(self.classes_), 1, (block,)))

    def _train_epoch(self, samples: Tensor, targets: Tensor, order: Tensor, *, epoch: int, steps: int) -> None:
        """Train on the samples in that order, and append the mean loss to ``losses_``."""
        config, total = self._config, 0.0
        # the warmup is a fraction of all steps, whose number is not known here
        self.train_step_.config = dataclasses.replace(config, warmup=0.0) if steps == UNKNOWN_TOTAL_STEPS else config
        for pixels, labels, indices in data.batches(
            self._augmented(samples, targets, epoch=epoch), order, config.batch_size
        ):
            if not self._crops(samples):
                pixels = data.augment(
                    pixels, indices, seed=config.seed, epoch=epoch, flip=config.flip, shift=config.shift
                )
            x, labels = self._inputs(pixels), labels.to(self.train_step_.device)
            if config.mixup or config.cutmix:
                step = self.n_steps_  # epochs of partial_fit may be of any length
                mix = draw_mix(mixup=config.mixup, cutmix=config.cutmix, seed=config.seed, epoch=0, step=step)
                rows = torch.arange(len(x), device=x.device)
                x, labels = mix_batch(x, labels, rows, partner_positions(rows, len(x)), mix, classes=len(self.classes_))
            loss = self.train_step_(x, labels, self.n_steps_, steps)[0].item()
            if not np.isfinite(loss):
                raise ValueError(f"the loss became {loss}: learning_rate must be lower than {config.learning_rate}")
            total += loss * len(indices)
            self.n_steps_ += 1
        self.losses_.append(total / len(order))

    def _crops(self, samples: Tensor) -> bool:
        """Return whether images are cropped at random."""
        return samples.dtype == torch.uint8 and self._config.crops(self.sample_shape_[1])

    def _augmented(self, samples: Tensor, targets: Tensor, *, epoch: int) -> data.ImageSet | data.DecodedSet:
        """Return the samples, augmented as far as that is done to single images."""
        images = data.ImageSet(samples, targets)
        if self._config.augment != "strong" and not self._crops(samples):
            return images
        if samples.dtype != torch.uint8:
            raise UserError(f'augment="strong" is for images of uint8, got {samples.dtype}: give those, or "light"')
        channels, size, _ = self.sample_shape_
        mean, std = (tuple((values / 255).tolist()) for values in (self._mean, self._std))
        named = data.Data("samples", images, images, (), channels, size, mean, std, flip=False, shift=0)
        return augmented_set(named, self._config, epoch=epoch)

    def _inputs(self, samples: Tensor) -> Tensor:
        """Return the network's input: each channel with mean 0 and variance 1, float32 (B, C, H, W)."""
        z = (samples.double() - self._mean.view(1, -1, 1, 1)) / self._std.view(1, -1, 1, 1)
        return z.to(self.train_step_.device, torch.float32)

    def _targets(self, labels: Array) -> Tensor:
        unknown = np.setdiff1d(labels, self.classes_)
        if len(unknown):
            raise ValueError(f"y must hold classes of {self.classes_}, got {unknown}")
        return torch.from_numpy(np.searchsorted(self.classes_, labels))

    def _validate(self, X: ArrayLike, y: ArrayLike | None, *, reset: bool) -> tuple[Tensor, Array]:
        """Return the samples (N, C, H, W) and the labels (N,); without labels for prediction."""
        images = np.asarray(X).ndim in (3, 4)
        options: dict[str, Any] = {"ensure_2d": not images, "allow_nd": images, "reset": reset}
        labels = np.empty(0)
        if y is None and not reset:
            values = validate_data(self, X, **options)
        else:
            values, given = validate_data(self, X, y, **options)
            check_classification_targets(given)
            labels = column_or_1d(given, warn=True)
        samples = _as_images(np.asarray(values), self.resize)
        if not reset and tuple(samples.shape[1:]) != self.sample_shape_:
            raise ValueError(f"X must hold samples (C, H, W) of {self.sample_shape_}, got {tuple(samples.shape[1:])}")
        return samples, labels

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Use the configured number of threads, and restore it and PyTorch's random state afterwards."""
        with use_threads(self._config.threads), torch.random.fork_rng(devices=[]):
            yield

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle: plain data, and the tensors as the bytes of a safetensors file."""
        state = dict(super().__getstate__())
        if "train_step_" in state:
            train_step = state.pop("train_step_")
            tensors = {**train_step.optimizer.state_dict(), "mean": state.pop("_mean"), "std": state.pop("_std")}
            plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
            state["_config"] = dataclasses.asdict(self._config)
            state["_file"] = save_tensors(plain)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Build the network from the state of `__getstate__`."""
        state = dict(state)
        file = state.pop("_file", None)
        super().__setstate__(state)
        if file is None:
            return
        tensors = load_tensors(file)
        self._mean, self._std = tensors.pop("mean"), tensors.pop("std")
        self._config = ResolvedConfig(**state["_config"])
        with torch.random.fork_rng(devices=[]):
            self.train_step_ = TrainStep(self._make_network, self._config)
        self.train_step_.optimizer.load_state_dict(tensors)


def _as_images(values: Array, resize: data.ResizeOptions | ResizeMode | None) -> Tensor:
    """Return samples as (N, C, H, W), those of a table as images of one pixel; uint8 stays, the rest becomes floats."""
    if values.ndim == 2:
        return torch.from_numpy(values.astype(np.float64))[:, :, None, None]
    if resize is not None:
        values = to_squares(values, data.ResizeOptions.of(resize))
    error = "X must hold square images (N, H, W), (N, H, W, C) or (N, C, H, W), got {shape}"
    images = to_nchw(values, error=error)
    return torch.from_numpy(images.astype(np.uint8 if images.dtype == np.uint8 else np.float32, order="C"))
