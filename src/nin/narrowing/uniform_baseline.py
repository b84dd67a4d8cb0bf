"""The control, a baseline for narrowing: a uniformly thinner network of the same cost, trained from scratch as long."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nin import checkpoint, folders, models, training
from nin.config import TrainConfig
from nin.errors import UserError
from nin.folders import CONTROL_FILE
from nin.models.surgery import to_plain_layers
from nin.narrowing.latency import ModelTimer
from nin.narrowing.planner import count_parameters
from nin.narrowing.report import ControlReport, NarrowReport
from nin.narrowing.timed_engines import make_engine
from nin.narrowing.workflow import NarrowingTask, check_same_task, task_fingerprint
from nin.narrowing.workflow_config import WorkflowConfig
from nin.profiling import cost
from nin.runtime.files import write_atomically
from nin.runtime.progress import ProgressCallback
from nin.runtime.timer import Timing

# Steps of the bisection over the ratio; with a latency budget each of them times both networks two dozen times.
BISECTION_STEPS = {"macs": 12, "parameters": 12, "latency": 5}


def original_config(description: dict[str, Any]) -> models.NiNConfig:
    """Return the configuration of a run's network before any narrowing.

    Raises:
        UserError: it is none of nin's own mlpconv networks, whose widths are in its configuration.
    """
    while description["kind"] == "narrowed":
        description = description["base"]
    if description["kind"] != "nin":
        raise UserError(f"--control must be given a network of mlpconv layers (nin_…), got a {description['kind']}")
    return models.NiNConfig.from_dict(description["config"])


def scale_channels(config: models.NiNConfig, ratio: float) -> models.NiNConfig:
    """Return the network with every layer's channels multiplied by a ratio, except the images' and the classes'.

    Example:
        >>> scale_channels(nin.models.nin_cifar().config, 0.5).blocks[2].channels
        (96, 96, 10)
    """
    blocks = []
    for number, block in enumerate(config.blocks):
        channels = [max(1, round(ratio * c)) for c in block.channels]
        if number + 1 == len(config.blocks):
            channels[-1] = config.num_classes
        blocks.append(dataclasses.replace(block, channels=tuple(channels)))
    return dataclasses.replace(config, name=f"{config.name}, {ratio:.2f} of the channels", blocks=tuple(blocks))


def largest_ratio(cost_of: Callable[[float], float], target: float, steps: int) -> float:
    """Return the largest ratio from 0 to 1 that costs at most ``target``, by bisection.

    Example:
        >>> round(largest_ratio(lambda ratio: ratio**2, 0.25, 20), 3)
        0.5
    """
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if cost_of(middle) <= target else (low, middle)
    return low or high


def train_control(
    task: NarrowingTask,
    info: checkpoint.RunInfo,
    config: WorkflowConfig,
    report: NarrowReport,
    *,
    out: Path,
    keeping: training.CheckpointOptions,
    on_progress: ProgressCallback,
) -> ControlReport:
    """Train the control for as long as the original and the narrowed network together, into a run folder of its own.

    Args:
        task: the network that was narrowed, and its data.
        info: of its run folder: the control is trained with the same settings.
        config: what was asked for.
        report: of the narrowed network: the control costs as much.
        out: the control's run folder; an unfinished one is resumed.
        keeping: when the state is saved, and whether to stop.
        on_progress: called with what is being done, the number done, and the number of all.

    Raises:
        UserError: as `training.train`, or the folder holds the control of another call.
    """
    plain_original = to_plain_layers(task.model).eval()
    like = next(plain_original.parameters())
    engine = make_engine(config.engine, like, config.layout)
    model_timer = ModelTimer(plain_original, task.calibration_batches(config), config.layout, engine)
    base, shape = original_config(info.model), (1, info.preprocessing.channels, *2 * (info.preprocessing.size,))
    chosen = load_or_choose(out.parent, task, config, lambda: choose_network(base, config, report, model_timer, shape))
    train_config = control_train_config(info, config)

    def progress(p: training.TrainProgress) -> None:
        on_progress(f"Training the control, epoch {p.epoch}/{p.epochs}, loss {p.loss:.3f}", p.step, p.steps)

    result = training.train(
        task.images,
        train_config,
        out=out,
        keeping=dataclasses.replace(keeping, resume=folders.has_begun(out)),
        network=lambda: models.NiN(chosen),
        on_progress=progress,
    )
    model = result.model.to(task.device)  # another where an interrupted training went on elsewhere
    plain = to_plain_layers(model)
    return ControlReport(
        ratio=sum(sum(b.channels) for b in chosen.blocks) / sum(sum(b.channels) for b in base.blocks),
        epochs=int(train_config.epochs or 0),
        macs=cost.cost(model, shape).macs,
        parameters=count_parameters(plain),
        latency={n: model_timer.compare(plain, n) for n in report.latency},
        accuracy=result.info.result["test_accuracy"],
    )


def load_or_choose(
    folder: Path, task: NarrowingTask, config: WorkflowConfig, choose: Callable[[], models.NiNConfig]
) -> models.NiNConfig:
    """Return the control's network as it was chosen before an interruption, or choose it and save the choice.

    Latencies differ from run to run: chosen again, it would not fit the saved state of its training.

    Raises:
        UserError: it was chosen for other settings, another network or other images.
    """
    path = folder / CONTROL_FILE
    if path.exists():
        values = json.loads(path.read_text())
        check_same_task(folder, values, task, config)
        return models.NiNConfig.from_dict(values["network"])
    chosen = choose()
    write_atomically(path, json.dumps({**task_fingerprint(task, config), "network": chosen.to_dict()}))
    return chosen


def choose_network(
    base: models.NiNConfig,
    config: WorkflowConfig,
    report: NarrowReport,
    model_timer: ModelTimer,
    shape: tuple[int, ...],
) -> models.NiNConfig:
    """Return the widest uniformly thinner network that costs no more than the narrowed one, by the kind of budget."""
    kind, batch = next(iter(config.budget)), config.batch or max(report.latency)

    def fraction(times: tuple[Timing, Timing]) -> float:
        return times[1].median_ms / times[0].median_ms

    def cost_of(ratio: float) -> float:
        network = models.NiN(scale_channels(base, ratio)).to(model_timer.device)
        if kind == "latency":
            return fraction(model_timer.compare(to_plain_layers(network), batch))
        counted = cost.cost(network, shape)
        return counted.macs if kind == "macs" else counted.parameters

    targets = {"latency": fraction(report.latency[batch]), "macs": report.macs[1], "parameters": report.parameters[1]}
    return scale_channels(base, largest_ratio(cost_of, targets[kind], BISECTION_STEPS[kind]))


def control_train_config(info: checkpoint.RunInfo, config: WorkflowConfig) -> TrainConfig:
    """Return the settings that a run was trained with, with the epochs of the fine-tuning added, on this call's device.

    Raises:
        UserError: the run does not say how many epochs it was trained.
    """
    # flip and shift are those of the images; the control begins with random weights, as no others fit it
    others = {"flip", "shift", "weights", "pretrained", "freeze"}
    names = {field.name for field in dataclasses.fields(TrainConfig)} - others
    settings = {name: value for name, value in info.recipe.items() if name in names}
    if not settings.get("epochs"):
        raise UserError("--control must be given a run folder whose recipe says how many epochs it was trained")
    changed = {"epochs": settings["epochs"] + config.finetune, "device": config.device}
    return TrainConfig(**{**settings, **changed})
