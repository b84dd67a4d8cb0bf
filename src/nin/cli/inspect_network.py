"""`nin report`, `nin serve`, `nin export`, `nin cost` and `nin bench`: what there is to know about a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from torch import nn

from nin import checkpoint, exporters, models
from nin.cli.console import Bar, print_json, results, words
from nin.cli.train import write_report
from nin.errors import UserError
from nin.models import factory
from nin.profiling import bench as benchmark
from nin.profiling import cost as costs
from nin.runtime.files import write_atomically


def report(run: Path, *, page: Path | None, beside: Path | None) -> None:
    """Write the report of a run folder again, or a copy of the page."""
    if page is None:
        results.print(str(write_report(run, None)))
        return
    from nin import server  # no other verb needs a web server

    with Bar("Writing the page") as bar:
        index = server.write_copy(
            run, page, beside=beside, on_progress=lambda text, done, total: bar.update(done, total, text)
        )
    size = sum(path.stat().st_size for path in page.rglob("*") if path.is_file())
    words.print(f"{size / 2**20:.1f} MiB: open index.html in a browser, or put the folder on any web host.")
    results.print(str(index), soft_wrap=True)


def export(run: Path, *, format: str, out: Path | None, preprocessing: bool, as_json: bool) -> None:
    """Write a file for other programs, and say how it was checked."""
    path = out or run / f"model{exporters.SUFFIXES[format]}"
    exported = exporters.export(run, path, format=format, preprocessing=preprocessing)
    if as_json:
        print_json({**dataclasses.asdict(exported), "path": str(exported.path)})
        return
    results.print(str(exported))
    for key, value in exported.metadata.items():
        words.print(f"  {key}: {value}")


def serve(run: Path | None, *, beside: Path | None, port: int | None, host: str, browser: bool, device: str) -> None:
    """Serve the page until Ctrl-C."""
    from nin import server  # no other verb needs a web server

    def show(address: str) -> None:
        runs = " beside ".join(str(folder) for folder in (run, beside) if folder is not None)
        what = f"the lesson, and {runs} to look inside" if runs else "the lesson"
        words.print(f"{address}  {what}. The HTTP API is described at {address}api. Ctrl-C ends it.", soft_wrap=True)

    server.serve(run, beside=beside, port=port, host=host, browser=browser, device=device, on_start=show)


def cost(
    model: str, *, classes: int | None, size: int | None, channels: int | None, count_only: bool, as_json: bool
) -> None:
    """Count and time what a network of ours, of a run folder, or of another package costs."""
    for name, value in (("classes", classes), ("size", size), ("channels", channels)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    network, (usual_channels, height, width) = find_network(model, classes, channels)
    shape = (1, channels or usual_channels, size or height, size or width)
    counted = count(model, network, shape)
    if not count_only:
        with Bar("Timing the layers") as bar:
            counted = costs.cost(network, shape, measured=True, on_progress=bar.update)
    if as_json:
        print_json(counted.to_dict())
    else:
        show_cost(model, counted)


def find_network(model: str, classes: int | None, channels: int | None) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return a network of ours, of a run folder, or of another package, and (C, H, W) that it is meant for.

    Raises:
        UserError: there is none of that name, or a run folder is to have other classes or channels than its own.
    """
    if model in models.MODELS:
        default = 1 if model == "nin_digits" else 3
        options = {} if channels is None else {"in_channels": channels}
        usual = 10 if model in ("nin_digits", "nin_cifar") else 1000
        pixels = models.IMAGE_SIZES[model]
        return models.create(model, classes or usual, **options), (default, pixels, pixels)
    if Path(model).is_dir():
        if classes is not None or channels is not None:
            raise UserError(f"--classes and --channels go with the name of a network: {model} knows its own")
        network, info = checkpoint.load_model(Path(model))
        p = info.preprocessing
        return network, (p.channels, p.size, p.size)
    if factory.is_name(model):
        named = factory.make_network(model, classes=classes, channels=channels)
        return named.model.eval(), (named.channels, named.height, named.width)
    names = ", ".join(models.MODELS)
    raise UserError(f"model must be one of {names}, a run folder, or {factory.FORMS}; got {model!r}")


def count(model: str, network: nn.Module, shape: tuple[int, ...]) -> costs.Cost:
    """Return what a network costs, counted.

    Raises:
        UserError: it does not take such images.
    """
    try:
        return costs.cost(network, shape)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:  # each network has its own
        reason = " ".join(str(error).split())[:200].rstrip(".")
        images = "×".join(map(str, shape[1:]))
        raise UserError(f"{model} does not take images of {images}: {reason}; another --size may help") from error


def show_cost(model: str, counted: costs.Cost) -> None:
    """Print what a network costs, layer by layer."""
    header, *rows = counted.rows()
    shape = "×".join(map(str, counted.input_shape))
    table = Table(title=f"{model}, input {shape}; 1 MAC = 2 floating-point operations")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < 4 else "right")
    for row in rows[:-1]:
        table.add_row(*row)
    table.add_section()
    table.add_row(*rows[-1])
    results.print(table)
    if counted.uncounted:
        words.print(f"not counted: {', '.join(counted.uncounted)}")
    if counted.measured is not None:
        results.print(str(counted.measured))


def bench(
    cases: Sequence[str],
    *,
    dtypes: Sequence[str],
    engines: Sequence[str],
    device: str,
    html: Path | None,
    as_json: bool,
) -> None:
    """Time cases and engines in turn, and show the table."""
    if list(cases) == ["list"]:
        results.print("\n".join(benchmark.CASES))
        return
    chosen = {"cases": cases, "dtypes": dtypes, "engines": engines}
    try:
        measured = benchmark.run(**{k: v for k, v in chosen.items() if v}, device=device, progress=words.print)
    except ValueError as error:
        raise UserError(str(error)) from error
    if html is not None:
        write_atomically(html, benchmark.chart(measured))
    if as_json:
        print_json(measured.to_dict())
    else:
        results.print(benchmark.table(measured))
