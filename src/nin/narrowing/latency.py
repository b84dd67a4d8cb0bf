"""Measured latencies on this device: of chains of layers, in a table, and of whole models before and after."""

import dataclasses
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
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

# Seconds that the calls of one whole model are timed for, and how many calls these are at least and at most: where
# others work on the machine too, short ones need many, or all of them fall into a bad moment. Where the times still
# spread by more than this fraction, so many times as long.
MODEL_SECONDS, RUNS, MODEL_SPREAD, MODEL_REPEATS = 0.5, (7, 101), 0.1, 4

# A layer is timed in turn with a reference, so that other load slows both: pairs of calls at least and at most, until
# the middle half of their ratios is narrower than this fraction, or the seconds are over.
PAIRS, LAYER_SPREAD, LAYER_SECONDS = (7, 61), 0.1, 0.05

# The reference: channels of a 3×3 convolution, its height and width, called as often as takes about as long.
REFERENCE_CHANNELS, REFERENCE_SIZE = 64, 28

# On a CPU a layer is timed with as many images as make so many multiply-accumulates, and its time is taken to grow with
# their number from there: 64 photos in a wide layer would take seconds for each of a thousand candidates.
TIMED_MACS = 60e6

# what a table holds beside the chains' milliseconds
_REFERENCE_KEY = "reference"


class LatencyTable:
    """Milliseconds of chains of layers, measured when they are first asked for and then looked up.

    A chain's time is its ratio to a reference that is timed in turn with it, times that of the reference when it was
    first timed: so all entries of a table are for a machine in the same state, whatever else works on it meanwhile.

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
        self.setting = " · ".join(map(str, (*words, "beside a reference")))
        self.others = _read_tables(cache)
        self.known = self.others.pop(self.setting, {})

    def __call__(self, chain: tuple[LayerSpec, ...]) -> float:
        """Return the milliseconds of a chain, for as many calls as the model makes."""
        same, key = _unnamed(chain), _key(chain)
        if key not in self.known:
            purpose, done, total = self.progress
            self.on_progress(f"Timing layers{purpose}, {self.measured:,} timed", done, total)
            self.measured += 1
            self.known[key] = self.measure(same)
        return chain[0].calls * self.known[key]

    def forget(self, chains: Iterable[tuple[LayerSpec, ...]]) -> dict[str, float]:
        """Drop what is known of chains, so that they are measured again, and return it."""
        keys = {_key(chain) for chain in chains}
        return {key: self.known.pop(key) for key in keys & self.known.keys()}

    def measure(self, chain: tuple[LayerSpec, ...]) -> float:
        """Time a chain with random weights: the values do not matter."""
        module: nn.Module = nn.Sequential(*(spec.make_layer(self.like) for spec in chain)).eval()
        first, batch = chain[0], self._timed_batch(chain)
        values = (first.input_size[0], first.in_channels)
        size = values if first.kind == "linear" else (first.in_channels, *first.input_size)
        x = torch.randn((batch, *size), device=self.like.device, dtype=self.like.dtype)
        if x.dim() == 4:
            module, x = to_layout(module, self.layout), _in_layout(x, self.layout)
        ratio = _steady_ratio(lambda: module(x), self._reference, x.device)
        if _REFERENCE_KEY not in self.known:
            self.known[_REFERENCE_KEY] = _time({"reference": self._reference}, x.device, MODEL_SECONDS)[
                "reference"
            ].low_ms
        return ratio * self.known[_REFERENCE_KEY] * self.batch / batch

    def _timed_batch(self, chain: tuple[LayerSpec, ...]) -> int:
        """Return the number of images that a chain is timed with."""
        if self.like.is_cuda:  # a part of a GPU takes as long as the whole
            return self.batch
        each = sum(spec.macs for spec in chain)
        return min(self.batch, max(1, math.ceil(TIMED_MACS / max(1, each))))

    @functools.cached_property
    def _reference(self) -> Callable[[], Any]:
        """The call that every chain is timed beside."""
        sizes = (REFERENCE_CHANNELS, REFERENCE_SIZE, REFERENCE_SIZE)
        convolution: nn.Module = nn.Conv2d(
            REFERENCE_CHANNELS, REFERENCE_CHANNELS, 3, padding=1, device=self.like.device, dtype=self.like.dtype
        ).eval()
        x = torch.randn((1, *sizes), device=self.like.device, dtype=self.like.dtype)
        convolution, x = to_layout(convolution, self.layout), _in_layout(x, self.layout)
        return lambda: convolution(x)

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
        for _ in range(MODEL_REPEATS - 1):
            if all(t.high_ms - t.low_ms <= MODEL_SPREAD * t.median_ms for t in times.values()):
                break
            again = _time(calls, self.device, MODEL_SECONDS)
            # other load only makes times longer: of two rounds the one with the smaller spread is nearer to the truth
            times = min(times, again, key=lambda one: max((t.high_ms - t.low_ms) / t.median_ms for t in one.values()))
        return times["before"], times["after"]


def _unnamed(chain: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
    """Return a chain without what its time does not depend on: equal geometries are measured once."""
    return tuple(dataclasses.replace(spec, name="", calls=1) for spec in chain)


def _key(chain: tuple[LayerSpec, ...]) -> str:
    """Return a chain's name in a table."""
    return json.dumps([dataclasses.astuple(spec) for spec in _unnamed(chain)])


def _synchronised(call: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """Return a call that waits until a GPU has done its work."""

    def run() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


@torch.inference_mode()
def _time(calls: dict[str, Callable[[], Any]], device: torch.device, seconds: float) -> dict[str, timer.Timing]:
    """Time calls side by side, the first of them for about so many seconds."""
    timed: dict[str, Callable[[], object]] = {name: _synchronised(call, device) for name, call in calls.items()}
    first = next(iter(timed.values()))
    first()  # the first call is slower
    # the fastest of a few: another program may take the processor in the middle of one
    fastest = min(_seconds(first, 1) for _ in range(3))
    least, most = RUNS
    runs = min(max(int(seconds / fastest), least), most)
    return timer.time_interleaved(timed, runs=runs, warmup=2)


@torch.inference_mode()
def _steady_ratio(call: Callable[[], Any], reference: Callable[[], Any], device: torch.device) -> float:
    """Return how many times as long as a reference a call takes: the median over pairs of them, until it is steady."""
    timed, beside = _synchronised(call, device), _synchronised(reference, device)
    for warm_up in (timed, beside):
        warm_up()
    end = time.perf_counter() + LAYER_SECONDS
    repeats = max(1, min(100, round(_seconds(timed, 1) / _seconds(beside, 1))))
    ratios: list[float] = []
    least, most = PAIRS
    while len(ratios) < most:
        before = _seconds(beside, repeats)
        middle = _seconds(timed, 1)
        after = _seconds(beside, repeats)
        ratios.append(2 * repeats * middle / (before + after))
        if len(ratios) >= least:
            low, median, high = statistics.quantiles(ratios, n=4)
            if high - low <= LAYER_SPREAD * median or time.perf_counter() > end:
                break
    return statistics.median(ratios)


def _seconds(call: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start


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
