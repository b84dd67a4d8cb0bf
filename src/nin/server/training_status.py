"""How far the training of a run folder is, from the files in it: for the page that follows it."""

import json
import time
from pathlib import Path
from typing import Any

from nin import checkpoint, epoch_metrics, folders
from nin.display.durations import duration
from nin.display.numbers import format_number_of, format_percent
from nin.display.training_curves import training_curves
from nin.server import schemas

# A step, or a test, may take long; a training that has said nothing for so long has been killed.
SECONDS_TO_SILENCE = 600.0


def is_begun(run: Path) -> bool:
    """Return whether a folder holds a training that has no network yet."""
    return not (run / checkpoint.CONFIG_FILE).exists() and any((run / name).exists() for name in folders.OF_BEGUN)


def is_unfinished(run: Path) -> bool:
    """Return whether the training of a run folder has not ended."""
    return (run / checkpoint.STATE_FILE).exists() or is_begun(run)


def training_status(run: Path) -> schemas.Training:
    """Return how far the training of a run folder is."""
    progress = _read_progress(run / checkpoint.PROGRESS_FILE)
    rows = epoch_metrics.read_csv(run / epoch_metrics.METRICS_FILE)
    done: dict[str, Any] = {"name": run.resolve().name, "charts": training_curves(rows), "epochs_done": len(rows)}
    if not is_unfinished(run):
        return schemas.Training(state="finished", text=_result_text(run, len(rows)), **done)
    if progress is None or time.time() - progress["updated"] > SECONDS_TO_SILENCE:
        text = f"Not finished, and not training: {len(rows)} epochs are done. The same command with --resume goes on."
        return schemas.Training(state="interrupted", text=text, **done)
    left = progress["seconds_left"]
    text = f"Training, epoch {progress['epoch']} of {progress['epochs']}, loss {progress['loss']:.3f}" + (
        f", {duration(left)} left" if left else ""
    )
    shown = {name: progress[name] for name in ("step", "steps", "note")}
    return schemas.Training(state="training", text=text, **shown, **done)


def _read_progress(path: Path) -> dict[str, Any] | None:
    """Return what `nin.training.progress` wrote, or None where there is nothing, or not yet the whole."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"updated": float, "epoch": int, "epochs": int, "step": int, "steps": int, "loss": float, "note": str}
        if not all(isinstance(values[name], kind) for name, kind in kinds.items()):
            return None
        return values if isinstance(values["seconds_left"], int | float | None) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _result_text(run: Path, epochs: int) -> str:
    accuracy = checkpoint.load_info(run).result.get("test_accuracy")
    text = f"Finished after {format_number_of(epochs, 'epoch')}"
    if accuracy is None:
        return f"{text}."
    return f"{text}: test accuracy {format_percent(accuracy)}."
