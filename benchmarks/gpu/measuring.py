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
    calls: dict[str, Callable[[int], Any]],
    device: torch.device,
    *,
    seconds: float,
    runs: int,
    warmup: int = 5,
    divisor: int = 1,
) -> dict[str, dict[str, float]]:
    """Time calls in turn: each round runs every one once, on the next input; at most ``runs`` rounds or ``seconds``.

    Args:
        calls: by name.
        device: that they compute on.
        seconds: for the rounds of all of them.
        runs: rounds.
        warmup: calls before.
        divisor: of the times, where a call does its work several times.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for turn in range(warmup if device.type == "cuda" else 1):
            time_once_ms(call, turn, device)
    started = time.monotonic()
    for turn in range(runs):
        for name, call in calls.items():
            times[name].append(time_once_ms(call, turn, device) / divisor)
        if turn >= 4 and time.monotonic() - started > seconds:
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


class Budget:
    """The time that a piece may take, counted from when it is made.

    Args:
        seconds: in all.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.started = seconds, time.monotonic()

    def left(self) -> float:
        """Return the seconds that are left, 0 at least."""
        return max(0.0, self.started + self.seconds - time.monotonic())


class Results:
    """Rows that are written when they are measured: a stopped run keeps those that it has.

    Args:
        folder: for NAME.jsonl, a row a line, the first of them the machine, and for NAME.md.
        name: of the files.
        header: the machine, see `machine`.
        render: returns the page's body for the rows.
    """

    def __init__(
        self, folder: Path, name: str, header: dict[str, Any], render: Callable[[list[dict[str, Any]]], str]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.lines, self.page = folder / f"{name}.jsonl", folder / f"{name}.md"
        self.name, self.header, self.render = name, header, render
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self.lines.write_text(json.dumps(header, ensure_ascii=False) + "\n")
        self._refresh()

    def add(self, row: dict[str, Any]) -> None:
        """Write a row."""
        self.rows.append(row)
        self._append(row)

    def leave_out(self, what: str) -> None:
        """Say what was not measured because the time was over."""
        self.left_out.append(what)
        self._append({"left_out": what})
        print(f"left out, the time is over: {what}", flush=True)

    def _append(self, row: dict[str, Any]) -> None:
        with self.lines.open("a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._refresh()

    def _refresh(self) -> None:
        missing = f"\nLeft out, the time was over: {', '.join(self.left_out)}.\n" if self.left_out else ""
        write_atomically(self.page, title(self.name, self.header) + self.render(self.rows) + missing)
