"""What layers and models cost: multiply-accumulates, parameters, or milliseconds measured on this device."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nin.models.layer_shape import LayerShape, inputs_of, make_layer
from nin.models.surgery import to_layout
from nin.runtime import device as machine
from nin.runtime import timer
from nin.runtime.files import write_atomically

# Seconds that the calls of one layer, and of one whole model, are timed for, and how many calls these are at least and
# at most: where others work on the machine too, short ones need many, or all of them fall into a bad moment.
LAYER_SECONDS, MODEL_SECONDS, RUNS = 0.02, 0.5, (7, 101)

# The price of a chain of layers that runs one after the other.
Price = Callable[[tuple[LayerShape, ...]], float]


def macs(chain: tuple[LayerShape, ...]) -> float:
    """Return the multiply-accumulates of a chain of layers for one image."""
    return float(sum(shape.macs for shape in chain))


def parameters(chain: tuple[LayerShape, ...]) -> float:
    """Return the weights and biases of a chain of layers."""
    return float(sum(shape.parameters for shape in chain))


class LatencyTable:
    """Milliseconds of chains of layers, measured when they are first asked for and remembered.

    The 20th percentile of the timings counts: what else the machine does makes them longer only.

    Args:
        like: a tensor on the device and in the dtype to measure in.
        batch: images at a time.
        layout: "contiguous" or "channels_last".
        cache: a JSON file that `save` keeps them in. Those of another machine, PyTorch, number of threads, batch,
            dtype, layout or time spent on each are kept beside and not used.
        on_progress: called with the number of chains measured, before each.
    """

    def __init__(
        self,
        like: Tensor,
        batch: int,
        layout: str = "contiguous",
        *,
        cache: Path | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self.like, self.batch, self.layout, self.cache = like, batch, layout, cache
        self.on_progress, self.measured = on_progress, 0
        name = torch.cuda.get_device_name(like.device) if like.is_cuda else machine.processor_name()
        words = (name, like.device, torch.__version__, torch.get_num_threads(), like.dtype, batch, layout)
        self.setting = " · ".join(map(str, (*words, f"{LAYER_SECONDS * 1e3:g} ms each")))
        self.others = _read(cache)
        self.known = self.others.pop(self.setting, {})

    def __call__(self, chain: tuple[LayerShape, ...]) -> float:
        """Return the milliseconds of a chain, for as many calls as the model makes."""
        # the name and the parameters' values do not matter: equal geometries are measured once
        same = tuple(dataclasses.replace(shape, name="", calls=1) for shape in chain)
        key = json.dumps([dataclasses.astuple(shape) for shape in same])
        if key not in self.known:
            if self.on_progress:
                self.on_progress(self.measured)
            self.measured += 1
            self.known[key] = self.measure(same)
        return chain[0].calls * self.known[key]

    def measure(self, chain: tuple[LayerShape, ...]) -> float:
        """Time a chain with random weights."""
        module = nn.Sequential(*(make_layer(shape, self.like) for shape in chain)).eval()
        first = chain[0]
        size = (
            (self.batch, first.input_size[0], first.in_channels)
            if first.kind == "linear"
            else (self.batch, first.in_channels, *first.input_size)
        )
        x = torch.randn(size, device=self.like.device, dtype=self.like.dtype)
        if self.layout == "channels_last" and x.dim() == 4:
            module, x = module.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)

        def run() -> None:
            module(x)
            wait_for(x.device)

        with torch.inference_mode():
            return timer.compare({"chain": run}, runs=_runs(run, LAYER_SECONDS), warmup=2)["chain"].low_ms

    def save(self) -> None:
        """Write what was measured into the cache, if there is one."""
        if self.cache is None or not self.known:
            return
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.cache, json.dumps({**self.others, self.setting: self.known}))


def _read(cache: Path | None) -> dict[str, dict[str, float]]:
    """Return the tables in the cache by setting; they can be measured again, so a damaged file is an empty one."""
    if cache is None or not cache.is_file():
        return {}
    try:
        tables = json.loads(cache.read_text())
        return {str(name): {str(k): float(v) for k, v in table.items()} for name, table in tables.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


class Stopwatch:
    """Times a model and its narrowed form side by side on images of the calibration.

    Args:
        original: the model before, in evaluation mode.
        batches: images; the first batch is repeated as needed.
        layout: "contiguous" or "channels_last".
    """

    def __init__(self, original: nn.Module, batches: list[Any], layout: str) -> None:
        self.original, self.batches, self.layout = original, batches, layout
        self.device = next(original.parameters()).device

    def compare(self, narrowed: nn.Module, batch: int) -> tuple[timer.Timing, timer.Timing]:
        """Return the timings before and after, with that many images at a time."""
        args, kwargs = pytree.tree_map(lambda t: _resized(t, batch), next(inputs_of(self.batches)))
        if self.layout == "channels_last":
            args, kwargs = pytree.tree_map(_channels_last, (args, kwargs))

        def call(model: nn.Module) -> Callable[[], None]:
            def run() -> None:
                model(*args, **kwargs)
                wait_for(self.device)

            return run

        narrowed = to_layout(copy.deepcopy(narrowed), self.layout).eval()
        before = call(self.original)
        with torch.inference_mode():
            runs = _runs(before, MODEL_SECONDS)
            times = timer.compare({"before": before, "after": call(narrowed)}, runs=runs, warmup=2)
        return times["before"], times["after"]


def _runs(call: Callable[[], None], seconds: float) -> int:
    """Return how often to time a call."""
    call()  # the first one is slower
    start = time.perf_counter()
    call()
    least, most = RUNS
    return min(max(int(seconds / (time.perf_counter() - start)), least), most)


def _resized(value: Any, batch: int) -> Any:
    """Return a tensor with that many rows, its own repeated as needed."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return value[torch.arange(batch) % len(value)]


def _channels_last(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
