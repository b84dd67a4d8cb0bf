"""Whether a training has stopped learning."""

import math
from collections.abc import Mapping, Sequence

# An epoch more or less says nothing: so many must stand still, and at least this fraction of all.
MIN_EPOCHS, FRACTION = 10, 0.2

# A training loss that falls by less in all these epochs together stands still.
LEAST_FALL = 0.01

# From here on hardly an image is left to learn from.
BY_HEART = 0.995


def plateau_note(metrics: Sequence[Mapping[str, float]], epochs: int) -> str:
    """Return a sentence where the training has stopped learning with the last of these epochs, else "".

    With validation images it has where neither their accuracy nor their loss has been better than before for max(10,
    epochs / 5) epochs. Without, where for as many epochs the training loss has fallen by less than 1 % and the
    training accuracy has not risen, or 99.5 % of the training images were right in each. It is said once.

    Args:
        metrics: the rows of the epochs so far.
        epochs: of the whole training.
    """
    window = max(MIN_EPOCHS, math.ceil(FRACTION * epochs))
    reasons = (_reason(metrics[:count], window) for count in range(window + 1, len(metrics)))
    return "" if any(reasons) else _reason(metrics, window)


def _reason(metrics: Sequence[Mapping[str, float]], window: int) -> str:
    """Return why the last epochs stand still, or "" where they do not."""
    before, last = metrics[:-window], metrics[-window:]
    if not before:
        return ""

    def best(rows: Sequence[Mapping[str, float]], name: str) -> float:
        return min(row[name] for row in rows) if name.endswith("loss") else max(row[name] for row in rows)

    if "validation_loss" in metrics[0]:
        is_better = best(last, "validation_accuracy") > best(before, "validation_accuracy")
        if is_better or best(last, "validation_loss") < best(before, "validation_loss"):
            return ""
        return (
            f"It has stopped learning: for {window} epochs neither accuracy nor loss of the validation images has been "
            "better than before. --patience ends a training by that, and keeps the best epoch"
        )
    if min(row["train_accuracy"] for row in last) >= BY_HEART:
        return (
            f"It has stopped learning: for {window} epochs it has known at least {100 * BY_HEART:g} % of the training "
            "images by heart. More images or stronger augmentation would teach it more; fewer epochs would do"
        )
    falls = best(last, "train_loss") < (1 - LEAST_FALL) * best(before, "train_loss")
    if falls or best(last, "train_accuracy") > best(before, "train_accuracy"):
        return ""
    return (
        f"It has stopped learning: for {window} epochs the training loss has fallen by less than "
        f"{100 * LEAST_FALL:g} %, and the training accuracy has not risen. Another learning rate may help"
    )
