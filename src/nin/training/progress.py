"""How far a training is: for callbacks, for ``progress.json``, and when it will end."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nin.checkpoint import PROGRESS_FILE
from nin.training.event_log import EventLog
from nin.training.plateau import plateau_note

# A page that shows it need not be newer, and a step takes less.
SECONDS_BETWEEN_FILES = 2.0


@dataclasses.dataclass(frozen=True)
class TrainProgress:
    """How far a training is, as ``on_progress`` is called with after every step and every epoch.

    Attributes:
        step: steps done, of ``steps``.
        steps: in the whole training.
        epoch: the current one, from 1, of ``epochs``.
        epochs: in the whole training.
        loss: of the last step; NaN where nothing is trained yet.
        row: the epoch's metrics where one has just ended (see `nin.epoch_metrics`), else None.
        seconds_left: until all epochs are trained, at the pace of the last epoch; of this session's steps before one
            has ended, and None before there are any.
        phase: what comes before the first step, in words, of which ``step`` of ``steps`` is done; "" in the epochs.
        note: what a person should know after this epoch, said once; else "".
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    row: dict[str, float] | None = None
    seconds_left: float | None = None
    note: str = ""
    phase: str = ""


class ProgressReporter:
    """Tells a callback, a file and TensorBoard how far a training is.

    Args:
        steps: in the whole training.
        epochs: in the whole training.
        folder: of the file; None writes none.
        event_log: of TensorBoard; None writes none.
        on_progress: called after every step and every epoch.
    """

    def __init__(
        self,
        steps: int,
        epochs: int,
        folder: Path | None,
        event_log: EventLog | None,
        on_progress: Callable[[TrainProgress], None],
    ) -> None:
        self.steps, self.epochs, self.event_log, self.on_progress = steps, epochs, event_log, on_progress
        self.path = None if folder is None else folder / PROGRESS_FILE
        self.note = ""  # the last one, for the file
        self.written_at = -SECONDS_BETWEEN_FILES
        self.epoch_mark: tuple[int, float] | None = None  # step and time when the last epoch ended
        self.session_mark: tuple[int, float] | None = None  # when the second step of this session began
        self.seconds_per_step: float | None = None

    def before_steps(self, phase: str, done: int, count: int, loss: float) -> None:
        """Report what comes before the first step; only to the callback, as it takes a minute at most."""
        self.on_progress(TrainProgress(done, count, 1, self.epochs, loss, phase=phase))

    def after_step(self, step: int, epoch: int, loss: float) -> None:
        """Report a step; the epoch is counted from 1."""
        now = time.monotonic()
        if self.session_mark is None:  # the first step also warms up
            self.session_mark = (step, now)
        elif self.epoch_mark is None or self.seconds_per_step is None:
            self.seconds_per_step = (now - self.session_mark[1]) / (step - self.session_mark[0])
        self._report(TrainProgress(step, self.steps, epoch, self.epochs, loss, seconds_left=self._left(step)))

    def after_epoch(self, step: int, metrics: Sequence[dict[str, float]]) -> None:
        """Report the last epoch of the metrics, which ended with that step."""
        now = time.monotonic()
        start = self.epoch_mark or self.session_mark
        if start is not None and step > start[0]:
            self.seconds_per_step = (now - start[1]) / (step - start[0])
        self.epoch_mark = (step, now)
        if self.event_log is not None:
            self.event_log.write(metrics)
        row, note = metrics[-1], plateau_note(metrics, self.epochs)
        self.note = note or self.note
        self._report(
            TrainProgress(
                step,
                self.steps,
                len(metrics),
                self.epochs,
                row["train_loss"],
                row,
                seconds_left=self._left(step),
                note=note,
            )
        )

    def _left(self, step: int) -> float | None:
        return None if self.seconds_per_step is None else self.seconds_per_step * (self.steps - step)

    def _report(self, progress: TrainProgress) -> None:
        if self.path is not None and (progress.row or time.monotonic() - self.written_at >= SECONDS_BETWEEN_FILES):
            self._write(self.path, progress)
        self.on_progress(progress)

    def _write(self, path: Path, progress: TrainProgress) -> None:
        """Write the file; not synced, as it is worth nothing after a crash."""
        self.written_at = time.monotonic()
        values: Mapping[str, object] = {
            **{name: value for name, value in vars(progress).items() if name != "row"},
            "note": self.note,
            "updated": time.time(),
        }
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text(json.dumps(values), encoding="utf-8")
        temporary.replace(path)

    def close(self) -> None:
        """Remove the file, and end TensorBoard's."""
        if self.event_log is not None:
            self.event_log.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)
