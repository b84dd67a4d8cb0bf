"""Narrow into a folder the network of a run, or any PyTorch model, which a factory and a weights file give."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from nin import checkpoint, data
from nin.engines.catalog import ENGINES, NARROWING_ENGINES
from nin.errors import UserError
from nin.folders import CONTROL_FOLDER, NARROW_REPORT_FILE, NARROWING_FILE, PLAN_FILE
from nin.inference import evaluation
from nin.models.factory import explain_refused_images
from nin.models.input_config import InputConfig
from nin.models.narrowing_plan import Plan
from nin.narrowing.pipeline import NarrowResult
from nin.narrowing.report import NarrowReport
from nin.narrowing.uniform_baseline import original_config, train_control
from nin.narrowing.workflow import NarrowingTask, choose_narrowing_device, model_device, output_folder, run_workflow
from nin.narrowing.workflow_config import WorkflowConfig
from nin.runtime import distributed
from nin.runtime.files import write_atomically
from nin.runtime.progress import ProgressCallback, ignore_progress
from nin.training import CheckpointOptions
from nin.value_checks import check_mean_std

# In the run that a narrowed one comes from: the cache of the analysis.
CACHE_FILE = "narrowing.safetensors"

# Settings of a run's training that its fine-tuning takes over: those of the images, and those of the batches.
MOVES, AUGMENTATION = ("flip", "shift"), ("augment", "mixup", "cutmix")


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
        images: the training images to calibrate with, and the test images that measure the accuracy; of a fold, or of
            a training with a validation part, the parts are those of the run.
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
    device = choose_narrowing_device(
        config.device, config.engine
    )  # before the network, so that a mistake shows at once
    model, info = checkpoint.load_model(run)
    images = data.with_recorded_parts(images, info.data)
    if mismatch := info.mismatch(images):
        raise UserError(f"the images do not fit {run}: {mismatch}")
    # augmented as in the training of the run, whatever the default of the data set is
    moves, augmentation = (
        {name: info.recipe[name] for name in names if name in info.recipe} for names in (MOVES, AUGMENTATION)
    )
    images = dataclasses.replace(images, **moves)
    task = NarrowingTask(model.to(device), images, info.preprocessing, True, run / CACHE_FILE, augmentation)
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
    content = {"plan": result.plan.to_dict(), "report": result.report.to_dict()}
    with _all_or_none(out, checkpoint.MODEL_FILE, checkpoint.CONFIG_FILE, NARROWING_FILE):
        checkpoint.save_model(out, result.model, narrowed)
        write_atomically(out / NARROWING_FILE, json.dumps(content, indent=2))
    checkpoint.remove_state(out)


@contextlib.contextmanager
def _all_or_none(out: Path, *names: str) -> Iterator[None]:
    """Remove files that a block writes where it fails, as on a full disk: with some of them no narrowing begins."""
    try:
        yield
    except BaseException:
        for name in names:
            (out / name).unlink(missing_ok=True)
        raise


def load_finished(out: Path, config: WorkflowConfig) -> NarrowReport | None:
    """Return the report of a narrowing that is finished in a folder, or None where there is none.

    Raises:
        UserError: it was narrowed to another budget, or its files are damaged.
    """
    whole, plan_file, report_file = out / NARROWING_FILE, out / PLAN_FILE, out / NARROW_REPORT_FILE
    if (out / checkpoint.STATE_FILE).exists() or not (whole.exists() or (plan_file.exists() and report_file.exists())):
        return None
    try:
        if whole.exists():
            values = json.loads(whole.read_text())
        else:
            values = {"plan": json.loads(plan_file.read_text()), "report": json.loads(report_file.read_text())}
        plan, report = Plan.from_dict(values["plan"]), NarrowReport.from_dict(values["report"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{out} holds damaged files of an earlier narrowing ({error}): give another --out") from error
    (kind, share), *_ = config.budget.items()
    if (plan.budget, plan.share) != (kind, share):
        raise UserError(f"{out} is finished, with {plan.budget}={plan.share}, now {kind}={share}: give another --out")
    engine = ENGINES[NARROWING_ENGINES[config.engine]].title
    if kind == "latency" and (report.engine or ENGINES["eager"].title) != engine:
        raise UserError(f"{out} is finished, with the latency in {report.engine}, now in {engine}: give another --out")
    return report


def choose_preprocessing(
    images: data.Data, config: InputConfig, mean: tuple[float, ...], std: tuple[float, ...]
) -> checkpoint.Preprocessing:
    """Return how images become the input of another package's network.

    Args:
        images: of the network.
        config: what its published weights were trained with.
        mean: of each channel, for values from 0 to 1; where empty, that of ``config``.
        std: the same.

    Raises:
        UserError: there is not one number for each channel, or a standard deviation is not above 0.
    """
    config = config.with_channels(images.channels)
    mean, std = mean or config.mean, std or config.std
    check_mean_std(mean, std, images.channels)
    return dataclasses.replace(checkpoint.Preprocessing.of(images), mean=tuple(mean), std=tuple(std))


def narrow_model(
    model: nn.Module,
    images: data.Data,
    config: WorkflowConfig,
    *,
    preprocessing: checkpoint.Preprocessing,
    out: Path | None,
    cache: Path,
    keeping: CheckpointOptions | None = None,
    on_progress: ProgressCallback = ignore_progress,
) -> NarrowResult:
    """Narrow any network; interrupted, the same call resumes it.

    Args:
        model: in evaluation mode; moved to ``config.device``.
        images: to calibrate with, and, where their classes are as many as the network's scores, to test with.
        config: what is asked for.
        preprocessing: of the network, see `choose_preprocessing`.
        out: the folder to make: ``model.safetensors``, ``plan.json`` and ``report.json``; None in a dry run.
        cache: a file that keeps the analysis of the network.
        keeping: when the state of a fine-tuning is saved, and whether to stop.
        on_progress: called with what is being done, the number done, and the number of all.

    Raises:
        UserError: as `nin.narrow`, or the network does not take the images.
        OSError: a folder cannot be written.
        KeyboardInterrupt: ``keeping.stop`` said so; the same call resumes.
    """
    if config.control:
        raise UserError("--control must be given a run folder: how somebody's network was trained is not known")
    keeping = keeping or CheckpointOptions()
    model = model.to(choose_narrowing_device(config.device, config.engine))
    scores = count_scores(model, images, preprocessing)
    if config.finetune and scores is None:
        raise UserError("--finetune needs a network that gives one table of scores (images, classes)")
    labelled = scores == len(images.classes)
    task = NarrowingTask(model, images, preprocessing, labelled, cache)
    folder = None if config.dry_run else out
    with output_folder(folder):
        result = run_workflow(task, config, folder, keeping, on_progress)
        if folder is None:
            return result
        if not labelled:
            found = "no table of scores" if scores is None else f"{scores:,} scores"
            note = f"The network gives {found}, the images have {len(images.classes)} classes: no accuracy."
            result = result.with_report(notes=(*result.report.notes, note))
        if not distributed.is_main_process():
            return result
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in result.model.state_dict().items()}
        with _all_or_none(folder, checkpoint.MODEL_FILE, PLAN_FILE, NARROW_REPORT_FILE):
            write_atomically(folder / checkpoint.MODEL_FILE, save(tensors, metadata={"format": "pt"}))
            write_atomically(folder / PLAN_FILE, result.plan.to_json())
            write_atomically(folder / NARROW_REPORT_FILE, json.dumps(result.report.to_dict(), indent=2))
        checkpoint.remove_state(folder)
    return result


def count_scores(model: nn.Module, images: data.Data, p: checkpoint.Preprocessing) -> int | None:
    """Return how many scores the network gives for an image, or None where its output is no table of scores.

    Raises:
        UserError: it does not take the images.
    """
    pixels = images.train.fetch(torch.arange(min(2, len(images.train))))
    x = data.to_float(pixels.to(model_device(model)), p.mean, p.std, dtype=torch.float32)
    given, shape = "nin narrow gives it one batch of images", f"{p.channels}×{p.size}×{p.size}"
    with torch.no_grad(), explain_refused_images(model, "the network", shape, given=given):
        result = model(x)
    return result.shape[1] if isinstance(result, Tensor) and result.dim() == 2 else None
