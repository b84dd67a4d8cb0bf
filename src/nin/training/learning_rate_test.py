"""The learning rate by a range test: the loss while the rate grows from step to step, and a tenth of the best one."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from nin.config import ResolvedConfig
from nin.errors import UserError
from nin.runtime import distributed
from nin.training.step import TrainStep

# The lowest and the highest rate, by optimiser. AdamW's steps are as long as its rate, whatever the gradient, and no
# network learns at 0.1: one whose ReLUs have all died there can have a lower loss than before. Muon exchanges that part
# of each weight, and SGD beside it has twice the rate.
RANGE = {"sgd": (1e-4, 10.0), "adamw": (1e-6, 0.1), "muon": (1e-4, 2.0)}

# The test takes as many steps as fit into this time, at most so many, and at least so many.
SECONDS = 40.0
MOST_STEPS, FEWEST_STEPS = 100, 12

# Decay per step of the running mean of the loss; a loss of so many times the lowest ends the test.
SMOOTHING = 0.9
DIVERGENCE = 4.0

# The rate that is taken, in units of that of the lowest loss, at which the training is about to diverge.
FRACTION = 0.1


@dataclasses.dataclass(frozen=True)
class LearningRateTest:
    """What a range test found.

    Attributes:
        rates: of each step, growing.
        losses: the running means of the loss, without the steps before.
        learning_rate: a tenth of the rate of the lowest one.

    Source:
        Smith: Cyclical Learning Rates for Training Neural Networks, 2015, arXiv 1506.01186, section 3.3, for the test;
        Howard, Gugger: fastai, 2020, arXiv 2002.04688, for the running mean and the tenth.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    learning_rate: float

    @classmethod
    def of(cls, rates: Sequence[float], losses: Sequence[float]) -> "LearningRateTest":
        """Return the choice from the loss of each step.

        Raises:
            UserError: no loss is a finite number.
        """
        smoothed, mean = list[float](), 0.0
        for step, loss in enumerate(losses, 1):
            mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
            smoothed.append(mean / (1 - SMOOTHING**step))
        finite = [(loss, rate) for loss, rate in zip(smoothed, rates, strict=True) if math.isfinite(loss)]
        if not finite:
            raise UserError("learning_rate auto: the loss is no finite number at any rate; give a number")
        _, best = min(finite)
        return cls(tuple(rates), tuple(smoothed), float(f"{FRACTION * best:.2g}"))


def find_learning_rate(
    train_step: TrainStep,
    config: ResolvedConfig,
    batches: Iterable[tuple[Tensor, Tensor]],
    on_progress: Callable[[int, int, float], None],
) -> LearningRateTest:
    """Train at rates that grow from step to step, undo it, and return what was found. It takes less than a minute.

    Args:
        train_step: the network and its optimiser, which are as before at the end.
        config: the training settings.
        batches: as many as are asked for; this process's part of each.
        on_progress: called with the steps done, their number, and the loss.

    Raises:
        UserError: no loss is a finite number, or there is no batch.
    """
    before = {name: tensor.clone() for name, tensor in train_step.optimizer.state_dict().items()}
    lowest, highest = RANGE[config.optimizer]
    rates, losses = list[float](), list[float]()
    count, started = 0, 0.0
    try:
        for number, (x, labels) in enumerate(batches):
            if number == 0:  # the first step is slower than the others
                train_step.step_at(x, labels, learning_rate=lowest, step=0)
                started = time.perf_counter()
                continue
            rate = lowest * (highest / lowest) ** (len(rates) / ((count or MOST_STEPS) - 1))
            losses.append(train_step.step_at(x, labels, learning_rate=rate, step=number)[0].item())
            rates.append(rate)
            if not count:
                count = _step_count(time.perf_counter() - started)
            on_progress(len(rates), count, losses[-1])
            found = LearningRateTest.of(rates, losses) if math.isfinite(losses[-1]) else None
            if found is None or len(rates) == count or found.losses[-1] > DIVERGENCE * min(found.losses):
                break
        return LearningRateTest.of(rates, losses)
    finally:
        train_step.optimizer.load_state_dict(before)


def _step_count(seconds: float) -> int:
    """Return the number of steps, from the time that one takes; that of rank 0 counts for all processes."""
    longest = float(distributed.broadcast_result(lambda: str(seconds)))
    return max(FEWEST_STEPS, min(MOST_STEPS, int(SECONDS / longest)))
