"""A training that is stopped after so many steps."""


def stop_after(count):
    """Return what `CheckpointOptions.stop` takes: it says so after that many steps, once.

    The parts of what comes before the first step count too: batches of features, steps of the range test.
    """
    steps = []

    def stop():
        steps.append(1)
        return len(steps) == count

    return stop
