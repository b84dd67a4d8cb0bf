"""A training that is stopped after so many steps, and resumed."""

import pytest

from nin import training


def stop_after(count):
    """Return what `CheckpointOptions.stop` takes: it says so after that many steps, once.

    The parts of what comes before the first step count too: batches of features, steps of the range test.
    """
    steps = []

    def stop():
        steps.append(1)
        return len(steps) == count

    return stop


def check_resuming(images, config, folder, stop_at):
    """Train in one go, and stopped after so many steps and resumed, and compare all bits of weights and metrics."""
    training.train(images, config, out=folder / "whole")
    keeping = training.CheckpointOptions(stop=stop_after(stop_at))
    with pytest.raises(KeyboardInterrupt):
        training.train(images, config, out=folder / "run", keeping=keeping)
    training.train(images, config, out=folder / "run", keeping=training.CheckpointOptions(resume=True))
    for name in ("model.safetensors", "metrics.csv"):
        assert (folder / "run" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
