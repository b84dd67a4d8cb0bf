"""TensorBoard's event files: the figures of metrics.csv, for each epoch."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nin.errors import UserError
from nin.folders import EVENTS_FOLDER
from nin.version import install_command


class EventLog:
    """Event files in the folder ``tensorboard`` of a run folder.

    They are made anew from the rows of all epochs whenever a training goes on, so that no epoch is in them twice and
    none is missing, whenever it was interrupted; what TensorBoard has read already it takes back.

    Args:
        folder: the run folder.

    Raises:
        UserError: the package tensorboard is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.make_writer = folder / EVENTS_FOLDER, import_writer()
        self.writer: Any = None

    def write(self, metrics: Sequence[Mapping[str, float]]) -> None:
        """Write the epochs that are not written yet, the first time all of them, and flush."""
        rows = metrics[-1:]
        if self.writer is None:
            for path in self.folder.glob("events.out.tfevents.*"):
                path.unlink()
            # from the first step on, what was read from the files before is void
            self.writer, rows = self.make_writer(str(self.folder), purge_step=0), metrics
        ended = time.time()
        for row in rows:
            # as long ago as the training's own clock says
            seconds = ended - (metrics[-1]["seconds"] - row["seconds"])
            for name, value in row.items():
                if name not in ("step", "seconds"):
                    self.writer.add_scalar(_tag(name), value, int(row["step"]), walltime=seconds)
        self.writer.flush()

    def close(self) -> None:
        """End the writer's thread."""
        if self.writer is not None:
            self.writer.close()


def import_writer() -> Any:
    """Return TensorBoard's class that writes the files.

    Raises:
        UserError: the package tensorboard is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"TensorBoard's files need: {install_command('tensorboard')}") from error
    return SummaryWriter


def _tag(name: str) -> str:
    """Return a figure's tag, by which TensorBoard groups: "test/accuracy" for "test_accuracy"."""
    part, _, figure = name.partition("_")
    return f"{part}/{figure}" if part in ("train", "test", "validation") else name
