"""`speed`: measure every sensible way to run a network faster, and keep the fastest that loses little."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nin import data, folders
from nin.engines.catalog import ENGINES
from nin.errors import UserError
from nin.runtime.files import locked_folder, write_atomically
from nin.runtime.progress import ProgressCallback, ignore_progress
from nin.speed_search.delivery import deliver
from nin.speed_search.page import render_page
from nin.speed_search.result import SpeedResult
from nin.speed_search.session import SearchSession
from nin.speed_search.settings import SHARES, TEST_IMAGES, SpeedSettings
from nin.speed_search.subject import load_subject


def speed(
    network: str | Path,
    images: str | Path | data.Data,
    *,
    lose: float = 1.0,
    batches: Sequence[int] = (1,),
    budgets: Sequence[float] = SHARES,
    narrow_by: str = "macs",
    finetune: int = 0,
    engines: Sequence[str] = tuple(ENGINES),
    threads: int | None = None,
    test_images: int = TEST_IMAGES,
    weights: str | Path | None = None,
    size: int | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    data_dir: str | Path | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
    trust: bool = False,
    stop: Callable[[], bool] = lambda: False,
    on_progress: ProgressCallback = ignore_progress,
) -> SpeedResult:
    """Measure every sensible way to run a network faster on this machine's CPU, and keep the fastest.

    The network as it is and narrowed, in float32, bfloat16 (where the processor multiplies in it) and static int8, in
    PyTorch eager, torch.compile, nin's operator (`nin.fuse`), ONNX Runtime and OpenVINO, as far as they are installed.
    Each combination has a process of its own. They are timed in turn, round by round.

    Args:
        network: a run folder; or ``timm:NAME``, ``torchvision:NAME``, ``package.module:factory``.
        images: as for `nin.data.load`, or a folder of images without classes. The test images compare the answers;
            layers are fitted and int8 is calibrated on training images only.
        lose: points of accuracy that may be lost; where the images have no labels for the network, per cent of the
            answers that may change.
        batches: images at a time that are timed; the first one decides which combination is the fastest.
        budgets: shares that narrowed forms keep, see ``narrow_by``; none for no narrowing.
        narrow_by: "macs", the multiplications, or "latency": then the shares are of the time in the engine that is the
            fastest for the network as it is, in which layers are timed (in float32; in PyTorch eager where that is
            torch.compile).
        finetune: epochs of training of each narrowed form.
        engines: names in `nin.engines.catalog.ENGINES`.
        threads: of every engine; the fastest number is looked for if not given.
        test_images: that are looked at, at most.
        weights: of a network that is given by its name: a file of safetensors or a ``state_dict`` that ``torch.save``
            wrote, which is read without running code.
        size: height and width that images are brought to, in pixels.
        mean: of each channel, that the network's input is normalised with.
        std: the same.
        data_dir: where the files of the named data sets lie.
        out: a folder to make: the fastest combination, ready to use, and what was measured. The same call goes on in
            it after an interruption.
        seed: chooses the calibration images.
        overwrite: remove an earlier search that lies in ``out`` before this one begins.
        trust: import the module that a run says its network is made by.
        stop: when it returns True, the search ends with KeyboardInterrupt.
        on_progress: called with what is being done, the number done and the number of all.

    Returns:
        Times, answers, sizes and the choice; prints as a table.

    Raises:
        UserError: an argument is wrong, the network does not take the images, or ``out`` holds something else.
        OSError: a file cannot be written.
        KeyboardInterrupt: ``stop`` said so; what was found is kept in ``out``.
    """
    settings = SpeedSettings(
        lose=float(lose),
        batches=tuple(dict.fromkeys(batches)),
        shares=tuple(sorted(dict.fromkeys(budgets), reverse=True)),
        narrow_by=narrow_by,
        finetune=finetune,
        engines=tuple(engines),
        threads=threads,
        test_images=test_images,
        seed=seed,
    )
    folder = None if out is None else Path(out)
    if folder is None and overwrite:
        raise UserError("overwrite goes with out, the folder whose result is to be replaced")
    if folder is not None:
        folders.check_search(folder, overwrite=overwrite)
    subject = load_subject(
        network,
        images,
        weights=None if weights is None else Path(weights),
        size=size,
        mean=tuple(mean),
        std=tuple(std),
        data_dir=None if data_dir is None else Path(data_dir),
        trust=trust,
        on_progress=on_progress,
    )
    with _working_folder(folder, overwrite=overwrite) as work:
        search = SearchSession(subject, settings, work, stop, on_progress)
        if folder is not None and (finished := _finished(folder, search.fingerprint)):
            return finished
        result = search.run()
        if folder is not None:
            if result.chosen is not None:
                on_progress("Checking the fastest", 0, 0)
                deliver(folder, result, subject, search.builder, search.pixels, search.scores_path(result.chosen))
            write_atomically(folder / folders.SPEED_PAGE, render_page(result))
            content = {"fingerprint": search.fingerprint, **result.to_dict()}
            write_atomically(folder / folders.SPEED_FILE, json.dumps(content, indent=2))
            shutil.rmtree(work)  # what is delivered is in the folder itself
    return result


@contextlib.contextmanager
def _working_folder(out: Path | None, *, overwrite: bool) -> Iterator[Path]:
    """Yield the folder for what is built: within ``out``, where it stays until the search has ended, or temporary."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="nin-speed-") as folder:
            yield Path(folder)
        return
    work = out / folders.WORK_FOLDER
    out.mkdir(parents=True, exist_ok=True)
    with locked_folder(out):
        if overwrite:
            folders.remove_search(out)
        work.mkdir(exist_ok=True)
        try:
            yield work
        finally:
            with contextlib.suppress(OSError):  # it is not empty: the search goes on in it
                work.rmdir()


def _finished(folder: Path, key: str) -> SpeedResult | None:
    """Return the result in a folder whose search has ended; None where there is none.

    Raises:
        UserError: it is that of another search, or damaged.
    """
    path = folder / folders.SPEED_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        before = values.pop("fingerprint")
        result = SpeedResult.from_dict(values)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): give another --out, or --overwrite") from error
    if before != key:
        raise UserError(f"{folder} holds the result of another search: give another --out, or --overwrite")
    return result
