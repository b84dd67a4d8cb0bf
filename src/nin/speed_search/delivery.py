"""Writes the chosen combination into a folder, ready to use, with the lines that load and call it, checked first."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from nin.errors import UserError
from nin.folders import EXAMPLE_FILE
from nin.runtime.files import write_atomically
from nin.speed_search.builder import Builder
from nin.speed_search.example_code import example
from nin.speed_search.parent_watch import lifeline
from nin.speed_search.processes import error_line, worker_environment
from nin.speed_search.quality import load_scores, scores_differ
from nin.speed_search.result import SpeedResult
from nin.speed_search.subject import Subject

# The largest difference of the example's scores from those that were measured, relative to the largest score: these are
# of the largest batch size, which may be summed in another order, and in int8 a rounding may then fall elsewhere.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "int8": 0.05}


def deliver(out: Path, result: SpeedResult, subject: Subject, builder: Builder, pixels: Path, scores: Path) -> None:
    """Write the chosen combination's files and its example, and check first that they give the scores measured.

    Args:
        out: the folder.
        result: with a choice.
        subject: the network and its images.
        builder: knows the files.
        pixels: a file of NumPy with test images, uint8 (N, C, H, W).
        scores: a file of NumPy with their scores in the chosen combination.

    Raises:
        UserError: the example fails or its scores are not those that were measured; nothing is written.
        OSError: a file cannot be written.
    """
    row = result.winner
    assert row is not None
    batch, path = result.batches[0], builder.path(row.combination)
    with tempfile.TemporaryDirectory(dir=out, prefix=".checked-") as folder:
        checked = Path(folder)
        for file in builder.files(row.combination):
            shutil.copy(file, checked / file.name)
        code = example(subject, row.combination, row.settings[batch], batch, path.name, f"The fastest {subject.name}")
        (checked / EXAMPLE_FILE).write_text(code, encoding="utf-8")
        got, count = run_example(checked, pixels, batch)
        expected = load_scores(scores)[:count]
        if not scores_differ(got, expected) <= TOLERANCE[row.combination.number]:
            raise UserError(
                f"{out} was not written: the scores of its example are not those that were measured, they differ by "
                f"{scores_differ(got, expected):.1e} of the largest"
            )
        # the example last: whoever sees it finds what it loads
        for file in sorted(checked.iterdir(), key=lambda file: file.name == EXAMPLE_FILE):
            if file.is_file():
                write_atomically(out / file.name, file.read_bytes())


def run_example(folder: Path, pixels: Path, batch: int) -> tuple[Tensor, int]:
    """Return the scores that the example in a folder gives for the first test images, and how many these are.

    It is run as a program, too, on the first of them as a file.

    Raises:
        UserError: it fails.
    """
    images = np.load(pixels, mmap_mode="r")[:batch]
    padded = np.concatenate([images, np.zeros((batch - len(images), *images.shape[1:]), np.uint8)])
    rows = images[0].transpose(1, 2, 0)
    with tempfile.TemporaryDirectory() as temporary:
        names = {name: str(Path(temporary) / name) for name in ("pixels.npy", "scores.npy", "image.png")}
        np.save(names["pixels.npy"], padded)
        Image.fromarray(rows[:, :, 0] if rows.shape[2] == 1 else rows).save(names["image.png"])
        command = [sys.executable, "-c", _CHECK, str(folder / EXAMPLE_FILE), *names.values()]
        with lifeline() as stdin:
            done = subprocess.run(
                command, stdin=stdin, capture_output=True, text=True, env=worker_environment(), check=False
            )
        if done.returncode:
            raise UserError(f"the example of the fastest combination failed: {error_line(done.stderr)}")
        return load_scores(Path(names["scores.npy"]))[: len(images)], len(images)


# runs the example on an image, and its function on the pixels of test images
_CHECK = """
from nin.speed_search.parent_watch import watch_parent
watch_parent()
import runpy, sys
import numpy as np
example, pixels, scores, image = sys.argv[1:]
sys.argv = [example, image]
np.save(scores, runpy.run_path(example)["scores"](np.load(pixels)))
"""
