"""The forms of a network that are compared: as it is, and narrowed to shares of its multiplications."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from torch import nn

from nin.models.narrowing_plan import Plan
from nin.narrowing.options import NarrowOptions
from nin.narrowing.pipeline import narrow
from nin.narrowing.workflow import NarrowingTask, WorkflowConfig, run_workflow
from nin.runtime.progress import ProgressCallback
from nin.speed_search.subject import Subject
from nin.training import CheckpointOptions


@dataclasses.dataclass(frozen=True)
class NarrowingSettings:
    """How forms are narrowed.

    Attributes:
        images: of the training part, without their labels, that the layers are fitted to.
        finetune: epochs of training afterwards, by the original's answers and the labels where there are any.
        seed: chooses the images, and their order in the training.
    """

    images: int
    finetune: int
    seed: int


def narrowed(
    subject: Subject,
    share: float,
    settings: NarrowingSettings,
    folder: Path,
    stop: Callable[[], bool],
    on_progress: ProgressCallback,
) -> tuple[nn.Module, Plan]:
    """Return the network narrowed to a share of its multiplications, and the plan.

    The budget is one of multiplications, so that no clock decides; the analysis of the network is kept in the folder
    and serves all shares.

    Args:
        subject: the network and its images.
        share: of the multiplications that are left.
        settings: see there.
        folder: for the analysis, and for the state of a fine-tuning, which goes on where it was stopped.
        stop: says that the fine-tuning is to save its state and end.
        on_progress: called with what is being done, the number done and the number of all.

    Raises:
        UserError: as `nin.narrow`.
        KeyboardInterrupt: ``stop`` said so.
    """
    cache = folder / "analysis.safetensors"
    task = NarrowingTask(subject.model, subject.images, subject.preprocessing, subject.labelled, cache)
    config = WorkflowConfig(
        {"macs": share},
        images=settings.images,
        finetune=settings.finetune,
        seed=settings.seed,
        measure_latency=False,
    )
    if settings.finetune:
        training = folder / f"finetune-{share:g}"
        training.mkdir(parents=True, exist_ok=True)
        result = run_workflow(task, config, training, CheckpointOptions(stop=stop), on_progress)
    else:
        options = NarrowOptions(cache=cache, measure_latency=False, revert_slower=False, on_progress=on_progress)
        result = narrow(subject.model, task.calibration_batches(config), macs=share, options=options)
    return result.model.eval(), result.plan
