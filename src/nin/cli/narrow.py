"""`nin narrow`: a run, or anybody's network, becomes a narrower one."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from nin import checkpoint, training
from nin import report as reports
from nin.cli.console import Bar, print_json, results, stop_requests, words
from nin.cli.train import load_data, show_from_first, write_report
from nin.errors import UserError
from nin.narrowing import NarrowReport, workflow_api
from nin.runtime import distributed
from nin.runtime.files import write_atomically


def narrow(
    source: str,
    *,
    loading: dict[str, Any],
    config: workflow_api.ShrinkingConfig,
    out: Path | None,
    run: Path,
    as_json: bool,
) -> None:
    """Narrow the network of a run folder, write the new one with its reports, and show what it cost."""
    check_out(out, config)
    show_from_first()
    images = load_data(source, **loading)
    with narrowing_visibly() as how:
        result = workflow_api.shrink(run, images, config, out=out, **how)
    if not distributed.is_main_process():
        return
    if out is not None and not config.dry_run:
        page = reports.render_narrowing_report(result.report, f"{out.name}: narrowed from {run.name}")
        write_atomically(out / "narrowing.html", page)
        write_report(out, images)
    show_narrowing(result.report, out, as_json)
    if out is not None and not config.dry_run:
        words.print(f"What it cost: {out / 'narrowing.html'}\nUse it:       nin predict {out} IMAGE…")


def narrow_network(
    source: str,
    *,
    loading: dict[str, Any],
    config: workflow_api.ShrinkingConfig,
    out: Path | None,
    factory: str,
    weights: Path,
    preparation: workflow_api.Preparation,
    as_json: bool,
) -> None:
    """Narrow somebody's network, write the new one with its plan and its report, and show what it cost."""
    check_out(out, config)
    show_from_first()
    model = workflow_api.load_network(factory, weights)
    images = load_data(source, **loading)
    cache = weights.with_suffix(".narrowing.safetensors")
    with narrowing_visibly() as how:
        result = workflow_api.shrink_network(model, images, preparation, config, out=out, cache=cache, **how)
    if not distributed.is_main_process():
        return
    if out is not None and not config.dry_run:
        page = reports.render_narrowing_report(result.report, f"{out.name}: narrowed from {factory}")
        write_atomically(out / "report.html", page)
    show_narrowing(result.report, out, as_json)
    if out is not None and not config.dry_run:
        words.print(f"What it cost: {out / 'report.html'}\nUse it, in Python, with nin or, once it is loaded, without:")
        words.print(code_to_load(factory, out))


def code_to_load(factory: str, out: Path) -> str:
    """Return Python that makes the narrowed network of a folder again."""
    plan, weights = str(out / "plan.json"), str(out / checkpoint.MODEL_FILE)
    return (
        "import pathlib, nin, safetensors.torch\n"
        "from nin.models.factory import make_network\n"
        f"model = nin.apply_plan(make_network({factory!r}).model, pathlib.Path({plan!r}).read_text())\n"
        f"model.load_state_dict(safetensors.torch.load_file({weights!r}))"
    )


def check_out(out: Path | None, config: workflow_api.ShrinkingConfig) -> None:
    """Stop where it is not said where the result goes."""
    if out is None and not config.dry_run:
        raise UserError("--out must name the folder to make, or give --dry-run to see the plan only")


@contextlib.contextmanager
def narrowing_visibly() -> Iterator[dict[str, Any]]:
    """Show how far a narrowing is; Ctrl-C and SIGTERM end it where it can go on."""
    with Bar("Narrowing") as bar, stop_requests() as stopped, distributed.process_group(torch.device("cpu")):
        try:
            yield {
                "keeping": training.CheckpointOptions(stop=lambda: bool(stopped)),
                "on_progress": lambda text, done, total: bar.update(done, total, text),
            }
        except KeyboardInterrupt:
            bar.line("What was found is kept: the same command goes on.")
            if stopped[:1] == [signal.SIGTERM]:
                sys.exit(128 + signal.SIGTERM)
            raise


def show_narrowing(report: NarrowReport, out: Path | None, as_json: bool) -> None:
    """Print what a narrowing cost."""
    if as_json:
        print_json({"run": None if out is None else str(out), **report.to_dict()})
        return
    for title, rows in (
        ("The whole", [("", "before", "after", "share"), *report.summary()]),
        ("Several budgets", report.curve_rows()),
        ("Beside the control", report.control_rows()),
        ("Each layer", report.rows()),
    ):
        if rows:
            table = Table(*rows[0], title=title)
            for row in rows[1:]:
                table.add_row(*row)
            results.print(table)
    for note in report.notes:
        words.print(note)
