"""`nin narrow`: prune and factorise the network of a run, or of another package, into a narrower one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nin
from nin import folders, names
from nin.cli.console import (
    ProgressBar,
    catch_stop_signals,
    messages,
    print_json,
    print_table,
    say_if_unfinished,
    silence_other_ranks,
)
from nin.cli.train import load_data, write_report
from nin.engines.catalog import check_narrowing_engine
from nin.errors import UserError
from nin.runtime import torchrun
from nin.runtime.files import write_atomically
from nin.value_checks import check_mean_std, check_share

if TYPE_CHECKING:
    import torch

    from nin.narrowing import NarrowReport, NarrowResult


def narrow(
    network: str | None = None,
    /,
    *,
    data: str,
    out: Path | None = None,
    latency: float | None = None,
    macs: float | None = None,
    parameters: float | None = None,
    budgets: str | None = None,
    finetune: int = 0,
    control: bool = False,
    skip: tuple[str, ...] = (),
    images: int = 512,
    batch: int | None = None,
    channels_last: bool = False,
    engine: str = "pytorch",
    model: str | None = None,
    weights: Path | None = None,
    size: int | None = None,
    mean: str | None = None,
    std: str | None = None,
    data_dir: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    revert_slower: bool = False,
    dry_run: bool = False,
    device: str = "auto",
    trust: bool = False,
    json: bool = False,
) -> None:
    """Make a trained network narrower, and so faster: fewer channels where they are missed least.

    Stopped with Ctrl-C, the same command goes on.

    Args:
        network: The folder that `nin train` or `nin narrow` made; or timm:NAME, torchvision:NAME,
            package.module:function that makes the network without arguments, with --weights.
        data: What it was trained on, as for `nin train`. Some training images without their labels are looked at; the
            test images measure what was lost.
        out: The folder to make. That of a run is a run: predict, report and narrow take it like any other. That of
            another network holds model.safetensors, plan.json, report.json and report.html.
        latency: Time to be left, as a share of the original's, measured on --device.
        macs: Multiply-accumulates to be left, as a share of the original's.
        parameters: Parameters to be left, as a share of the original's.
        budgets: More shares, such as 0.8,0.6,0.45: accuracy against latency at each of them, in the report.
        finetune: Epochs of training afterwards, by the original network's answers and the labels.
        control: Train a uniformly thinner network for as many epochs as the original and the narrowed one together,
            and show it beside.
        skip: Layers to leave alone: names, or patterns such as "blocks.0.*".
        images: Training images to look at.
        batch: Images at a time when it is timed: 1 for a program that answers one request after the other. 64 if not
            given.
        channels_last: Keep the weights with the channels side by side in memory, which is often faster, and measure
            that.
        engine: In which layers and the whole network are timed, the one that will run it: pytorch, nin (its operator,
            as in nin predict), onnxruntime or openvino. The result is a network of PyTorch all the same.
        model: The network's name, given so instead of in front.
        weights: With the name of a network: its weights, model.safetensors or a state_dict that torch.save wrote
            (read without running code).
        size: With the name of a network: height and width that images are brought to, in pixels; those of its
            published weights if not given, 224 for a function.
        mean: With the name of a network: the channels' mean, such as 0.485,0.456,0.406; that of its published weights
            if not given, ImageNet's for a function.
        std: With the name of a network: the channels' standard deviation, as the mean.
        data_dir: Where the files of mnist to svhn lie.
        resume: Where it is finished, print its result, and write pages that are missing; else go on, or begin, as
            without it.
        overwrite: Remove an earlier narrowing that lies in the folder before this one begins; a folder that holds
            anything else is refused.
        revert_slower: With --macs or --parameters: avoid layers that are measured slower than before. Without it, the
            same network, images and options give the same plan on a quiet and on a busy machine.
        dry_run: Print the plan only.
        device: Where to compute, and to measure times: auto for a GPU where there is one and --engine
            computes on it, cpu, cuda, cuda:1.
        trust: Import the module that the run says its network is made by, where that is somebody's own code.
        json: Print the figures as JSON on standard output.
    """
    names.check_source(data)
    check_narrowing_engine(engine)
    given = (("latency", latency), ("macs", macs), ("parameters", parameters))
    budget = {name: check_share(name, value) for name, value in given if value is not None}
    others = tuple(check_share("budgets", share) for share in parse_numbers("budgets", budgets))
    run = None
    if network is not None and names.is_external_name(network) and not Path(network).is_dir():
        if model is not None:
            raise UserError(f"give one network: {network}, or --model {model}")
        model = network
    elif network is not None:
        run = Path(network)
        folders.check_is_run(run)
    if model is not None:
        names.check_external(model)
    if (run is None) == (model is None) or (model is None) != (weights is None):
        raise UserError("give a run folder, or the name of a network (package.module:function) with --weights FILE")
    if run is not None and (size is not None or mean is not None or std is not None):
        raise UserError("--size, --mean and --std go with the name of a network: a run folder knows its own")
    means, stds = parse_numbers("mean", mean), parse_numbers("std", std)
    check_mean_std(means, stds)
    if weights is not None and not weights.is_file():
        raise UserError(f"--weights: {weights} does not exist")
    if out is not None and not dry_run and torchrun.rank() == 0:
        folders.check_narrowing(out, run, resume=resume, overwrite=overwrite)
    from nin import checkpoint, models
    from nin.checkpoint import load_info
    from nin.models.package_networks import input_config
    from nin.models.trained_network import load_trained
    from nin.narrowing.narrow_to_folder import choose_preprocessing, load_finished, narrow_model, narrow_run
    from nin.narrowing.workflow import choose_narrowing_device
    from nin.narrowing.workflow_config import WorkflowConfig

    config = WorkflowConfig(
        budget,
        others,
        skip,
        images=images,
        finetune=finetune,
        control=control,
        batch=batch,
        channels_last=channels_last,
        dry_run=dry_run,
        device=device,
        revert_slower=revert_slower,
        engine=engine,
    )
    if out is None and not dry_run:
        raise UserError("--out must name the folder to make, or give --dry-run to see the plan only")
    on = choose_narrowing_device(device, engine)  # before the network and the images, so that a mistake shows at once
    silence_other_ranks()
    report = None
    if resume and out is not None and not dry_run:
        report = load_finished(out, config)
        if report is not None and not folders.missing_narrowing_pages(out):
            messages.print(f"{out} is finished; this is its result.")
            show_narrowing(report, out, json)
            return
        if report is not None:
            missing = " and ".join(folders.missing_narrowing_pages(out))
            messages.print(f"{out} is finished; this is its result, and {missing}, which it lacked, is written.")
        elif not (out / checkpoint.STATE_FILE).exists():
            messages.print(f"{out} holds nothing to resume yet: the narrowing begins.")
    if overwrite and out is not None and not dry_run and torchrun.rank() == 0:
        folders.remove_narrowing(out)
    how: dict[str, Any] = {"data_dir": data_dir, "photos": finetune > 0 or control}  # for random crops
    made_for: dict[str, int] = {}
    if run is not None:
        info = load_info(run)
        say_if_unfinished(run, info)
        how |= {"load": nin.data.load_as_recorded, "record": info.data, "preprocessing": info.preprocessing}
        samples = load_data(data, **how)
        with models.trust() if trust else contextlib.nullcontext():
            if report is None:
                report = narrow_with_progress(on, narrow_run, run, samples, config, out=out, overwrite=overwrite)
    elif model is not None and weights is not None:
        external = load_trained(model, weights)  # before the images, so that a mistake shows at once
        made_for, published = external.made_for, input_config(model)
        if data not in nin.data.DATASET_NAMES:
            size = size or external.height
            how["resize"] = published.resize
        samples = load_data(data, size=size, **how)
        options: dict[str, Any] = {
            "preprocessing": choose_preprocessing(samples, published, means, stds),
            "cache": weights.with_suffix(".narrowing.safetensors"),
        }
        if report is None:
            report = narrow_with_progress(
                on, narrow_model, external.model, samples, config, out=out, overwrite=overwrite, **options
            )
    if torchrun.rank() > 0 or report is None:
        return
    with models.trust() if trust else contextlib.nullcontext():
        hint = "" if out is None or dry_run else write_pages(report, out, run or str(model), samples, made_for)
    show_narrowing(report, out, json)
    if hint:
        messages.print(hint)


def parse_numbers(name: str, text: str | None) -> tuple[float, ...]:
    """Return the numbers of a text with commas between them.

    Raises:
        UserError: a part of it is no number.
    """
    try:
        return tuple(float(part) for part in (text or "").split(",") if part.strip())
    except ValueError as error:
        raise UserError(f"{name} must be numbers with commas between them, such as 0.8,0.6, got {text!r}") from error


def narrow_with_progress(
    device: torch.device, narrow: Callable[..., NarrowResult], *arguments: Any, overwrite: bool, **options: Any
) -> NarrowReport:
    """Narrow with a progress bar and return the report; Ctrl-C and SIGTERM stop it where it can go on."""
    from nin.runtime import distributed
    from nin.training import CheckpointOptions

    without = " without --overwrite" if overwrite else ""
    with (
        ProgressBar("Narrowing") as bar,
        catch_stop_signals() as received,
        distributed.process_group(device),
    ):
        try:
            keeping = CheckpointOptions(stop=lambda: bool(received))
            return narrow(*arguments, **options, keeping=keeping, on_progress=bar.on_progress).report
        except KeyboardInterrupt:
            bar.line(f"What was found is kept: the same command{without} goes on.")
            raise


def write_pages(
    report: NarrowReport, out: Path, original: Path | str, images: nin.data.Data, made_for: dict[str, int]
) -> str:
    """Write the report in HTML, and that of a new run; return where it is and how the network is used.

    Args:
        report: of the narrowing.
        out: the folder of the result.
        original: the run folder that was narrowed, or the name of another package's network.
        images: that measured it.
        made_for: options with which `nin.models.factory.create_external_model` makes the other package's network.
    """
    from nin import checkpoint
    from nin.report import render_narrowing_report

    is_run = isinstance(original, Path)
    page = out / ("narrowing.html" if is_run else "report.html")
    name = original.name if isinstance(original, Path) else original
    write_atomically(page, render_narrowing_report(report, f"{out.name}: narrowed from {name}"))
    if is_run:
        write_report(out, images)
        return f"What it cost: {page}\nUse it:       nin predict {out} IMAGE…"
    options = "".join(f", {key}={value}" for key, value in made_for.items())
    return (
        f"What it cost: {page}\nUse it, in Python, with nin or, once it is loaded, without:\n"
        "import pathlib, nin, safetensors.torch\n"
        "from nin.models.factory import create_external_model\n"
        f"model = nin.apply_plan(create_external_model({original!r}{options}).model, "
        f"pathlib.Path({str(out / 'plan.json')!r}).read_text())\n"
        f"model.load_state_dict(safetensors.torch.load_file({str(out / checkpoint.MODEL_FILE)!r}))"
    )


def show_narrowing(report: NarrowReport, out: Path | None, as_json: bool) -> None:
    """Print what was narrowed and what that cost, as tables or as JSON."""
    if as_json:
        print_json({"run": None if out is None else str(out), **report.to_dict()})
        return
    for title, rows in report.tables():
        print_table(rows, title=title)
    for note in report.notes:
        messages.print(note)
