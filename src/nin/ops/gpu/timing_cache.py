"""The file of what was measured: for each GPU and versions, the fastest way of each problem, and all times.

``NIN_GPU_CACHE`` names it, else ``~/.cache/nin/gpu-timings.json``. It is data only, checked when it is read: what is
damaged is measured again.
"""

import contextlib
import functools
import importlib
import json
import os
import secrets
import threading
import warnings
from pathlib import Path
from typing import Any

import torch

from nin.version import installed_version

CACHE_VARIABLE = "NIN_GPU_CACHE"
MAX_PLATFORMS, MAX_PROBLEMS = 8, 2000  # at about 300 bytes a problem: 5 MB; the oldest go first

# problem → {"fastest": engine, "us": {engine: microseconds}, "tiles": {kernel: tiles}, "left_out": [engine, …]}
Timings = dict[str, dict[str, Any]]

_lock = threading.Lock()
_read: dict[tuple[Path, str], Timings] = {}


def cache_file() -> Path:
    """Return the file of the measured times."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache/nin/gpu-timings.json")


@functools.cache
def platform_name(device: torch.device) -> str:
    """Return the GPU and the versions that a measurement holds for."""
    gpu = "no GPU"
    if device.type == "cuda" and torch.cuda.is_available():
        gpu = f"{torch.cuda.get_device_name(device)}, {'.'.join(map(str, torch.cuda.get_device_capability(device)))}"
    versions = f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    triton = importlib.import_module("triton").__version__  # slow to import, and loaded by now where kernels run
    return f"{gpu}, {versions}, triton {triton}, nin {installed_version()}"


def read_timing(platform: str, problem: str) -> dict[str, Any] | None:
    """Return what was measured for a problem, by this process or another one; None if nothing was."""
    file = cache_file()
    with _lock:
        if (file, platform) not in _read:
            _read[file, platform] = _read_file(file).get(platform, {})
        return _read[file, platform].get(problem)


def keep_timing(platform: str, problem: str, timing: dict[str, Any]) -> None:
    """Keep what was measured, for this process and for others. A file that cannot be written is warned of once."""
    file = cache_file()
    with _lock:
        _read.setdefault((file, platform), {})[problem] = timing
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with _lock_file(file):
                platforms = _read_file(file, warn=False)  # what other processes have kept meanwhile
                problems = platforms.pop(platform, {})
                problems.pop(problem, None)
                problems[problem] = timing
                # the last place is the newest
                platforms[platform] = dict(list(problems.items())[-MAX_PROBLEMS:])
                platforms = dict(list(platforms.items())[-MAX_PLATFORMS:])
                beside = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
                beside.write_text(json.dumps(platforms, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                beside.replace(file)
        except OSError as error:
            warn_once(f"nin: {file} cannot be written, so kernels are timed again next time: {error.strerror}")


@contextlib.contextmanager
def _lock_file(file: Path) -> Any:
    """Hold the lock that processes share, where the system has one: else the last writer's file stays, whole too."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(file.with_name(f"{file.name}.lock"), "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _read_file(file: Path, *, warn: bool = True) -> dict[str, Timings]:
    """Return the timings by platform; none where the file is absent, and with a warning where it is damaged."""
    try:
        platforms = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(platforms, dict) or not all(isinstance(problems, dict) for problems in platforms.values()):
            raise ValueError("not an object of objects")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        if warn:
            warn_once(f"nin: {file} is damaged ({error}); kernels are timed again")
        return {}
    whole = {
        platform: {name: timing for name, timing in problems.items() if _is_timing(timing)}
        for platform, problems in platforms.items()
    }
    if warn and whole != platforms:
        warn_once(f"nin: {file} has damaged entries; their kernels are timed again")
    return whole


def _is_timing(value: Any) -> bool:
    """Return whether an entry has the form of `Timings`."""
    return (
        isinstance(value, dict)
        and value.keys() == {"fastest", "us", "tiles", "left_out"}
        and isinstance(value["us"], dict)
        and all(isinstance(us, int | float) and us > 0 for us in value["us"].values())
        and value["fastest"] in value["us"]
        and isinstance(value["tiles"], dict)
        and all(isinstance(tiles, str) for tiles in value["tiles"].values())
        and isinstance(value["left_out"], list)
    )


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Warn of something once in this process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=2)
