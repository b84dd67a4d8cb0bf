"""Tiles by measurement: time each candidate once, keep the fastest in a file; without tuning, the default.

``NIN_GPU_TUNE=1`` measures the candidates once for each kernel, shape and dtype, and keeps the fastest in a file
(``NIN_GPU_CACHE``, else ``~/.cache/nin/gpu-tiles.json``). The file is read whether or not tuning is on.
"""

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

TUNE_VARIABLE, CACHE_VARIABLE = "NIN_GPU_TUNE", "NIN_GPU_CACHE"
RUNS = 7

Tiles = TypeVar("Tiles")


def launch_tuned(
    kernel: str,
    shape: Sequence[Any],
    x: Tensor,
    candidates: Sequence[Tiles],
    launch: Callable[[Tiles], None],
    time_ms: Callable[[Callable[[], None]], float] | None = None,
) -> None:
    """Launch a kernel with the tiles kept for this problem, with the fastest if tuning is on, or with the default.

    Args:
        kernel: its name.
        shape: the numbers that the speed depends on.
        x: the input, for its dtype and device.
        candidates: tiles, the default first.
        launch: of the kernel with some tiles; it may be called several times.
        time_ms: returns the time of a call; `measure_ms` if not given, where the GPU can measure.
    """
    fastest = candidates[0]
    if len(candidates) > 1 and all(isinstance(number, int) for number in shape):  # no symbolic shape
        key = f"{kernel} {'x'.join(str(n) for n in shape)} {str(x.dtype).removeprefix('torch.')} {platform_name(x)}"
        kept = read_cache(cache_file())
        if key not in kept and os.environ.get(TUNE_VARIABLE) == "1" and (time_ms is not None or can_measure(x)):
            times = [(time_ms or measure_ms)(functools.partial(launch, tiles)) for tiles in candidates]
            kept[key] = str(candidates[times.index(min(times))])
            write_cache(cache_file(), kept)
        fastest = next((tiles for tiles in candidates if str(tiles) == kept.get(key)), fastest)
    launch(fastest)


def platform_name(x: Tensor) -> str:
    """Return the GPU and the compiler that a measurement is valid for."""
    gpu = torch.cuda.get_device_name(x.device) if x.is_cuda and torch.cuda.is_available() else "no GPU"
    return f"{gpu}, triton {triton.__version__}"


def can_measure(x: Tensor) -> bool:
    """Return whether a kernel can be run and timed now: on a GPU, not while a graph is traced or captured."""
    return type(x) is Tensor and x.is_cuda and not torch.cuda.is_current_stream_capturing()


def measure_ms(call: Callable[[], None]) -> float:
    """Return the median time of a call on the GPU, compilation not included."""
    call()  # compiles the kernel
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
    """Return the file of the measured tiles."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache/nin/gpu-tiles.json")


# cached, as each launch asks for it; `launch_tuned` adds what it measures to this same dictionary
@functools.cache
def read_cache(path: Path) -> dict[str, str]:
    """Return the kept tiles by problem; none where the file is absent or broken."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def write_cache(path: Path, kept: dict[str, str]) -> None:
    """Write the file beside its place and rename it, so that other processes never see half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(kept, indent=1) + "\n")
    beside.replace(path)
