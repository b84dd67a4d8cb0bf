"""The forms of a network that are compared: as it is, and narrowed to shares of its multiplications or its time."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from torch import nn

from nin.models.narrowing_plan import Plan
from nin.narrowing.options import NarrowOptions
from nin.narrowing.pipeline import narrow
from nin.narrowing.workflow import NarrowingTask, run_workflow
from nin.narrowing.workflow_config import WorkflowConfig
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
        narrow_by: what the shares are of: "macs", so that no clock decides, or "latency".
        engine: that a latency is of, a name in `nin.engines.catalog.NARROWING_ENGINES`.
        batch: images at a time that a latency is of.
        threads: that a latency is timed with; as many as PyTorch uses if not given.
    """

    images: int
    finetune: int
    seed: int
    narrow_by: str = "macs"
    engine: str = "pytorch"
    batch: int = 1
    threads: int | None = None


def narrowed(
    subject: Subject,
    share: float,
    settings: NarrowingSettings,
    folder: Path,
    stop: Callable[[], bool],
    on_progress: ProgressCallback,
) -> tuple[nn.Module, Plan]:
    """Return the network narrowed to a share of its multiplications or its latency, and the plan.

    The analysis of the network is kept in the folder and serves all shares.

    Args:
        subject: the network and its images.
        share: that is left.
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
        {settings.narrow_by: share},
        images=settings.images,
        finetune=settings.finetune,
        seed=settings.seed,
        batch=settings.batch,
        engine=settings.engine,
        threads=settings.threads,
        measure_latency=False,
    )
    if settings.finetune:
        training = folder / f"finetune-{share:g}"
        training.mkdir(parents=True, exist_ok=True)
        result = run_workflow(task, config, training, CheckpointOptions(stop=stop), on_progress)
    else:
        options = NarrowOptions(
            cache=cache,
            measure_latency=False,
            engine=settings.engine,
            batch=settings.batch,
            threads=settings.threads,
            on_progress=on_progress,
        )
        macs, latency = (share if settings.narrow_by == kind else None for kind in ("macs", "latency"))
        batches = task.calibration_batches(config)
        result = narrow(subject.model, batches, macs=macs, latency=latency, options=options)
    return result.model.eval(), result.plan
