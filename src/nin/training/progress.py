"""How far a training is: for callbacks, for ``progress.json``, and when it will end."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nin.checkpoint import PROGRESS_FILE
from nin.display.pace import Pace
from nin.training.event_log import EventLog
from nin.training.plateau import plateau_note

# A page that shows it need not be newer, and a step takes less.
SECONDS_BETWEEN_FILES = 2.0


@dataclasses.dataclass(frozen=True)
class TrainProgress:
    """How far a training is, as ``on_progress`` is called with after every step and every epoch.

    Attributes:
        step: steps done, of ``steps``.
        steps: in the whole training; where it ends early, those that it had.
        epoch: the current one, from 1, of ``epochs``.
        epochs: in the whole training.
        loss: of the last step; NaN where nothing is trained yet.
        row: the epoch's metrics where one has just ended (see `nin.epoch_metrics`), else None.
        seconds_left: until all epochs are trained: at the pace of the later half of this session's steps, as the first
            ones take longer, and with the test of the last epoch after each; None before there are two steps.
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
        self.pace, self.step_seconds = Pace(), 0.0  # of this session's steps, without the tests between them
        self.marked_at: float | None = None  # when the last step or test ended
        self.test_seconds = 0.0  # after the last epoch

    def before_steps(self, phase: str, done: int, count: int, loss: float) -> None:
        """Report what comes before the first step; only to the callback, as it takes a minute at most."""
        self.on_progress(TrainProgress(done, count, 1, self.epochs, loss, phase=phase))

    def after_step(self, step: int, epoch: int, loss: float) -> None:
        """Report a step; the epoch is counted from 1."""
        self.step_seconds += self._seconds_since_mark()
        self.pace.add(step, self.step_seconds)
        self._report(
            TrainProgress(step, self.steps, epoch, self.epochs, loss, seconds_left=self._left(step, epoch - 1))
        )

    def after_epoch(self, step: int, metrics: Sequence[dict[str, float]], note: str = "") -> None:
        """Report the last epoch of the metrics, which ended with that step.

        Args:
            step: of the whole training.
            metrics: of all epochs.
            note: why the training ends with this epoch, where it is not the last one.
        """
        self.test_seconds = self._seconds_since_mark()
        if self.event_log is not None:
            self.event_log.write(metrics)
        if note:
            self.steps = step
        row, note = metrics[-1], note or plateau_note(metrics, self.epochs)
        self.note = note or self.note
        self._report(
            TrainProgress(
                step,
                self.steps,
                len(metrics),
                self.epochs,
                row["train_loss"],
                row,
                seconds_left=self._left(step, len(metrics)),
                note=note,
            )
        )

    def _seconds_since_mark(self) -> float:
        now = time.monotonic()
        seconds = 0.0 if self.marked_at is None else now - self.marked_at
        self.marked_at = now
        return seconds

    def _left(self, step: int, epochs_done: int) -> float | None:
        per_step = self.pace.seconds_per_step
        if step == self.steps:
            return 0.0
        return (
            None
            if per_step is None
            else per_step * (self.steps - step) + self.test_seconds * (self.epochs - epochs_done)
        )

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
