"""Early stopping: the best epoch by the validation images, its weights, and when to end."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from nin.display.numbers import format_number_of

# Before the names of the tensors of the best epoch in ``state.safetensors``.
PREFIX = "best."


def best_epoch(metrics: Sequence[Mapping[str, float]]) -> int:
    """Return the epoch, from 1, of the highest validation accuracy; of equal ones that of the lowest loss, the first.

    Args:
        metrics: at least one row, each of an epoch.
    """
    rows = enumerate(metrics, 1)
    return max(rows, key=lambda pair: (pair[1]["validation_accuracy"], -pair[1]["validation_loss"]))[0]


class EarlyStopping:
    """The weights of the best epoch so far, and whether the training is to end.

    Args:
        patience: epochs without a better one, after which the training ends; None never ends it and keeps nothing.

    Attributes:
        weights: parameters and buffers of the best epoch; None before the first has ended.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.weights: dict[str, Tensor] | None = None

    def is_over(self, metrics: Sequence[Mapping[str, float]]) -> bool:
        """Return whether the training is to end after the epochs of these metrics."""
        if self.patience is None or not metrics:
            return False
        return len(metrics) - best_epoch(metrics) >= self.patience

    def end_note(self, metrics: Sequence[Mapping[str, float]], epochs: int) -> str:
        """Return why a training of so many epochs ends after those of the metrics; "" where it does not end early."""
        if not self.is_over(metrics) or len(metrics) >= epochs:
            return ""
        best, since = best_epoch(metrics), format_number_of(self.patience or 0, "epoch")
        return (
            f"The training ends early, after {len(metrics)} of {epochs} epochs (patience {self.patience}): {since} "
            f"without a better one by the validation images. Epoch {best} is the best, and its weights are kept."
        )

    def keep_if_best(self, model: nn.Module, metrics: Sequence[Mapping[str, float]]) -> None:
        """Copy the weights of a model, if the last of the metrics is the best."""
        if self.patience and best_epoch(metrics) == len(metrics):
            self.weights = _copy(model)

    @contextlib.contextmanager
    def best_weights(self, model: nn.Module) -> Iterator[None]:
        """Give a model the weights of the best epoch within the block; its own where none are kept."""
        if self.weights is None:
            yield
            return
        own = _copy(model)
        model.load_state_dict(self.weights)
        try:
            yield
        finally:
            model.load_state_dict(own)

    def restore(self, model: nn.Module) -> None:
        """Give a model the weights of the best epoch; its own stay where none are kept."""
        if self.weights is not None:
            model.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors to save, with `PREFIX` before their names."""
        return {PREFIX + name: tensor for name, tensor in (self.weights or {}).items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take what `state_dict` returned out of the tensors of a saved state, and return the others."""
        own = {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}
        self.weights = own or None
        return {name: t for name, t in tensors.items() if not name.startswith(PREFIX)}


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
