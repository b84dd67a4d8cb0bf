"""A combination's process, as seen from `nin.speed`: started, asked for times and scores, and ended."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nin.speed_search.runners import Setting, WorkerSpec


class WorkerError(RuntimeError):
    """The process of a combination ended; the message is the last line that it printed."""


class WorkerProcess:
    """One combination in a process of its own, so that its memory and threads are its engine's.

    It ends with the program that started it, see `nin.speed_search.parent_watch`. Ctrl-C reaches the program only.

    Args:
        spec: what it loads.
        folder: for its specification and what it prints.
        name: of these files.
    """

    def __init__(self, spec: WorkerSpec, folder: Path, name: str) -> None:
        self.log = folder / f"{name}.log"
        path = folder / f"{name}.json"
        path.write_text(spec.to_json(), encoding="utf-8")
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nin.speed_search.worker", str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=worker_environment(),
                start_new_session=True,
            )
        self.settings: dict[int, Setting] = {}
        self.peak_bytes = 0

    def wait_until_ready(self) -> None:
        """Wait until it has loaded its network and found its settings.

        Raises:
            WorkerError: it ended instead.
        """
        ready = self._answer()
        self.settings = {int(batch): Setting(**values) for batch, values in ready["settings"].items()}
        self.peak_bytes = ready["peak_bytes"]

    def time(self, batch: int) -> float:
        """Return the milliseconds of a call on that many images."""
        return float(self._ask("time", batch=batch)["ms"])

    def score(self, pixels: Path, out: Path) -> None:
        """Write the scores of the images in a file of NumPy, uint8 (N, C, H, W), into another."""
        self._ask("score", pixels=str(pixels), out=str(out))

    def _ask(self, verb: str, **values: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: `_answer` says why
            self.process.stdin.write(json.dumps({"verb": verb, **values}) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise WorkerError(self._reason())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _reason(self) -> str:
        """Return why it ended: its last line, or the signal."""
        code = self.process.wait()
        said = error_line(self.log.read_text(encoding="utf-8", errors="replace"))
        return said if code > 0 and said else f"its process ended with status {code}"

    def close(self) -> None:
        """End it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def error_line(printed: str) -> str:
    r"""Return the line in what a process printed that names an error, the last one, at most 240 characters of it.

    Example:
        >>> from nin.speed_search.processes import error_line
        >>> error_line("Traceback …\nValueError: no such file\n\nSet VERBOSE=1 for more")
        'ValueError: no such file'
    """
    lines = [" ".join(line.split()) for line in printed.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Failed|Compiler)\b.*:|[\w.]+Error$", line)]
    return next(iter(reversed(named or lines)), "")[:240]


def worker_environment() -> dict[str, str]:
    """Return the environment of a process: this one's, without what would set the number of threads for it."""
    left_out = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    # the current folder, where somebody's module may lie, and whatever this process can import
    # torch.compile's own pool of processes would outlive this one for a while, and is more memory than is delivered
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    return {**environment, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in ("", *sys.path))}
