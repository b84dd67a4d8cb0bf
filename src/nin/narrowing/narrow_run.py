"""Narrow the network of a run folder into a new run folder, with the plan and the report."""

import dataclasses
import json
from pathlib import Path

from nin import checkpoint, data
from nin.errors import UserError
from nin.inference import evaluation
from nin.narrowing.baseline import original_config, train_control
from nin.narrowing.pipeline import NarrowResult
from nin.narrowing.workflow import CONTROL_FOLDER, NarrowingTask, WorkflowConfig, output_folder, run_workflow
from nin.runtime import distributed
from nin.runtime.files import write_atomically
from nin.runtime.progress import ProgressCallback, ignore_progress
from nin.training import CheckpointOptions

NARROWING_FILE, CACHE_FILE = "narrowing.json", "narrowing.safetensors"


def narrow_run(
    run: Path,
    images: data.Data,
    config: WorkflowConfig,
    *,
    out: Path | None,
    keeping: CheckpointOptions | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> NarrowResult:
    """Narrow the network of a run folder; interrupted, the same call resumes it.

    Args:
        run: the folder that ``nin train`` or ``nin narrow`` made.
        images: the training images to calibrate with, and the test images that measure the accuracy.
        config: what is asked for.
        out: the run folder to make; it may be None in a dry run.
        keeping: when the state of a fine-tuning is saved, and whether to stop.
        on_progress: called with what is being done, the number done, and the number of all.

    Returns:
        The narrowed network, its plan and its report; the accuracy is that on the test images.

    Raises:
        UserError: as `nin.narrow`, or the images are not of the kind that the network takes.
        OSError: a folder cannot be written.
        KeyboardInterrupt: ``keeping.stop`` said so; the same call resumes.
    """
    keeping = keeping or CheckpointOptions()
    model, info = checkpoint.load_model(run)
    if mismatch := info.mismatch(images):
        raise UserError(f"the images do not fit {run}: {mismatch}")
    # augmented as in the training of the run, whatever the default of the data set is
    augmentation = {name: info.recipe[name] for name in ("flip", "shift") if name in info.recipe}
    images = dataclasses.replace(images, **augmentation)
    task = NarrowingTask(model, images, info.preprocessing, True, run / CACHE_FILE)
    if config.control:
        original_config(info.model)  # refuses other networks before anything is computed
    folder = None if config.dry_run else out
    with output_folder(folder):
        result = run_workflow(task, config, folder, keeping, on_progress)
        if folder is None:
            return result
        if config.control:
            control = train_control(
                task, info, config, result.report, out=folder / CONTROL_FOLDER, keeping=keeping, on_progress=on_progress
            )
            result = result.with_report(control=control)
        if distributed.is_main_process():
            save_narrowed_run(folder, run, result, info, images, config)
    return result


def save_narrowed_run(
    out: Path, run: Path, result: NarrowResult, info: checkpoint.RunInfo, images: data.Data, config: WorkflowConfig
) -> None:
    """Write the narrowed run folder: the model, its origin, the plan and the report."""
    accuracy = result.report.accuracy.get("finetuned", result.report.accuracy["corrected"])
    count = len(images.test)
    hits = round(accuracy * count)
    narrowed = dataclasses.replace(
        info,
        model=checkpoint.narrowed_description(info.model, result.plan),
        recipe={**info.recipe, "narrowed_from": str(run), "narrowing": config.to_dict()},
        data={**info.data, **images.origin, "name": images.name, "test_images": count},
        result={
            "test_accuracy": hits / count,
            "test_accuracy_interval": evaluation.wilson_interval(hits, count),
            "test_images": count,
        },
        environment=checkpoint.environment(),
    )
    checkpoint.save_model(out, result.model, narrowed)
    content = {"plan": result.plan.to_dict(), "report": result.report.to_dict()}
    write_atomically(out / NARROWING_FILE, json.dumps(content, indent=2))
    checkpoint.remove_state(out)
