"""The control: a uniformly thinner network that costs as much as the narrowed one, trained from the beginning."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from nin import checkpoint, models, training
from nin.config import TrainConfig
from nin.errors import UserError
from nin.models.surgery import to_plain_layers
from nin.narrowing.latency import ModelTimer
from nin.narrowing.report import ControlReport, NarrowReport
from nin.narrowing.workflow import NarrowingTask, beginning, check_beginning
from nin.narrowing.workflow_config import CONTROL_FILE, WorkflowConfig
from nin.profiling import cost
from nin.runtime.files import write_atomically
from nin.runtime.progress import ProgressCallback
from nin.runtime.timer import Timing

# Halvings of the interval in which the ratio lies; each costs two dozen runs of the networks where time decides.
HALVINGS = {"macs": 12, "parameters": 12, "latency": 5}


def original_config(description: dict[str, object]) -> models.NiNConfig:
    """Return the configuration of a run's network before any narrowing.

    Raises:
        UserError: it is none of nin's own mlpconv networks, whose widths are in its configuration.
    """
    while description["kind"] == "narrowed":
        description = description["base"]  # type: ignore[assignment]
    if description["kind"] != "nin":
        raise UserError(f"--control must be given a network of mlpconv layers (nin_…), got a {description['kind']}")
    return models.NiNConfig.from_dict(description["config"])  # type: ignore[arg-type]


def thinner(config: models.NiNConfig, ratio: float) -> models.NiNConfig:
    """Return the network with that share of every layer's channels, the images' and the classes' kept.

    Example:
        >>> thinner(nin.models.nin_cifar().config, 0.5).blocks[2].channels
        (96, 96, 10)
    """
    blocks = []
    for number, block in enumerate(config.blocks):
        channels = [max(1, round(ratio * c)) for c in block.channels]
        if number + 1 == len(config.blocks):
            channels[-1] = config.num_classes
        blocks.append(dataclasses.replace(block, channels=tuple(channels)))
    return dataclasses.replace(config, name=f"{config.name}, {ratio:.2f} of the channels", blocks=tuple(blocks))


def find_ratio(price: Callable[[float], float], target: float, halvings: int) -> float:
    """Return the largest ratio whose price is at most ``target``, by bisection.

    Example:
        >>> round(find_ratio(lambda ratio: ratio**2, 0.25, 20), 3)
        0.5
    """
    low, high = 0.0, 1.0
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if price(middle) <= target else (low, middle)
    return low or high


def train_control(
    task: NarrowingTask,
    info: checkpoint.RunInfo,
    config: WorkflowConfig,
    report: NarrowReport,
    batches: list[Tensor],
    *,
    out: Path,
    keeping: training.CheckpointOptions,
    on_progress: ProgressCallback | None,
) -> ControlReport:
    """Train the control as long as the original and the narrowed network were, into a run folder of its own.

    Args:
        task: the network that was narrowed, and the images.
        info: of its run folder: its recipe is the control's too.
        config: what was asked for.
        report: of the narrowed network: the control costs as much.
        batches: images to time it with.
        out: the control's run folder; an unfinished one is gone on with.
        keeping: when the state is written, and whether to stop.
        on_progress: called with what is being done, the number done, and the number of all.

    Raises:
        UserError: as `training.train`, or the folder holds the control of another call.
    """
    layout = "channels_last" if config.channels_last else "contiguous"
    model_timer = ModelTimer(to_plain_layers(task.model).eval(), batches, layout)
    base, shape = original_config(info.model), (1, info.preprocessing.channels, *2 * (info.preprocessing.size,))
    chosen = choose_once(out.parent, task, config, lambda: choose(base, config, report, model_timer, shape))
    recipe = control_recipe(info, config.finetune)

    def tell(p: training.TrainProgress) -> None:
        if on_progress:
            on_progress(f"Training the control, epoch {p.epoch}/{p.epochs}, loss {p.loss:.3f}", p.step, p.steps)

    result = training.train(
        task.images,
        recipe,
        out=out,
        keeping=dataclasses.replace(keeping, resume=training.has_begun(out)),
        network=lambda: models.NiN(chosen),
        on_progress=tell,
    )
    plain = to_plain_layers(result.model)
    return ControlReport(
        ratio=sum(sum(b.channels) for b in chosen.blocks) / sum(sum(b.channels) for b in base.blocks),
        epochs=int(recipe.epochs or 0),
        macs=cost.cost(result.model, shape).macs,
        parameters=sum(p.numel() for p in plain.parameters()),
        latency={n: model_timer.compare(plain, n) for n in report.latency},
        accuracy=result.info.result["test_accuracy"],
    )


def choose_once(
    folder: Path, task: NarrowingTask, config: WorkflowConfig, choose: Callable[[], models.NiNConfig]
) -> models.NiNConfig:
    """Return the control's network as it was chosen before an interruption, or choose it and write that down.

    Times differ from run to run, so what was chosen once stays.

    Raises:
        UserError: it was chosen for other settings, another network or other images.
    """
    path = folder / CONTROL_FILE
    if path.exists():
        values = json.loads(path.read_text())
        check_beginning(folder, values, task, config)
        return models.NiNConfig.from_dict(values["network"])
    chosen = choose()
    write_atomically(path, json.dumps({**beginning(task, config), "network": chosen.to_dict()}))
    return chosen


def choose(
    base: models.NiNConfig,
    config: WorkflowConfig,
    report: NarrowReport,
    model_timer: ModelTimer,
    shape: tuple[int, ...],
) -> models.NiNConfig:
    """Return the widest uniformly thinner network that costs no more than the narrowed one, in what was asked for."""
    kind, batch = next(iter(config.budget)), config.batch or max(report.latency)

    def share(times: tuple[Timing, Timing]) -> float:
        return times[1].median_ms / times[0].median_ms

    def price(ratio: float) -> float:
        network = models.NiN(thinner(base, ratio))
        if kind == "latency":
            return share(model_timer.compare(to_plain_layers(network), batch))
        counted = cost.cost(network, shape)
        return counted.macs if kind == "macs" else counted.parameters

    targets = {"latency": share(report.latency[batch]), "macs": report.macs[1], "parameters": report.parameters[1]}
    return thinner(base, find_ratio(price, targets[kind], HALVINGS[kind]))


def control_recipe(info: checkpoint.RunInfo, finetune: int) -> TrainConfig:
    """Return the recipe of a run, with the epochs of the fine-tuning added."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    settings = {name: value for name, value in info.recipe.items() if name in names}
    if not settings.get("epochs"):
        raise UserError("--control must be given a run folder whose recipe says how many epochs it was trained")
    return TrainConfig(**{**settings, "epochs": settings["epochs"] + finetune})
