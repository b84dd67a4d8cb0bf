"""The shell's verbs: arguments only. What they do is in the modules that they import when they run."""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal, NoReturn

from cyclopts import App, CycloptsError, Parameter

from nin.config import TrainConfig
from nin.distribution import version
from nin.errors import UserError
from nin.runtime import torchrun

app = App(
    name="nin",
    help="Network in Network, real: train on your images, see what the network looks at, count what it costs.",
    version=version,
    version_flags=["--version"],
    result_action="return_value",
    default_parameter=Parameter(negative_iterable=""),
)

JsonFlag = Annotated[bool, Parameter(negative="")]


@app.command
def train(
    data: str,
    /,
    *,
    out: Path,
    data_dir: Path | None = None,
    size: int | None = None,
    test_fraction: float | None = None,
    config: Annotated[TrainConfig | None, Parameter(name="*")] = None,
    resume: Annotated[bool, Parameter(negative="")] = False,
    override: Annotated[bool, Parameter(negative="")] = False,
    checkpoint_minutes: float = 5.0,
    checkpoint_steps: int | None = None,
    strict: Annotated[bool, Parameter(negative="")] = False,
    json: JsonFlag = False,
) -> None:
    """Train a Network in Network on images, test it, and write a run folder with a report.

    Parameters
    ----------
    data
        "digits" (comes along), an image folder (DIR/CLASS/*, or DIR/train and DIR/test), WebDataset shards (a folder
        or a pattern of tar files), or mnist, fashion-mnist, cifar10, cifar100, svhn.
    out
        The run folder to make: model.safetensors, config.json, metrics.csv, timings.csv, report.html.
    data_dir
        Where the files of mnist to svhn lie; without it they are downloaded to ~/.cache/nin.
    size
        Height and width that images are brought to, in pixels. Chosen from the images if not given.
    test_fraction
        Share of each class that is held out for testing, where the data have no test images of their own.
    config
        The recipe.
    resume
        Go on with the training in the run folder that was interrupted; the result is that of one never stopped.
    override
        Resume although settings or data are not those of the run; what differs is recorded in config.json.
    checkpoint_minutes
        Write the state at least this often.
    checkpoint_steps
        Write the state after every so many steps, too.
    strict
        Stop at the first file that cannot be read, instead of leaving it out.
    json
        Print the result as JSON on standard output.
    """
    from nin import training
    from nin.cli import commands

    if checkpoint_minutes <= 0 or (checkpoint_steps is not None and checkpoint_steps < 1):
        raise UserError("checkpoint_minutes must be above 0 and checkpoint_steps at least 1")
    commands.train(
        data,
        out=out,
        loading={"data_dir": data_dir, "size": size, "test_fraction": test_fraction, "strict": strict},
        config=config or TrainConfig(),
        keeping=training.CheckpointOptions(
            resume=resume, override=override, minutes=checkpoint_minutes, steps=checkpoint_steps
        ),
        as_json=json,
    )


@app.command
def check(
    data: str,
    /,
    *,
    size: int | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    strict: Annotated[bool, Parameter(negative="")] = False,
    csv: Path | None = None,
    json: JsonFlag = False,
) -> None:
    """Look at every image of a folder: can it be read, is it there twice, is it what it says. Changes nothing.

    Parameters
    ----------
    data
        An image folder: DIR/CLASS/*, or DIR/train and DIR/test.
    size
        Height and width that images would be brought to, in pixels. Chosen from the images if not given.
    test_fraction
        Share of each class that would be held out, where the folder has no test images of its own.
    seed
        Chooses which.
    strict
        Exit with status 1 if an image cannot be read or a training would not begin.
    csv
        Write what was found into this file: path, kind, detail.
    json
        Print what was found as JSON on standard output.
    """
    from nin.cli import commands

    commands.check(data, as_json=json, strict=strict, csv_path=csv, size=size, test_fraction=test_fraction, seed=seed)


@app.command
def shards(
    data: str,
    /,
    *,
    out: Path,
    images_per_shard: int = 10_000,
    test_fraction: float | None = None,
    seed: int = 0,
    json: JsonFlag = False,
) -> None:
    """Write an image folder as WebDataset shards, for sets of many small files. Goes on where it was stopped.

    Parameters
    ----------
    data
        An image folder: DIR/CLASS/*, or DIR/train and DIR/test.
    out
        The folder to make: train-000000.tar, …, test-000000.tar, …, and nin-shards.json with the classes.
    images_per_shard
        At most so many images in a shard.
    test_fraction
        Share of each class for the test shards, where the folder has no test images of its own.
    seed
        Of the order of the images, and of what is held out.
    json
        Print the names of the shards as JSON on standard output.
    """
    from nin.cli import commands

    options = {"images_per_shard": images_per_shard, "test_fraction": test_fraction, "seed": seed}
    commands.shards(data, out, as_json=json, **options)


@app.command
def demo(*, out: Path = Path("runs/demo"), json: JsonFlag = False) -> None:
    """Do the main job on images that come along: train, test, look, predict, and time a bottleneck.

    Parameters
    ----------
    out
        The run folder to make; one that an earlier demo made is replaced.
    json
        Print the result as JSON on standard output.
    """
    from nin.cli import demo as demonstration

    demonstration.run(out, as_json=json)


@app.command
def predict(
    run: Path,
    images: list[Path],
    /,
    *,
    top: int = 3,
    device: str = "cpu",
    json: JsonFlag = False,
    csv: Path | None = None,
    parquet: Path | None = None,
    resume: Annotated[bool, Parameter(negative="")] = False,
    maps: Path | None = None,
) -> None:
    """Classify images with a trained network.

    Parameters
    ----------
    run
        The folder that `nin train` made.
    images
        Image files; a folder stands for all images in it. Or one folder, pattern or URL of WebDataset shards.
    top
        How many classes to show for each image.
    device
        Where to compute: cpu, cuda, cuda:1, mps.
    json
        Print the predictions as JSON on standard output.
    csv
        Write the predictions, with the probability of every class, into this file, however many there are.
    parquet
        The same as a Parquet file.
    resume
        Go on with the file where an interrupted command stopped.
    maps
        Write into this folder, for each image, where in it the evidence for its class lies.
    """
    from nin.cli import commands

    if csv is not None and parquet is not None:
        raise UserError("give --csv or --parquet, not both")
    if resume and csv is None and parquet is None:
        raise UserError("--resume goes on with a file: give --csv FILE or --parquet FILE")
    if parquet is not None and parquet.suffix != ".parquet":
        raise UserError(f"{parquet}: the name of a Parquet file must end in .parquet")
    table = csv or parquet
    commands.predict(run, images, top=top, device=device, as_json=json, table=table, resume=resume, maps=maps)


@app.command
def cost(
    model: str,
    /,
    *,
    classes: int | None = None,
    size: int | None = None,
    channels: int | None = None,
    count_only: bool = False,
    json: JsonFlag = False,
) -> None:
    """Count parameters, multiply-accumulates (MACs) and activation bytes of a network, layer by layer, and time them.

    Parameters
    ----------
    model
        nin_cifar, nin_imagenet, nin_digits, googlenet, or a run folder; or timm:NAME, torchvision:NAME,
        package.module:factory.
    classes
        Number of classes. The network's usual one if not given.
    size
        Height and width of the image, in pixels. What the network is meant for if not given.
    channels
        1 for grey images, 3 for colour.
    count_only
        Count, without running the network: no milliseconds, and no memory for the weights' results.
    json
        Print the figures as JSON on standard output.
    """
    from nin.cli import commands

    commands.cost(model, classes=classes, size=size, channels=channels, count_only=count_only, as_json=json)


@app.command
def bench(
    cases: list[str] | None = None,
    /,
    *,
    dtype: list[str] | None = None,
    engine: list[str] | None = None,
    device: str = "cpu",
    html: Path | None = None,
    json: JsonFlag = False,
) -> None:
    """Time the operator and whole networks beside other engines, in turn in one run, against this machine's limits.

    Parameters
    ----------
    cases
        Which to time; all if not given. `nin bench list` names them.
    dtype
        float32 or bfloat16; both if not given. May be given several times, as may the next.
    engine
        nin, eager NCHW, … ; all that are installed if not given.
    device
        Where to time: cpu, cuda, cuda:1.
    html
        Write a chart into this file.
    json
        Print the measurements as JSON on standard output.
    """
    from nin.cli import commands

    commands.bench(cases or [], dtypes=dtype or [], engines=engine or [], device=device, html=html, as_json=json)


@app.command
def narrow(
    run: Path | None = None,
    /,
    *,
    data: str,
    out: Path | None = None,
    latency: float | None = None,
    macs: float | None = None,
    parameters: float | None = None,
    budgets: str | None = None,
    finetune: int = 0,
    control: Annotated[bool, Parameter(negative="")] = False,
    skip: tuple[str, ...] = (),
    images: int = 512,
    batch: int | None = None,
    channels_last: Annotated[bool, Parameter(negative="")] = False,
    model: str | None = None,
    weights: Path | None = None,
    size: int | None = None,
    mean: str | None = None,
    std: str | None = None,
    data_dir: Path | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    json: JsonFlag = False,
) -> None:
    """Make a trained network narrower, and so faster: fewer channels where they are missed least.

    Stopped with Ctrl-C, the same command goes on.

    Parameters
    ----------
    run
        The folder that `nin train` or `nin narrow` made; or give --model and --weights.
    data
        What it was trained on, as for `nin train`. Some training images without their labels are looked at; the
        test images measure what was lost.
    out
        The folder to make. That of a run is a run: predict, report and narrow take it like any other. That of
        --model holds model.safetensors, plan.json, report.json and report.html.
    latency
        Time to be left, as a share of the original's, measured on this machine.
    macs
        Multiply-accumulates to be left, as a share of the original's.
    parameters
        Parameters to be left, as a share of the original's.
    budgets
        More shares, such as 0.8,0.6,0.45: accuracy against latency at each of them, in the report.
    finetune
        Epochs of training afterwards, by the original network's answers and the labels.
    control
        Train a uniformly thinner network for as many epochs as the original and the narrowed one together, and show
        it beside.
    skip
        Layers to leave alone: names, or patterns such as "blocks.0.*".
    images
        Training images to look at.
    batch
        Images at a time when it is timed: 1 for a program that answers one request after the other. 64 if not given.
    channels_last
        Keep the weights with the channels side by side in memory, which is often faster, and measure that.
    model
        Anybody's network: timm:NAME, torchvision:NAME, or package.module:function that makes it without arguments.
    weights
        Its weights: model.safetensors, or a state_dict that torch.save wrote (read without running code).
    size
        With --model: height and width that images are brought to, in pixels; 224 for a folder of images.
    mean
        With --model: the channels' mean, such as 0.485,0.456,0.406; ImageNet's if not given.
    std
        With --model: the channels' standard deviation; ImageNet's if not given.
    data_dir
        Where the files of mnist to svhn lie.
    dry_run
        Print the plan only.
    json
        Print the figures as JSON on standard output.
    """
    from nin.cli import commands
    from nin.data import DATASET_NAMES
    from nin.narrowing.workflow_api import Preparation, ShrinkingConfig

    given = {"latency": latency, "macs": macs, "parameters": parameters}
    config = ShrinkingConfig(
        {name: value for name, value in given.items() if value is not None},
        _numbers("budgets", budgets),
        skip,
        images=images,
        finetune=finetune,
        control=control,
        batch=batch,
        channels_last=channels_last,
        dry_run=dry_run,
    )
    if (run is None) == (model is None) or (model is None) != (weights is None):
        raise UserError("give a run folder, or --model package.module:factory with --weights FILE")
    if run is not None:
        if size is not None or mean is not None or std is not None:
            raise UserError("--size, --mean and --std go with --model: a run folder knows its own")
        commands.narrow(data, loading={"data_dir": data_dir}, config=config, out=out, run=run, as_json=json)
        return
    assert model is not None
    assert weights is not None
    size = size or (None if data in DATASET_NAMES else 224)
    commands.narrow_network(
        data,
        loading={"data_dir": data_dir, "size": size},
        config=config,
        out=out,
        factory=model,
        weights=weights,
        preparation=Preparation(_numbers("mean", mean), _numbers("std", std)),
        as_json=json,
    )


def _numbers(name: str, text: str | None) -> tuple[float, ...]:
    """Return numbers that are written with commas between them."""
    try:
        return tuple(float(part) for part in (text or "").split(",") if part.strip())
    except ValueError as error:
        raise UserError(f"{name} must be numbers with commas between them, such as 0.8,0.6, got {text!r}") from error


@app.command
def export(
    run: Path,
    /,
    *,
    format: Literal["onnx", "pt2", "openvino"] = "onnx",
    out: Path | None = None,
    preprocessing: Annotated[bool, Parameter(negative="")] = False,
    json: JsonFlag = False,
) -> None:
    """Write a trained network into a file that runs where nin is not installed, and check it.

    Parameters
    ----------
    run
        The folder that `nin train` or `nin narrow` made.
    format
        onnx; pt2, for torch.export.load; or openvino.
    out
        The file to write; model.onnx, model.pt2 or model.xml in the run folder if not given.
    preprocessing
        Put the normalisation inside: the file then takes pixels (N, H, W, C), uint8.
    json
        Print what was written as JSON on standard output.
    """
    from nin.cli import commands

    commands.export(run, format=format, out=out, preprocessing=preprocessing, as_json=json)


@app.command
def report(run: Path, /, *, page: Path | None = None, beside: Path | None = None) -> None:
    """Write the report of a run folder again.

    Parameters
    ----------
    run
        The folder that `nin train` made.
    page
        Write into this folder instead a copy of the page of `nin serve`, with some of the run's test images: it opens
        from the disk, or from any web host.
    beside
        With --page: another run folder to look at beside it, as for `nin serve`.
    """
    from nin.cli import commands

    if beside is not None and page is None:
        raise UserError("--beside is for the page: nin report RUN --page DIR --beside RUN")
    commands.report(run, page=page, beside=beside)


@app.command
def serve(
    run: Path | None = None,
    /,
    *,
    beside: Path | None = None,
    port: int | None = None,
    host: str = "127.0.0.1",
    browser: bool = True,
    device: str = "cpu",
) -> None:
    """Open the page where you look inside a 1×1 convolution, and inside your own network; with an HTTP API.

    Parameters
    ----------
    run
        The folder that `nin train` made. Without it there is the lesson alone.
    beside
        Another run folder of the same classes, such as the one that `nin narrow` made, to look at side by side.
    port
        To listen on. 8646, or the next one that is free, if not given; 0 takes any.
    host
        The address to listen on. The default is reached from this machine only.
    browser
        Open the page in the browser.
    device
        Where to compute: cpu, cuda, cuda:1, mps.
    """
    from nin.cli import commands

    if beside is not None and run is None:
        raise UserError("--beside needs a run to be beside of: nin serve RUN --beside RUN")
    commands.serve(run, beside=beside, port=port, host=host, browser=browser, device=device)


def main(arguments: list[str] | None = None) -> None:
    """Run one verb and exit: 0 where the work was done, 2 for a wrong argument, 130 after Ctrl-C."""
    # what is odd about an image is said by nin, once
    warnings.filterwarnings("ignore", module="PIL")
    # a file's name that is no valid Unicode is shown as on standard error, with backslashes
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _stop(f"{error}", 2)
    except UserError as error:
        _stop(f"{error}", 2)
    except KeyboardInterrupt:
        _stop("stopped", 130)
    except OSError as error:
        _stop(f"{error.filename}: {error.strerror}" if error.filename else f"{error}", 1)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _stop("out of memory; lower --batch-size, --size or --threads, or take a smaller --model", 1)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory; PyTorch says so by a class on a GPU and in words on the CPU."""
    by_class = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return by_class or "can't allocate memory" in str(error) or "not enough memory" in str(error)


def _stop(message: str, status: int) -> NoReturn:
    """Print one line to standard error and exit."""
    rank = torchrun.rank()
    print(f"nin: {f'process {rank}: ' if rank else ''}{' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
