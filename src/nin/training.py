"""Training: one loop, from `nin.data` and a `nin.recipe.TrainConfig` to a run folder."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import io
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nin import checkpoint, data, models
from nin.checkpoint import Preprocessing, RunInfo
from nin.errors import UserError
from nin.recipe import ResolvedConfig, TrainConfig

TEST_BATCH = 250


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a training is; what `train` tells its ``on_progress`` after every step and every epoch.

    Attributes:
        step: steps done, of ``steps``.
        steps: in the whole training.
        epoch: the current one, from 1, of ``epochs``.
        epochs: in the whole training.
        loss: of the last step.
        row: the line of ``metrics.csv`` where an epoch has just ended, else None.
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    row: dict[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a training left.

    Attributes:
        model: the averaged weights, in evaluation mode.
        info: what ``config.json`` says; its ``result`` has the test accuracy and its interval.
        metrics: one row per epoch, as in ``metrics.csv``.
        out: the run folder, or None.
    """

    model: nn.Module
    info: RunInfo
    metrics: list[dict[str, float]]
    out: Path | None


def train(
    source: Any,
    config: TrainConfig | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Train a network on images and test it.

    Args:
        source: a `nin.data.Data`, or whatever `nin.data.load` takes: "digits", a folder, arrays.
        config: the recipe; the default one chooses what is None from the data.
        out: the run folder to make: ``model.safetensors``, ``config.json``, ``metrics.csv``. None writes nothing.
        resume: go on with the training that was interrupted in ``out``.
        on_progress: called after every step and every epoch.

    Returns:
        The network with averaged weights, and its test accuracy with a 95 % interval.

    Raises:
        UserError: the data, the model and the recipe do not fit together, the loss is no number any more, or there
            is nothing to resume; one line that says what to do.
        OSError: the run folder cannot be written; it names the file.

    Example:
        >>> nin.train("digits", nin.TrainConfig(epochs=1)).info.result["test_images"]
        451
    """
    images = source if isinstance(source, data.Data) else data.load(source)
    recipe = (config or TrainConfig()).resolve(
        images=len(images.train), image_size=images.size, flip=images.flip, shift=images.shift
    )
    keep_freed_memory()
    with use_threads(recipe.threads):
        return _train(images, recipe, None if out is None else Path(out), resume, on_progress)


def _train(
    images: data.Data,
    recipe: ResolvedConfig,
    folder: Path | None,
    resume: bool,
    on_progress: Callable[[Progress], None] | None,
) -> TrainResult:
    run = _Run(images, recipe, folder)
    if folder is not None:
        prepare_folder(folder, resume=resume)
    if resume:
        run.load_state()
    try:
        while run.epoch < recipe.epochs:
            run.train_epoch(on_progress)
        return run.finish()
    finally:
        if folder is not None and not any(folder.iterdir()):  # stopped before the first epoch's end
            folder.rmdir()


class _Run:
    """The state of one training: what a checkpoint must hold is in ``model``, ``average``, ``optimizer``, ``epoch``."""

    def __init__(self, images: data.Data, config: ResolvedConfig, folder: Path | None) -> None:
        self.images, self.config, self.folder = images, config, folder
        self.device = choose_device(config.device)
        self.dtype = choose_dtype(config.precision, self.device)
        torch.manual_seed(config.seed)
        self.model = self.place(make_model(images, config))
        # The average lives in a second network, so that testing it needs no swapping of weights.
        self.average = self.place(make_model(images, config)).eval()
        self.average.load_state_dict(self.model.state_dict())
        self.optimizer = make_optimizer(self.model, config)
        self.steps_per_epoch = max(1, len(images.train) // config.batch_size)
        self.steps = self.steps_per_epoch * config.epochs
        self.epoch, self.seconds = 0, 0.0
        self.metrics: list[dict[str, float]] = []

    def place(self, model: nn.Module) -> nn.Module:
        """Return the network on the run's device, with its filters' channels side by side in memory."""
        return model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def train_epoch(self, on_progress: Callable[[Progress], None] | None) -> None:
        """Make one pass over the training images, test, and write what there is."""
        started = time.perf_counter()
        loss_sum, hits, seen = 0.0, 0, 0
        self.model.train()
        for i, (x, labels) in enumerate(self.batches()):
            step = self.epoch * self.steps_per_epoch + i
            loss, scores = self.train_step(x, labels, step)
            loss_sum, seen = loss_sum + loss * len(labels), seen + len(labels)
            hits += int((scores.argmax(1) == labels).sum())
            if on_progress:
                on_progress(Progress(step + 1, self.steps, self.epoch + 1, self.config.epochs, loss))
        trained = time.perf_counter() - started
        test_loss, test_hits = self.test(dtype=self.dtype)
        self.epoch += 1
        self.seconds += time.perf_counter() - started
        row = {
            "epoch": self.epoch,
            "step": self.epoch * self.steps_per_epoch,
            "learning_rate": learning_rate(self.epoch * self.steps_per_epoch - 1, self.steps, self.config),
            "train_loss": loss_sum / seen,
            "train_accuracy": hits / seen,
            "test_loss": test_loss,
            "test_accuracy": test_hits / len(self.images.test),
            "images_per_second": seen / trained,
            "seconds": self.seconds,
        }
        self.metrics.append(row)
        if self.folder is not None:
            self.save(self.folder)
        if on_progress:
            on_progress(
                Progress(
                    self.epoch * self.steps_per_epoch,
                    self.steps,
                    self.epoch,
                    self.config.epochs,
                    row["train_loss"],
                    row,
                )
            )

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this epoch's augmented images (B, C, H, W), as the network takes them, and their labels (B,)."""
        config, images = self.config, self.images
        order = data.epoch_order(len(images.train), seed=config.seed, epoch=self.epoch)
        # The rest that fills no batch is left out: another one in every epoch.
        order = order[: max(1, len(order) // config.batch_size) * config.batch_size]
        for pixels, labels, indices in data.batches(images.train, order, config.batch_size):
            pixels, indices = pixels.to(self.device), indices.to(self.device)
            pixels = data.augment(
                pixels, indices, seed=config.seed, epoch=self.epoch, flip=config.flip, shift=config.shift
            )
            yield data.to_float(pixels, images.mean, images.std, dtype=torch.float32), labels.to(self.device)

    def train_step(self, x: Tensor, labels: Tensor, step: int) -> tuple[float, Tensor]:
        """Take one step of the optimiser; return the loss and the scores (B, classes)."""
        config = self.config
        torch.manual_seed(config.seed * 1_000_003 + step)  # dropout, as a function of (seed, step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.steps, config)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            scores = self.model(x)
        scores = scores.float()
        loss = F.cross_entropy(scores, labels, label_smoothing=config.label_smoothing)
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(
                f"the loss became {value} at step {step + 1} (epoch {self.epoch + 1}); the weights of "
                f"epoch {self.epoch} are kept. Try a lower learning_rate than {config.learning_rate}"
            )
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_clip)
        self.optimizer.step()
        self.update_average(step)
        return value, scores.detach()

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """Move the averaged weights towards the current ones; quickly in the first steps."""
        decay = min(self.config.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)

    def test(self, *, dtype: torch.dtype, flip: bool = False) -> tuple[float, int]:
        """Return the mean cross entropy and the number of right answers of the averaged weights on the test images."""
        scores, labels = evaluate(self.average, self.images, device=self.device, dtype=dtype, flip=flip)
        return F.cross_entropy(scores, labels).item(), int((scores.argmax(1) == labels).sum())

    def save(self, folder: Path) -> None:
        """Write the training state, then the model and the metrics so far."""
        checkpoint.save_state(folder, self.state_tensors(), self.state_values())
        checkpoint.save_model(folder, self.average, self.info({}))
        checkpoint.write_atomically(folder / checkpoint.METRICS_FILE, metrics_csv(self.metrics))

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the weights, their averages and the optimiser's momentum, by name."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for name, p in self.model.named_parameters():
            if "momentum_buffer" in self.optimizer.state[p]:
                tensors[f"momentum.{name}"] = self.optimizer.state[p]["momentum_buffer"]
        return tensors

    def state_values(self) -> dict[str, Any]:
        """Return the rest of the state: numbers and settings."""
        return {
            "epoch": self.epoch,
            "seconds": self.seconds,
            "metrics": self.metrics,
            "recipe": dataclasses.asdict(self.config),
            "data": self.data_info(),
        }

    def load_state(self) -> None:
        """Go back to the last epoch that was written to the folder.

        Raises:
            UserError: there is no state, or it belongs to other settings or data.
        """
        assert self.folder is not None
        tensors, values = checkpoint.load_state(self.folder)
        for kind, now in (("recipe", dataclasses.asdict(self.config)), ("data", self.data_info())):
            for name, before in values[kind].items():
                if now.get(name) != before:
                    raise UserError(
                        f"{self.folder} was trained with {name}={before}, got {name}={now.get(name)}: give the same"
                    )
        for network, prefix in ((self.model, "model."), (self.average, "average.")):
            network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        for name, p in self.model.named_parameters():
            if f"momentum.{name}" in tensors:
                buffer = torch.empty_like(p).copy_(tensors[f"momentum.{name}"])
                self.optimizer.state[p]["momentum_buffer"] = buffer
        self.epoch, self.seconds, self.metrics = values["epoch"], values["seconds"], values["metrics"]

    def finish(self) -> TrainResult:
        """Test in float32, as the network is used, and write the result.

        Where mirroring is allowed, test with a mirrored second view as well.
        """
        count = len(self.images.test)
        loss, hits = self.test(dtype=torch.float32)
        result: dict[str, Any] = {
            "test_accuracy": hits / count,
            "test_accuracy_interval": wilson_interval(hits, count),
            "test_images": count,
            "test_loss": loss,
            "seconds": self.seconds,
        }
        if self.config.flip:
            _, hits = self.test(dtype=torch.float32, flip=True)
            result["test_accuracy_flip"] = hits / count
            result["test_accuracy_flip_interval"] = wilson_interval(hits, count)
        info = self.info(result)
        if self.folder is not None:
            checkpoint.save_model(self.folder, self.average, info)
            checkpoint.remove_state(self.folder)
        return TrainResult(self.average, info, self.metrics, self.folder)

    def info(self, result: dict[str, Any]) -> RunInfo:
        """Return what ``config.json`` says."""
        images = self.images
        return RunInfo(
            model=checkpoint.describe_model(self.average),
            classes=images.classes,
            preprocessing=Preprocessing(images.size, images.channels, images.mean, images.std),
            recipe={**dataclasses.asdict(self.config), "precision": "fp32" if self.dtype == torch.float32 else "bf16"},
            data=self.data_info(),
            result=result,
            environment=checkpoint.environment(),
        )

    def data_info(self) -> dict[str, Any]:
        """Return what the run was trained on."""
        images = self.images
        return {
            "name": images.name,
            "train_images": len(images.train),
            "test_images": len(images.test),
            "skipped": [list(pair) for pair in images.skipped],
            "notes": list(images.notes),
            **images.origin,
        }


@torch.no_grad()
def evaluate(
    model: nn.Module, images: data.Data, *, device: torch.device, dtype: torch.dtype, flip: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the scores (N, classes) of the test images, in fp32 on the CPU, and their labels (N,).

    With ``flip``, the scores are the mean over each image and its mirror image.
    """
    scores, labels = [], []
    for pixels, batch_labels, _ in data.batches(images.test, torch.arange(len(images.test)), TEST_BATCH):
        x = data.to_float(pixels.to(device), images.mean, images.std, dtype=torch.float32)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            y = model(x).float()
            if flip:
                y = (y + model(x.flip(3)).float()) / 2
        scores.append(y.cpu())
        labels.append(batch_labels)
    return torch.cat(scores), torch.cat(labels)


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


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """Return SGD with Nesterov momentum; weight decay on the weights, not on biases and gains (one-dimensional)."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(
        groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0, fused=True
    )


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Return the one-cycle schedule: up in a straight line, down along a cosine.

    Source:
        Smith, Topin: Super-Convergence, 2017, arXiv 1708.07120.
    """
    rise = max(1.0, config.warmup * steps)
    if step < rise:
        return config.learning_rate * (step + 1) / (rise + 1)
    progress = (step - rise) / max(1.0, steps - rise)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def choose_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is a GPU where there is one.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device must be auto, cpu or a GPU of this machine, got {name!r}") from error
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the type that convolutions multiply in: bf16 where the processor has instructions for it, else fp32."""
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else cpu_multiplies_bf16()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def cpu_multiplies_bf16() -> bool:
    """Return whether this processor has matrix instructions for bf16 (AVX-512 BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a proportion.

    Source:
        Wilson: Probable inference, the law of succession, and statistical inference, 1927.
    """
    z, p = 1.959964, hits / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return centre - half, centre + half


@contextlib.contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """Compute on that many threads, and on as many as before afterwards; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks for the next step instead of giving them back to the system.

    Without it every step pays for the page faults of its activations again, a third to a half of the time. It
    holds for the whole process; on other systems there is nothing to do.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # a C library other than glibc
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 256 * 2**20)


def prepare_folder(out: Path, *, resume: bool) -> None:
    """Make the run folder.

    Raises:
        UserError: it holds another run, or something that is no run.
        OSError: it cannot be made.
    """
    if resume:
        return
    if (out / checkpoint.STATE_FILE).exists():
        raise UserError(f"{out} holds an unfinished run: go on with --resume, or give another --out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: give another --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)


def metrics_csv(rows: list[dict[str, float]]) -> str:
    """Return the rows as CSV text with a header line."""
    text = io.StringIO()
    text.write(",".join(rows[0]) + "\n")
    for row in rows:
        text.write(",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values()) + "\n")
    return text.getvalue()
