"""Shared by the GPU benchmarks: timing, the machine's description, and result files."""

from __future__ import annotations

import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nin import checkpoint
from nin.runtime.files import write_atomically


def choose_device(*, dry: bool) -> torch.device:
    """Return the GPU, or the CPU for a dry run."""
    if dry:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here: --dry-run runs the script on small tensors on the CPU")
    return torch.device("cuda")


def time_once_ms(call: Callable[[int], Any], turn: int, device: torch.device) -> float:
    """Return the time of one call: by events on a GPU, by the clock on the CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        call(turn)
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call(turn)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def compare(
    calls: dict[str, Callable[[int], Any]], device: torch.device, *, seconds: float, runs: int, warmup: int = 5
) -> dict[str, dict[str, float]]:
    """Time calls in turn: each round runs every one once, on the next input; at most ``runs`` rounds or ``seconds``."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for turn in range(warmup if device.type == "cuda" else 1):
            time_once_ms(call, turn, device)
    started = time.monotonic()
    for turn in range(runs):
        for name, call in calls.items():
            times[name].append(time_once_ms(call, turn, device))
        if turn >= 4 and time.monotonic() - started > seconds * len(calls):
            break
    return {name: summary(values) for name, values in times.items()}


def summary(values: list[float]) -> dict[str, float]:
    """Return the median and the 20th and 80th percentile."""
    low, _, _, high = statistics.quantiles(values, n=5, method="inclusive")
    return {"median_ms": statistics.median(values), "low_ms": low, "high_ms": high, "runs": len(values)}


def copy_bytes_per_second(device: torch.device) -> float:
    """Return the bytes that a copy reads and writes in a second."""
    source = torch.empty(1 << 30 if device.type == "cuda" else 1 << 20, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    times = compare({"copy": lambda turn: target.copy_(source)}, device, seconds=1.0, runs=20)
    return 2 * source.numel() / times["copy"]["median_ms"] * 1e3


def machine(device: torch.device) -> dict[str, Any]:
    """Return device, date and environment of a measurement."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, dry run: no measurement"
    return {
        "device": name,
        "date": datetime.date.today().isoformat(),
        "environment": checkpoint.environment(),
        "tuned": os.environ.get("NIN_GPU_TUNE", "1"),
    }


def title(name: str, header: dict[str, Any]) -> str:
    """Return the head of a results page."""
    versions = ", ".join(f"{key} {value}" for key, value in header["environment"].items() if key != "backends")
    return f"# {name}\n\n{header['device']}; {header['date']}; {versions}; NIN_GPU_TUNE={header['tuned']}\n\n"


def write(folder: Path, name: str, values: dict[str, Any], page: str) -> None:
    """Write NAME.json and NAME.md."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.json", json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / f"{name}.md", page)
    print(f"written: {folder / name}.json and .md")
