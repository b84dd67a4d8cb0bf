"""The folders that nin makes: their files, and what one may hold before. Importing it does not import PyTorch."""

import os
from collections.abc import Collection
from pathlib import Path

from nin.epoch_metrics import LEARNING_RATE_FILE, METRICS_FILE, TIMINGS_FILE
from nin.errors import UserError
from nin.names import PARTIAL_SHARDS_FILE, SHARDS_FILE, shard_files
from nin.runtime.files import contents, remove

# of a run
MODEL_FILE, CONFIG_FILE, STATE_FILE = "model.safetensors", "config.json", "state.safetensors"
REPORT_FILE, FINDINGS_FILE = "report.html", "findings.csv"
# while a training runs: how far it is
PROGRESS_FILE = "progress.json"
_TABLES = (METRICS_FILE, TIMINGS_FILE, LEARNING_RATE_FILE, FINDINGS_FILE)
FILES = (MODEL_FILE, CONFIG_FILE, STATE_FILE, *_TABLES, REPORT_FILE, PROGRESS_FILE)
EVENTS_FOLDER = "tensorboard"

# of a cross-validation, beside the runs of the folds
FOLDS_FILE = "folds.json"

# of a narrowing: in a narrowed run, and in the folder of another package's network
NARROWING_FILE, NARROWING_PAGE = "narrowing.json", "narrowing.html"
PLAN_FILE, NARROW_REPORT_FILE = "plan.json", "report.json"
CONTROL_FOLDER, CONTROL_FILE = "control", "control.json"

# of `nin speed`: what was measured, the example, the page, and what is built while the search goes on
SPEED_FILE, EXAMPLE_FILE, SPEED_PAGE, WORK_FOLDER = "speed.json", "example.py", "speed.html", "search"

# of a training that has begun
OF_BEGUN = (STATE_FILE, PROGRESS_FILE)

# a training that was killed before it wrote anything else leaves the file that says how far it was
LEFT_BEHIND = (PROGRESS_FILE,)

_OF_RUN = {*FILES, EVENTS_FOLDER}
_OF_NARROWING = {*_OF_RUN, NARROWING_FILE, NARROWING_PAGE, PLAN_FILE, NARROW_REPORT_FILE, CONTROL_FOLDER, CONTROL_FILE}
_OF_SEARCH = {SPEED_FILE, EXAMPLE_FILE, SPEED_PAGE, WORK_FOLDER, MODEL_FILE, PLAN_FILE, "network.json"}
_OF_SEARCH |= {f"{stem}.{ending}" for stem in ("model", "int8") for ending in ("onnx", "xml", "bin")}


def has_begun(run: Path) -> bool:
    """Return whether a run folder has a state to resume from, or a result."""
    return (run / STATE_FILE).exists() or is_finished(run)


def is_finished(run: Path) -> bool:
    """Return whether a run folder has a result and no state: its training has ended."""
    return (run / CONFIG_FILE).exists() and not (run / STATE_FILE).exists()


def check_is_run(run: Path) -> None:
    """Check that a folder holds a run with a network.

    Raises:
        UserError: it does not.
    """
    if not run.exists():
        raise UserError(f"{run} does not exist: give a run folder, which nin train DATA --out RUN makes")
    if (run / STATE_FILE).is_file() and not (run / CONFIG_FILE).is_file():
        raise UserError(
            f"{run} is an unfinished run, stopped before its first epoch ended: there is no network yet. Go on "
            f"with: nin train DATA --out {run} --resume"
        )
    if not (run / CONFIG_FILE).is_file():
        raise UserError(f"{run} is not a run folder of nin: {_what_is_missing(run)}")


def _what_is_missing(path: Path) -> str:
    """Return why a path is no run folder, and what was probably meant: the folder around it, or those in it."""
    if path.is_file():
        inside = (path.parent / CONFIG_FILE).is_file()
        return f"it is a file; give the folder that it lies in, {path.parent}" if inside else "it is a file"
    found = sorted(str(file.parent) for file in path.glob(f"*/{CONFIG_FILE}") if (file.parent / MODEL_FILE).is_file())
    if found:
        return f"it holds {found[0]}{', …' if len(found) > 1 else ''}: give the folder of one run"
    return f"it has no {CONFIG_FILE}. Make one with: nin train DATA --out RUN"


def check_is_empty(out: Path, *, may_contain: Collection[str] | None = ()) -> None:
    """Check that a folder can be made; temporary files of interrupted writes do not count.

    Args:
        out: the folder.
        may_contain: names of files and folders that it may hold already; None allows all.

    Raises:
        UserError: it holds something else.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give another --out, which is the folder to make")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    names -= {path.name for name in FILES for path in out.glob(f".{name}.*")}
    if may_contain is not None and not names.issubset(may_contain):
        raise UserError(f"{out} is not empty: give another --out, or remove it")


def check_resume_or_overwrite(*, resume: bool, overwrite: bool) -> None:
    """Check that not both were asked for.

    Raises:
        UserError: they were.
    """
    if overwrite and resume:
        raise UserError("give resume or overwrite, not both: one goes on with what is there, the other removes it")


def check_run(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Check that a training may write its run folder.

    Raises:
        UserError: it holds an unfinished run that is not to be resumed, or something else; or it is to be resumed and
            overwritten.
    """
    check_resume_or_overwrite(resume=resume, overwrite=overwrite)
    if resume:
        return
    if overwrite:
        contents(out, _OF_RUN, "runs")
        return
    if (out / STATE_FILE).exists():
        raise UserError(f"{out} holds an unfinished run: go on with --resume, or give another --out, or --overwrite")
    if is_finished(out) and (out / MODEL_FILE).exists():
        resumed = "" if (out / REPORT_FILE).exists() else f"--resume writes its {REPORT_FILE}, which is missing; or "
        raise UserError(f"{out} is not empty, it holds a finished run: {resumed}give another --out, or --overwrite")
    check_is_empty(out, may_contain=LEFT_BEHIND)


def check_folds(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Check that a cross-validation may write its folder.

    Raises:
        UserError: it holds folds that are neither to be resumed nor overwritten, or something else; or it is a file.
    """
    check_resume_or_overwrite(resume=resume, overwrite=overwrite)
    folds = {path.name for path in out.glob("fold-*")}
    if folds and not (resume or overwrite):
        raise UserError(f"{out} holds folds already: go on with --resume, or give another --out, or --overwrite")
    check_is_empty(out, may_contain={*folds, FOLDS_FILE})


def check_narrowing(out: Path, run: Path | None, *, resume: bool, overwrite: bool) -> None:
    """Check that a narrowing may write its folder, which may hold an unfinished one.

    Args:
        out: the folder.
        run: what is narrowed, which is not overwritten.
        resume: whether to go on with what it holds.
        overwrite: whether to remove what it holds, if that is a narrowing.

    Raises:
        UserError: it holds something else.
    """
    check_resume_or_overwrite(resume=resume, overwrite=overwrite)
    if run is not None and out.resolve() == run.resolve():
        raise UserError(f"{out} is not empty, it is what is to be narrowed: give another --out")
    is_narrowed = (out / NARROWING_FILE).exists() or (out / NARROW_REPORT_FILE).exists()
    if is_narrowed and overwrite:
        contents(out, _OF_NARROWING, "what narrowing made")
    elif is_narrowed and not resume and not (out / STATE_FILE).exists():
        missing = missing_narrowing_pages(out)
        written = f", and writes {' and '.join(missing)}, which it lacks" if missing else ""
        raise UserError(
            f"{out} is not empty, it holds a finished narrowing: --resume prints it again{written}; or give another "
            "--out, or --overwrite"
        )
    elif not is_narrowed:
        check_is_empty(out, may_contain={STATE_FILE, CONTROL_FILE, CONTROL_FOLDER})


def missing_narrowing_pages(out: Path) -> list[str]:
    """Return the pages that a finished narrowing lacks, as where the disk was full when they were written."""
    pages = (NARROWING_PAGE, REPORT_FILE) if (out / NARROWING_FILE).exists() else (REPORT_FILE,)
    return [name for name in pages if not (out / name).exists()]


def check_search(out: Path, *, overwrite: bool) -> None:
    """Check that a folder is new, or that of a search for the fastest combination.

    Raises:
        UserError: it holds something else.
    """
    is_search = (out / WORK_FOLDER).is_dir() or (out / SPEED_FILE).is_file()
    if overwrite and (is_search or not out.exists()):
        contents(out, _OF_SEARCH, "what nin speed made")
    elif not is_search:
        check_is_empty(out)


def check_shards(out: Path, *, overwrite: bool) -> None:
    """Check that shards may be written into a folder, which may hold some already: they are gone on with, or removed.

    Raises:
        UserError: it holds something else.
    """
    if overwrite:
        contents(out, shard_files(out), "shards")
        return
    is_begun = any((out / name).is_file() for name in (SHARDS_FILE, PARTIAL_SHARDS_FILE))
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not is_begun:
        raise UserError(
            f"{out} holds something else than an interrupted call with these images and options: give another --out, "
            "or --overwrite, which removes shards"
        )


def check_page(folder: Path) -> None:
    """Check that a copy of the page may be written into a folder; an earlier one in it is replaced.

    Raises:
        UserError: it holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} must be a folder, got a file")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "data" / "page.js").is_file():
        raise UserError(
            f"{folder} must be empty, missing, or hold an earlier copy of the page: it holds something else"
        )


def check_new_file(path: Path, *, overwrite: bool) -> None:
    """Check that a file may be written.

    Raises:
        UserError: it is a folder or in none, or it exists and is not to be replaced.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{path} is a folder" if path.is_dir() else f"{path.parent}: there is no such folder")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: give another name, or --overwrite to replace it")


def check_can_make(folder: Path) -> None:
    """Check that files may be written into a folder that is there, or is to be made.

    Raises:
        UserError: they may not; the message names the folder, or the one in which it would be made.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        raise UserError(f"{place}: permission denied, nothing can be written there")


def remove_run(folder: Path) -> None:
    """Remove the files of a run from its folder, if there are any.

    Raises:
        UserError: the folder holds anything else; nothing is removed.
    """
    remove(contents(folder, _OF_RUN, "runs"))


def remove_narrowing(folder: Path) -> None:
    """Remove what a narrowing wrote into a folder, as `remove_run`."""
    remove(contents(folder, _OF_NARROWING, "what narrowing made"))


def remove_search(folder: Path) -> None:
    """Remove what a search for the fastest combination wrote into a folder, as `remove_run`."""
    remove(contents(folder, _OF_SEARCH, "what nin speed made"))
