"""The losses and hits of the steps, copied from the device now and then, and summed over an epoch."""

import math
from pathlib import Path

import torch
from torch import Tensor

from nin.checkpoint import STATE_FILE
from nin.errors import UserError
from nin.training.state import Position


def loss_read_interval(device: torch.device) -> int:
    """Return the number of steps whose losses are read together: on a GPU many, as reading waits for all of them."""
    return 50 if device.type == "cuda" else 1


class LossReader:
    """Keeps the losses of the steps on their device until they are read.

    Args:
        interval: steps after which they are to be read.
        folder: the run folder that the training writes, or None.

    Attributes:
        last: the last loss that was read; NaN before the first one.
    """

    def __init__(self, interval: int, folder: Path | None = None) -> None:
        self.interval, self.folder, self.last = interval, folder, math.nan
        self._unread: list[tuple[Tensor, Tensor, int]] = []  # loss, hits, images of each step

    def add(self, loss: Tensor, hits: Tensor, images: int) -> bool:
        """Keep those of a step; return whether it is time to read."""
        self._unread.append((loss, hits, images))
        return len(self._unread) >= self.interval

    def read(self, p: Position, *, step: int, learning_rate: float) -> None:
        """Copy the losses and hits since the last time to the CPU, and add them to the epoch's sums.

        Args:
            p: where the training is; its sums are added to.
            step: steps done since the beginning, for messages.
            learning_rate: of the settings, likewise.

        Raises:
            UserError: a loss is no finite number.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return
        rows = torch.stack([torch.stack((loss.double(), hits.double())) for loss, hits, _ in unread]).tolist()
        for i, ((loss, hits), (_, _, images)) in enumerate(zip(rows, unread, strict=True)):
            if not math.isfinite(loss):
                is_written = self.folder is not None and (self.folder / STATE_FILE).exists()
                kept = f"; what was written to {self.folder} before is kept" if is_written else ""
                raise UserError(
                    f"the loss became {loss} at step {step - len(unread) + i + 1} (epoch {p.epoch + 1}){kept}. Try a "
                    f"lower --learning-rate than {learning_rate}"
                )
            p.loss_sum += loss * images
            p.hits += int(hits)
            p.seen += images
            self.last = loss
