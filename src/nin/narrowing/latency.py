"""Measured latencies on this device: of chains of layers, in a table, and of whole models before and after."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nin.models.layer_spec import LayerSpec
from nin.models.surgery import to_layout
from nin.narrowing.calibration import model_inputs
from nin.runtime import timer
from nin.runtime.device import processor_name
from nin.runtime.files import write_atomically
from nin.runtime.model_copy import copy_model
from nin.runtime.progress import ProgressCallback, ignore_progress

# Seconds that the calls of one layer, and of one whole model, are timed for, and how many calls these are at least and
# at most: where others work on the machine too, short ones need many, or all of them fall into a bad moment.
LAYER_SECONDS, MODEL_SECONDS, RUNS = 0.02, 0.5, (7, 101)


class LatencyTable:
    """Milliseconds of chains of layers, measured when they are first asked for and then looked up.

    The 20th percentile of the timings counts: other load on the machine only makes them longer.

    Args:
        like: a tensor on the device and in the dtype to measure in.
        batch: images at a time.
        layout: "contiguous" or "channels_last".
        cache: a JSON file that `save` writes. Tables of another machine, PyTorch, number of threads, batch, dtype,
            layout or time spent on each stay in it and are not used.
        on_progress: called before each measurement.

    Attributes:
        progress: what the layers are timed for, and how many of all its steps are done; total 0 if not known.
        measured: number of chains that were timed.
    """

    def __init__(
        self,
        like: Tensor,
        batch: int,
        layout: str = "contiguous",
        *,
        cache: Path | None = None,
        on_progress: ProgressCallback = ignore_progress,
    ) -> None:
        self.like, self.batch, self.layout, self.cache = like, batch, layout, cache
        self.on_progress, self.measured = on_progress, 0
        self.progress: tuple[str, int, int] = ("", 0, 0)
        name = torch.cuda.get_device_name(like.device) if like.is_cuda else processor_name()
        words = (name, like.device, torch.__version__, torch.get_num_threads(), like.dtype, batch, layout)
        self.setting = " · ".join(map(str, (*words, f"{LAYER_SECONDS * 1e3:g} ms each")))
        self.others = _read_tables(cache)
        self.known = self.others.pop(self.setting, {})

    def __call__(self, chain: tuple[LayerSpec, ...]) -> float:
        """Return the milliseconds of a chain, for as many calls as the model makes."""
        # equal geometries are measured once, whatever the layers' names
        same = tuple(dataclasses.replace(spec, name="", calls=1) for spec in chain)
        key = json.dumps([dataclasses.astuple(spec) for spec in same])
        if key not in self.known:
            purpose, done, total = self.progress
            self.on_progress(f"Timing layers{purpose}, {self.measured:,} timed", done, total)
            self.measured += 1
            self.known[key] = self.measure(same)
        return chain[0].calls * self.known[key]

    def measure(self, chain: tuple[LayerSpec, ...]) -> float:
        """Time a chain with random weights: the values do not matter."""
        module: nn.Module = nn.Sequential(*(spec.make_layer(self.like) for spec in chain)).eval()
        first = chain[0]
        values = (first.input_size[0], first.in_channels)
        size = values if first.kind == "linear" else (first.in_channels, *first.input_size)
        x = torch.randn((self.batch, *size), device=self.like.device, dtype=self.like.dtype)
        if x.dim() == 4:
            module, x = to_layout(module, self.layout), _in_layout(x, self.layout)
        return _time({"chain": lambda: module(x)}, x.device, LAYER_SECONDS)["chain"].low_ms

    def save(self) -> None:
        """Write what was measured into the cache, if there is one."""
        if self.cache is None or not self.known:
            return
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.cache, json.dumps({**self.others, self.setting: self.known}))


def _read_tables(cache: Path | None) -> dict[str, dict[str, float]]:
    """Return the tables in the cache by setting; they can be measured again, so a damaged file is an empty one."""
    if cache is None or not cache.is_file():
        return {}
    try:
        tables = json.loads(cache.read_text())
        return {str(name): {str(k): float(v) for k, v in table.items()} for name, table in tables.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


class ModelTimer:
    """Times a model and its narrowed form side by side on a calibration batch.

    Args:
        original: the model before, in evaluation mode.
        batches: images; the first batch is repeated as needed.
        layout: "contiguous" or "channels_last".

    Attributes:
        device: that is timed, the original's.
    """

    def __init__(self, original: nn.Module, batches: list[Any], layout: str) -> None:
        self.original, self.batches, self.layout = original, batches, layout
        self.device = next(original.parameters()).device

    def compare(self, narrowed: nn.Module, batch: int) -> tuple[timer.Timing, timer.Timing]:
        """Return the timings before and after, with that many images at a time."""
        args, kwargs = pytree.tree_map(
            lambda t: _in_layout(_resized(t, batch), self.layout), next(model_inputs(self.batches))
        )
        narrowed = to_layout(copy_model(narrowed), self.layout).eval()
        calls = {"before": lambda: self.original(*args, **kwargs), "after": lambda: narrowed(*args, **kwargs)}
        times = _time(calls, self.device, MODEL_SECONDS)
        return times["before"], times["after"]


@torch.inference_mode()
def _time(calls: dict[str, Callable[[], Any]], device: torch.device, seconds: float) -> dict[str, timer.Timing]:
    """Time calls side by side, the first of them for about so many seconds."""

    def run(call: Callable[[], Any]) -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    timed: dict[str, Callable[[], object]] = {name: functools.partial(run, call) for name, call in calls.items()}
    first = next(iter(timed.values()))
    first()  # the first call is slower
    start = time.perf_counter()
    first()
    least, most = RUNS
    runs = min(max(int(seconds / (time.perf_counter() - start)), least), most)
    return timer.time_interleaved(timed, runs=runs, warmup=2)


def _resized(value: Any, batch: int) -> Any:
    """Return a tensor with that many rows, its own repeated as needed."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return value[torch.arange(batch) % len(value)]


def _in_layout(value: Any, layout: str) -> Any:
    """Return images (N, C, H, W) in that memory layout, and everything else as it is."""
    if layout == "channels_last" and isinstance(value, Tensor) and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value
