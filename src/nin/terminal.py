"""What the shell's verbs do and show: progress and words on standard error, results on standard output."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from nin import (
    benchmark,
    checkpoint,
    costs,
    data,
    exporting,
    models,
    prediction,
    processes,
    shrinking,
    tabulation,
    training,
)
from nin import report as reports
from nin.errors import UserError
from nin.narrowing import NarrowReport
from nin.recipe import TrainConfig

words = Console(stderr=True, highlight=False, soft_wrap=True)
# a file or a pipe has no width: its lines are not broken
results = Console(highlight=False, width=None if sys.stdout.isatty() else 240)

# A log file gets a line about something that takes long no more often than this.
SECONDS_BETWEEN_LINES = 10.0

# A table of more classes is not read.
MOST_CLASSES = 40


class Bar:
    """A progress bar on a terminal; plain lines elsewhere, so that a log stays readable.

    Args:
        total: steps to be done; None where it is known later.
        text: what is being done.
    """

    def __init__(self, text: str, total: int | None = None) -> None:
        self.text, self.total, self.told = text, total, time.monotonic()
        self.task: TaskID | None = None
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=words,
            transient=True,
        )

    def __enter__(self) -> Bar:
        """Start to show."""
        if words.is_terminal:
            self.progress.start()
            self.task = self.progress.add_task(self.text, total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away."""
        if self.task is not None:
            self.progress.stop()

    def update(self, done: int, total: int, text: str | None = None) -> None:
        """Say that ``done`` of ``total`` steps are done."""
        text = text or self.text
        if self.task is not None:
            self.progress.update(self.task, completed=done, total=total, description=text)
        elif time.monotonic() - self.told > SECONDS_BETWEEN_LINES:
            self.told = time.monotonic()
            words.print(f"{text}: {done} of {total}")

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self.told = time.monotonic()
        words.print(text)


def train(
    source: str,
    *,
    out: Path,
    loading: dict[str, Any],
    config: TrainConfig,
    keeping: training.Keeping,
    as_json: bool,
) -> None:
    """Train, write the run folder and its report, and show the result."""
    show_from_first()
    images = load_data(source, seed=config.seed, **loading)
    if keeping.resume and training.is_finished(out):
        words.print(f"{out} is finished; this is its result.")
    result = train_visibly(images, config, out=out, keeping=keeping)
    if not processes.is_first():
        return
    path = write_report(out, images)
    if as_json:
        print_json({"run": str(out), **result.info.result, "model": result.info.recipe["model"]})
        return
    show_result(result)
    words.print(f"Look at what it learned: {path}\nUse it:                  nin predict {out} IMAGE…")


def show_from_first() -> None:
    """Let one of the processes that torchrun started speak, and not all of them."""
    if not processes.is_first():
        words.quiet = results.quiet = True


def load_data(source: str, **options: Any) -> data.Data:
    """Load a data set, showing progress, and tell what was left out."""
    with Bar(f"Reading {source}") as bar:
        images = data.load(source, on_progress=lambda text, done, total: bar.update(done, total, text), **options)
    for note in images.notes:
        words.print(note)
    show_findings(images.findings)
    size = f"{images.size}×{images.size} {'grey' if images.channels == 1 else 'colour'}"
    words.print(
        f"{images.name}: {len(images.train):,} images to train on, {len(images.test):,} to test, {size}, "
        f"{len(images.classes)} classes"
    )
    return images


def show_findings(findings: Sequence[data.Finding], *, most: int = 3) -> None:
    """Tell of each kind of finding how many there are, and the first ones."""
    kinds = Counter(finding.kind for finding in findings)
    for kind, count in kinds.items():
        words.print(f"{kind}, {count:,} {'file' if count == 1 else 'files'}: {data.MEANINGS[kind]}", style="bold")
        for finding in [finding for finding in findings if finding.kind == kind][:most]:
            words.print(f"  {finding.path}: {finding.detail}", markup=False)
        if count > most:
            words.print(f"  … and {count - most:,} more")


def check(source: str, *, as_json: bool, strict: bool, csv_path: Path | None, **options: Any) -> None:
    """Look at every image of a folder and show what was found.

    Raises:
        SystemExit: with status 1, strict and an image cannot be read or a training would not begin.
    """
    with Bar(f"Reading {source}") as bar:
        found = data.check(source, on_progress=lambda text, done, total: bar.update(done, total, text), **options)
    if csv_path is not None:
        checkpoint.write_atomically(csv_path, data.findings_csv(found.findings))
    if as_json:
        print_json(found.to_dict())
    else:
        show_check(found)
    bad = found.refusal is not None or any(finding.kind == "unreadable" for finding in found.findings)
    if strict and bad:
        sys.exit(1)


def show_check(found: data.Check) -> None:
    """Show the classes, and what is odd."""
    table = Table()
    for heading in ("class", "to train on", "to test"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    for name, train_count, test_count in found.classes[:MOST_CLASSES]:
        table.add_row(escape(name), f"{train_count:,}", f"{test_count:,}")
    if len(found.classes) > MOST_CLASSES:
        table.add_row(f"… and {len(found.classes) - MOST_CLASSES} more", "", "")
    results.print(table)
    for note in found.notes:
        words.print(note, markup=False)
    show_findings(found.findings, most=10)
    if found.refusal is not None:
        words.print(f"Nobody can train on this: {found.refusal}", markup=False)
    elif not found.findings:
        words.print(f"All {found.images:,} images are whole, each is there once, and each is what it says.")


def shards(source: str, out: Path, *, as_json: bool, **options: Any) -> None:
    """Write an image folder as shards."""
    with Bar(f"Reading {source}") as bar:
        written = data.write_shards(
            source, out, on_progress=lambda text, done, total: bar.update(done, total, text), **options
        )
    if as_json:
        print_json({"shards": [str(path) for path in written]})
    else:
        words.print(f"{len(written):,} shards in {out}\nUse them:  nin train {out} --out RUN")


def train_visibly(
    images: data.Data, config: TrainConfig, *, out: Path, keeping: training.Keeping | None = None
) -> training.TrainResult:
    """Train, with a bar on a terminal and a line for every epoch; Ctrl-C and SIGTERM end it after the step."""
    with Bar("Training") as bar, stop_requests() as stopped:

        def show(p: training.Progress) -> None:
            bar.update(p.step, p.steps, f"epoch {p.epoch}/{p.epochs}  loss {p.loss:.3f}")
            # a hundred short epochs get twenty lines
            if p.row and (p.epoch % max(1, p.epochs // 20) == 0 or p.epoch == p.epochs):
                bar.line(
                    f"epoch {p.epoch:3d}/{p.epochs}  train loss {p.row['train_loss']:.3f}  "
                    f"test accuracy {100 * p.row['test_accuracy']:.2f} %  {p.row['seconds']:.0f} s"
                )

        keeping = dataclasses.replace(keeping or training.Keeping(), stop=lambda: bool(stopped))
        try:
            return training.train(images, config, out=out, keeping=keeping, on_progress=show)
        except KeyboardInterrupt:
            kept = (out / checkpoint.STATE_FILE).exists()
            bar.line(f"Go on with the same command and --resume: {out}" if kept else "Nothing was written.")
            if stopped[:1] == [signal.SIGTERM]:
                sys.exit(128 + signal.SIGTERM)
            raise


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that a step is not torn; a second one ends the program at once.

    Where torchrun watches, it does not: the terminal and torchrun both pass a Ctrl-C on, and torchrun kills who does
    not end in time.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if processes.count() == 1:
            signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show_result(result: training.TrainResult) -> None:
    """Print the test accuracy with its interval, and what the network is."""
    r, info = result.info.result, result.info
    parameters = sum(p.numel() for p in result.model.parameters())
    results.print(
        f"test accuracy {percent(r['test_accuracy'], r['test_accuracy_interval'])}, {r['test_images']:,} images"
    )
    if "test_accuracy_flip" in r:
        value = percent(r["test_accuracy_flip"], r["test_accuracy_flip_interval"])
        results.print(f"  with a mirrored second view of each: {value}")
    seconds, recipe = r["seconds"], info.recipe
    duration = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.1f} minutes"
    words.print(f"{recipe['model']}, {parameters:,} parameters, trained for {duration} in {recipe['precision']}")


def percent(value: float, interval: Sequence[float]) -> str:
    """Return a share with its interval, in percent."""
    return f"{100 * value:.2f} % (95 % interval {100 * interval[0]:.2f} to {100 * interval[1]:.2f})"


def write_report(run: Path, images: data.Data | None) -> Path:
    """Write the report, showing progress: it predicts on all test images."""
    with Bar("Writing the report") as bar:
        return reports.write(run, images, on_progress=lambda text, done, total: bar.update(done, total, text))


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
    path = out or run / f"model{exporting.SUFFIXES[format]}"
    exported = exporting.export(run, path, format=format, preprocessing=preprocessing)
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


def predict(
    run: Path,
    images: Sequence[Path],
    *,
    top: int,
    device: str,
    as_json: bool,
    table: Path | None,
    resume: bool,
    maps: Path | None,
) -> None:
    """Classify images and show, write or draw the result."""
    classifier = prediction.load(run, device=device)
    source = find_shards(images) or data.PathList(find_images(images))
    if table is not None:
        tabulate(classifier, source, table, resume=resume)
    if table is not None and not as_json and maps is None:
        return
    if isinstance(source, data.ShardSet):
        raise UserError("predictions of shards are written into a file: give --csv FILE or --parquet FILE")
    named = {str(path) for path in images}
    paths: list[Path] = []
    predictions: list[prediction.Prediction] = []
    with Bar("Predicting", len(source)) as bar:
        for start in range(0, len(source), prediction.BATCH):
            readable = keep_readable(classifier, source[start : start + prediction.BATCH], named)
            predictions += classifier.predict([image for _, image in readable])
            paths += [path for path, _ in readable]
            bar.update(start + len(readable), len(source))
    if maps is not None:
        write_maps(classifier, paths, predictions, maps)
    if as_json:
        print_json([prediction_dict(classifier.classes, *pair, top) for pair in zip(paths, predictions, strict=True)])
    else:
        results.print(predictions_table(classifier.classes, paths, predictions, top))


def keep_readable(classifier: prediction.Classifier, paths: Sequence[str], named: set[str]) -> list[tuple[Path, Any]]:
    """Decode images; one that cannot be read is told of and left out, unless somebody asked for just this one."""
    p = classifier.info.preprocessing
    readable = []
    for path in paths:
        try:
            readable.append((Path(path), data.decode(path, size=p.size, channels=p.channels)))
        except UserError as error:
            if path in named:
                raise
            words.print(f"left out {error}", markup=False)
    return readable


def tabulate(
    classifier: prediction.Classifier, source: data.ShardSet | data.PathList, table: Path, *, resume: bool
) -> None:
    """Write the predictions into a file."""
    share, started = tabulation.Share.of_environment(), time.monotonic()
    with Bar("Predicting", len(source)) as bar:
        done = tabulation.tabulate(classifier, source, table, resume=resume, share=share, on_progress=bar.update)
    if share.rank:
        return
    new, seconds = done.images - done.before, time.monotonic() - started
    words.print(f"{len(source):,} images in {table}, {new:,} of them now, {new / seconds:,.0f} per second")
    if done.unreadable:
        words.print(f"{done.unreadable:,} cannot be read: their rows have a problem instead of a label")


def find_shards(paths: Sequence[Path]) -> data.ShardSet | None:
    """Return the shards if that is what is to be classified: one source of them."""
    return data.open_shards(paths[0]) if len(paths) == 1 and data.is_shards(paths[0]) else None


def find_images(paths: Sequence[Path]) -> Iterator[str]:
    """Yield the image files: those named, and those in the folders named.

    Raises:
        UserError: a path is missing, or a folder holds no image.
    """
    for path in paths:
        if path.is_dir():
            inside = sorted(data.images_below(path))
            if not inside:
                raise UserError(f"{path} holds no image: its files must end in {', '.join(sorted(data.EXTENSIONS))}")
            yield from inside
        elif path.exists():
            yield str(path)
        else:
            raise UserError(f"{path} does not exist")


def best(classes: Sequence[str], p: prediction.Prediction, top: int) -> list[tuple[str, float]]:
    """Return the most probable classes with their probabilities."""
    return sorted(zip(classes, p.probabilities, strict=True), key=lambda pair: -pair[1])[:top]


def prediction_dict(classes: Sequence[str], path: Path, p: prediction.Prediction, top: int) -> dict[str, Any]:
    """Return one prediction for JSON."""
    ranked = [{"class": name, "confidence": value} for name, value in best(classes, p, top)]
    return {"image": str(path), "label": p.label, "confidence": p.confidence, "top": ranked}


def predictions_table(
    classes: Sequence[str], paths: Sequence[Path], predictions: Sequence[prediction.Prediction], top: int
) -> Table:
    """Return the predictions for the terminal."""
    table = Table("image", "class", "confidence", "then")
    for path, p in zip(paths, predictions, strict=True):
        others = ", ".join(f"{name} {100 * value:.1f} %" for name, value in best(classes, p, top)[1:])
        table.add_row(str(path), p.label, f"{100 * p.confidence:.1f} %", others)
    return table


def write_maps(
    classifier: prediction.Classifier,
    paths: Sequence[Path],
    predictions: Sequence[prediction.Prediction],
    folder: Path,
) -> None:
    """Write one picture per image: where the evidence for its class lies."""
    folder.mkdir(parents=True, exist_ok=True)
    size = classifier.info.preprocessing.size
    for number, (path, p) in enumerate(zip(paths, predictions, strict=True)):
        values = classifier.confidence_maps(path)[0, classifier.classes.index(p.label)]
        pixels = data.decode(path, size=size, channels=classifier.info.preprocessing.channels)
        picture = reports.overlay(pixels, values, limit=reports.symmetric_limit(values), size=max(256, size))
        content = io.BytesIO()
        picture.save(content, format="PNG")
        # numbered, as two folders may hold files of one name
        checkpoint.write_atomically(folder / f"{number:04d}-{path.stem}.png", content.getvalue())


def cost(model: str, *, classes: int | None, size: int | None, channels: int | None, as_json: bool) -> None:
    """Count what a network of ours, or of a run folder, costs."""
    for name, value in (("classes", classes), ("size", size), ("channels", channels)):
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if model in models.MODELS:
        default = 1 if model == "nin_digits" else 3
        options = {} if channels is None else {"in_channels": channels}
        usual = 10 if model in ("nin_digits", "nin_cifar") else 1000
        network = models.create(model, classes or usual, **options)
        shape = (1, channels or default, *(2 * (size or models.IMAGE_SIZES[model],)))
    elif Path(model).is_dir():
        network, info = checkpoint.load_model(Path(model))
        p = info.preprocessing
        shape = (1, p.channels, size or p.size, size or p.size)
    else:
        raise UserError(f"model must be one of {', '.join(models.MODELS)}, or a run folder, got {model!r}")
    counted = costs.cost(network, shape)
    if as_json:
        print_json(counted.to_dict())
        return
    header, *rows = counted.rows()
    table = Table(title=f"{model}, input {'×'.join(map(str, shape))}; 1 MAC = 2 floating-point operations")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < 4 else "right")
    for row in rows[:-1]:
        table.add_row(*row)
    table.add_section()
    table.add_row(*rows[-1])
    results.print(table)


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
        checkpoint.write_atomically(html, benchmark.chart(measured))
    if as_json:
        print_json(measured.to_dict())
    else:
        results.print(benchmark.table(measured))


def narrow(
    source: str,
    *,
    loading: dict[str, Any],
    config: shrinking.ShrinkingConfig,
    out: Path | None,
    run: Path,
    as_json: bool,
) -> None:
    """Narrow the network of a run folder, write the new one with its reports, and show what it cost."""
    check_out(out, config)
    images = load_data(source, **loading)
    with narrowing_visibly() as how:
        result = shrinking.shrink(run, images, config, out=out, **how)
    if out is not None and not config.dry_run:
        page = reports.render_narrowing(result.report, f"{out.name}: narrowed from {run.name}")
        checkpoint.write_atomically(out / "narrowing.html", page)
        write_report(out, images)
    show_narrowing(result.report, out, as_json)
    if out is not None and not config.dry_run:
        words.print(f"What it cost: {out / 'narrowing.html'}\nUse it:       nin predict {out} IMAGE…")


def narrow_network(
    source: str,
    *,
    loading: dict[str, Any],
    config: shrinking.ShrinkingConfig,
    out: Path | None,
    factory: str,
    weights: Path,
    preparation: shrinking.Preparation,
    as_json: bool,
) -> None:
    """Narrow somebody's network, write the new one with its plan and its report, and show what it cost."""
    check_out(out, config)
    model = shrinking.load_network(factory, weights)
    images = load_data(source, **loading)
    cache = weights.with_suffix(".narrowing.safetensors")
    with narrowing_visibly() as how:
        result = shrinking.shrink_network(model, images, preparation, config, out=out, cache=cache, **how)
    if out is not None and not config.dry_run:
        page = reports.render_narrowing(result.report, f"{out.name}: narrowed from {factory}")
        checkpoint.write_atomically(out / "report.html", page)
    show_narrowing(result.report, out, as_json)
    if out is not None and not config.dry_run:
        words.print(f"What it cost: {out / 'report.html'}\nUse it, in Python, with nin or, once it is loaded, without:")
        module, _, name = factory.partition(":")
        words.print(
            f'  model = nin.apply_plan({module}.{name}(), open("{out / "plan.json"}").read())\n'
            f'  model.load_state_dict(safetensors.torch.load_file("{out / "model.safetensors"}"))'
        )


def check_out(out: Path | None, config: shrinking.ShrinkingConfig) -> None:
    """Stop where it is not said where the result goes."""
    if out is None and not config.dry_run:
        raise UserError("--out must name the folder to make, or give --dry-run to see the plan only")


@contextlib.contextmanager
def narrowing_visibly() -> Iterator[dict[str, Any]]:
    """Show how far a narrowing is; Ctrl-C and SIGTERM end it where it can go on."""
    with Bar("Narrowing") as bar, stop_requests() as stopped:
        try:
            yield {
                "keeping": training.Keeping(stop=lambda: bool(stopped)),
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


def print_json(value: Any) -> None:
    """Print JSON on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False))
