"""Chooses among the ways to cut a kernel: by measuring where that is asked for, else the default, the first.

``NIN_GPU_TUNE=1`` measures each way once for each kernel, shape and dtype, and keeps the answer in a file
(``NIN_GPU_CACHE``, else ``~/.cache/nin/gpu-tiles.json``). Kept answers are used whether or not measuring is on.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

VARIABLE, CACHE_VARIABLE = "NIN_GPU_TUNE", "NIN_GPU_CACHE"
RUNS = 7

T = TypeVar("T")


def choose(kernel: str, shape: Sequence[Any], x: Tensor, candidates: Sequence[T], run: Callable[[T], None]) -> T:
    """Return the candidate that is kept for this problem, or the fastest one if measuring is on, or the first.

    Args:
        kernel: its name.
        shape: the numbers that the answer depends on.
        x: the input, for its dtype and device.
        candidates: the ways, the default first.
        run: launches the kernel one way; it may be called several times.
    """
    if len(candidates) < 2 or not all(isinstance(number, int) for number in shape):
        return candidates[0]
    key = f"{kernel} {'x'.join(str(number) for number in shape)} {str(x.dtype).removeprefix('torch.')} {where(x)}"
    answers = read_answers(cache_file())
    if key not in answers and os.environ.get(VARIABLE) == "1" and can_measure(x):
        times = [measure_ms(lambda way=way: run(way)) for way in candidates]  # type: ignore[misc]
        answers[key] = str(candidates[times.index(min(times))])
        keep(cache_file(), answers)
    return next((way for way in candidates if str(way) == answers.get(key)), candidates[0])


def where(x: Tensor) -> str:
    """Return the device and the compiler that an answer is good for."""
    return f"{torch.cuda.get_device_name(x.device) if x.is_cuda and torch.cuda.is_available() else 'no GPU'}, " \
        f"triton {triton.__version__}"  # fmt: skip


def can_measure(x: Tensor) -> bool:
    """Return whether a kernel can be run and timed now: on a GPU, not while a graph is traced or captured."""
    return type(x) is Tensor and x.is_cuda and not torch.cuda.is_current_stream_capturing()


def measure_ms(call: Callable[[], None]) -> float:
    """Return the median time of a call on the GPU, compiled before."""
    call()
    times = []
    for _ in range(RUNS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def cache_file() -> Path:
    """Return where answers are kept."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache/nin/gpu-tiles.json")


@functools.cache
def read_answers(path: Path) -> dict[str, str]:
    """Return the kept answers; a file that is not whole counts as none."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def keep(path: Path, answers: dict[str, str]) -> None:
    """Write the answers beside their place and rename, so that other processes never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(answers, indent=1) + "\n")
    beside.replace(path)
