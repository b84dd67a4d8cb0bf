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
from nin.narrowing.calibration import model_inputs
from nin.narrowing.latency_estimate import LatencyEstimates
from nin.narrowing.timed_engines import Bind, PyTorchEngine, TimedEngine
from nin.runtime import timer
from nin.runtime.device import processor_name
from nin.runtime.files import write_atomically
from nin.runtime.progress import ProgressCallback, ignore_progress

# Seconds that the calls of one whole model are timed for, and how many calls these are at least and at most: where
# others work on the machine too, short ones need many, or all of them fall into a bad moment. Where the times still
# spread by more than this fraction, so many times as long, but no longer than the last number of seconds in all.
MODEL_SECONDS, RUNS, MODEL_SPREAD, MODEL_REPEATS, MOST_SECONDS = 0.5, (7, 101), 0.1, 4, 15.0

# Of calls that take longer than so many seconds, fewer are made.
LONG_CALL, LONG_RUNS = 0.5, 4

# While plans are made, a whole model on a CPU is timed with as many images as the original takes so many seconds for.
PLAN_CALL_SECONDS = 0.15

# A layer is timed in turn with a reference, so that other load slows both: so many pairs of calls at least and at most,
# until so many of the shortest calls of each agree within this fraction, or the seconds are over.
PAIRS, AGREEING, LAYER_SPREAD, LAYER_SECONDS = (7, 501), 3, 0.05, 0.5

# The reference: channels of a 3×3 convolution, its height and width, called as often as takes about as long.
REFERENCE_CHANNELS, REFERENCE_SIZE = 64, 28

# No layer takes less than this fraction of the reference's time, whatever is left without the call's own.
LEAST_RATIO = 1e-3

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
        engine: that the layers are timed in; PyTorch if not given.
        cache: a JSON file that `save` writes. Tables of another machine, engine, PyTorch, number of threads, batch,
            dtype or layout stay in it and are not used.
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
        engine: TimedEngine | None = None,
        cache: Path | None = None,
        on_progress: ProgressCallback = ignore_progress,
    ) -> None:
        self.like, self.batch, self.cache = like, batch, cache
        self.engine = engine or PyTorchEngine(like, layout)
        self.on_progress, self.measured = on_progress, 0
        self.progress: tuple[str, int, int] = ("", 0, 0)
        name = torch.cuda.get_device_name(like.device) if like.is_cuda else processor_name()
        words = (name, like.device, torch.__version__, torch.get_num_threads(), like.dtype, batch, layout)
        self.setting = " · ".join(map(str, (*self.engine.description, *words, "beside a reference")))
        self.others = _read_tables(cache)
        self.known = self.others.pop(self.setting, {})

    def __call__(self, chain: tuple[LayerSpec, ...]) -> float:
        """Return the milliseconds of a chain, measured, for as many calls as the model makes."""
        return chain[0].calls * self._measured(chain)

    def estimates(self, specs: Iterable[LayerSpec]) -> Callable[[tuple[LayerSpec, ...]], float]:
        """Return the milliseconds of chains as a function: what was measured, and estimates from few others.

        Args:
            specs: the layers of the network, see `LatencyEstimates`.
        """
        estimates = LatencyEstimates(self._measured, specs)

        def cost(chain: tuple[LayerSpec, ...]) -> float:
            known = self.known.get(_key(chain))
            return chain[0].calls * (estimates(_unnamed(chain)) if known is None else known)

        return cost

    def knows(self, chain: tuple[LayerSpec, ...]) -> bool:
        """Return whether a chain was measured."""
        return _key(chain) in self.known

    def _measured(self, chain: tuple[LayerSpec, ...]) -> float:
        same, key = _unnamed(chain), _key(chain)
        if key not in self.known:
            purpose, done, total = self.progress
            self.on_progress(f"Timing layers{purpose}, {self.measured:,} timed", done, total)
            self.measured += 1
            self.known[key] = self.measure(same)
        return self.known[key]

    def forget(self, chains: Iterable[tuple[LayerSpec, ...]]) -> dict[str, float]:
        """Drop what is known of chains, so that they are measured again, and return it."""
        keys = {_key(chain) for chain in chains}
        return {key: self.known.pop(key) for key in keys & self.known.keys()}

    def keep_only(self, chains: Iterable[tuple[LayerSpec, ...]]) -> None:
        """Drop what is known of all other chains."""
        keys = {_REFERENCE_KEY, *(_key(chain) for chain in chains)}
        self.known = {key: value for key, value in self.known.items() if key in keys}

    def measure(self, chain: tuple[LayerSpec, ...]) -> float:
        """Time a chain with random weights: the values do not matter."""
        batch = self._timed_batch(chain)
        ratio = _steady_ratio(self.engine.chain(chain, batch), self._reference, self.like.device)
        ratio = max(ratio - self._empty_ratio, LEAST_RATIO)
        if _REFERENCE_KEY not in self.known:
            times = _time({"reference": self._reference}, self.like.device, MODEL_SECONDS)
            self.known[_REFERENCE_KEY] = times["reference"].low_ms
        return ratio * self.known[_REFERENCE_KEY] * self.batch / batch

    def _timed_batch(self, chain: tuple[LayerSpec, ...]) -> int:
        """Return the number of images that a chain is timed with."""
        if self.like.is_cuda:  # a part of a GPU takes as long as the whole
            return self.batch
        each = sum(spec.macs for spec in chain)
        return min(self.batch, max(1, math.ceil(TIMED_MACS / max(1, each))))

    @functools.cached_property
    def _empty_ratio(self) -> float:
        """The part of each ratio that is the call's and not the layers'."""
        empty = self.engine.empty
        return 0.0 if empty is None else _steady_ratio(empty, self._reference, self.like.device)

    @functools.cached_property
    def _reference(self) -> Callable[[], Any]:
        """The call that every chain is timed beside."""
        size = (REFERENCE_SIZE, REFERENCE_SIZE)
        sizes: dict[str, Any] = {"kernel_size": (3, 3), "padding": (1, 1), "input_size": size, "output_size": size}
        return self.engine.chain((LayerSpec("", "conv", REFERENCE_CHANNELS, REFERENCE_CHANNELS, **sizes),), 1)

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
        engine: that computes both; PyTorch if not given.
        on_progress: called before each round of timings.

    Attributes:
        device: that is timed, the original's.
        progress: what the model is timed for, and how many of all its steps are done; total 0 if not known.
    """

    def __init__(
        self,
        original: nn.Module,
        batches: list[Any],
        layout: str,
        engine: TimedEngine | None = None,
        on_progress: ProgressCallback = ignore_progress,
    ) -> None:
        like = next(original.parameters(), torch.zeros(()))
        self.original, self.batches, self.device = original, batches, like.device
        self.engine = engine or PyTorchEngine(like, layout)
        self.on_progress = on_progress
        self.progress: tuple[str, int, int] = ("", 0, 0)
        self._networks: dict[str, tuple[nn.Module, Bind]] = {}  # the original, and the last one beside it
        self._original_calls: dict[int, Callable[[], Any]] = {}

    def prepare(self) -> str:
        """Bring the original into the engine; return the engine's name.

        Raises:
            UserError: the engine cannot compute it.
        """
        self._call_original(1)
        return type(self.engine).__name__

    def compare(self, narrowed: nn.Module, batch: int) -> tuple[timer.Timing, timer.Timing]:
        """Return the timings before and after, with that many images at a time.

        Raises:
            UserError: the engine cannot compute one of them.
        """
        calls = {"before": self._call_original(batch), "after": self._bind("after", narrowed)(*self._inputs(batch))}
        self._say("")
        end = time.perf_counter() + MOST_SECONDS
        times = _time(calls, self.device, MODEL_SECONDS)
        for repeat in range(1, MODEL_REPEATS):
            if all(t.high_ms - t.low_ms <= MODEL_SPREAD * t.median_ms for t in times.values()):
                break
            if time.perf_counter() > end:
                break
            self._say(f", again as the times spread ({repeat})")
            again = _time(calls, self.device, MODEL_SECONDS)
            # other load only makes times longer: of two rounds the one with the smaller spread is nearer to the truth
            times = min(times, again, key=lambda one: max((t.high_ms - t.low_ms) / t.median_ms for t in one.values()))
        return times["before"], times["after"]

    @functools.cached_property
    def seconds_per_image(self) -> float:
        """The seconds that the original takes for one image alone."""
        call = self._call_original(1)
        with torch.inference_mode():
            return min(_seconds(_synchronised(call, self.device), 1) for _ in range(4))  # the first call is slower

    def images_for_plan(self, batch: int) -> int:
        """Return how many of a batch's images are enough while plans are made: a part of a GPU takes as long as all."""
        if self.device.type == "cuda":
            return batch
        return min(batch, max(1, round(PLAN_CALL_SECONDS / self.seconds_per_image)))

    def _call_original(self, batch: int) -> Callable[[], Any]:
        if batch not in self._original_calls:
            self._original_calls[batch] = self._bind("before", self.original)(*self._inputs(batch))
        return self._original_calls[batch]

    def _bind(self, which: str, model: nn.Module) -> Bind:
        """Return what calls a network; the same one is prepared once, as an export takes seconds."""
        if which not in self._networks or self._networks[which][0] is not model:
            self._say(f", preparing the network {which}" if self.engine.description else "")
            self._networks[which] = model, self.engine.network(model)
        return self._networks[which][1]

    def _inputs(self, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = next(model_inputs(self.batches))
        inputs = pytree.tree_map(lambda t: self.engine.in_layout(_resized(t, batch)), (args, kwargs))
        return inputs[0], inputs[1]

    def _say(self, more: str) -> None:
        purpose, done, total = self.progress
        self.on_progress(f"Timing the whole network{purpose}{more}", done, total)


def _unnamed(chain: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
    """Return a chain without what its time does not depend on: equal geometries are measured once."""
    return tuple(dataclasses.replace(spec, name="", calls=1) for spec in chain)


@functools.lru_cache(maxsize=2**17)
def _key(chain: tuple[LayerSpec, ...]) -> str:
    """Return a chain's name in a table; a plan for a latency asks for the same ones again and again."""
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
    fastest = _seconds(first, 1)
    if fastest < LONG_CALL:
        fastest = min(fastest, _seconds(first, 1), _seconds(first, 1))
    least, most = RUNS
    if fastest > LONG_CALL:
        return timer.time_interleaved(timed, runs=LONG_RUNS, warmup=1)
    runs = min(max(int(seconds / fastest), least), most)
    return timer.time_interleaved(timed, runs=runs, warmup=2)


@torch.inference_mode()
def _steady_ratio(call: Callable[[], Any], reference: Callable[[], Any], device: torch.device) -> float:
    """Return how many times as long as a reference a call takes, both timed in turn until their times are steady.

    Other programs only make calls longer, some of them by the slice of time that they take: so the shortest count, of
    which several have to agree.
    """
    timed, beside = _synchronised(call, device), _synchronised(reference, device)
    for warm_up in (timed, beside):
        warm_up()
    end = time.perf_counter() + LAYER_SECONDS
    repeats = max(1, min(100, round(_seconds(timed, 1) / _seconds(beside, 1))))
    times: tuple[list[float], list[float]] = ([], [])
    least, most = PAIRS
    while True:
        times[0].append(_seconds(timed, 1))
        times[1].append(_seconds(beside, repeats) / repeats)
        count = len(times[0])
        if count < least:
            continue
        shortest = [sorted(values)[:AGREEING] for values in times]
        steady = all(values[-1] <= (1 + LAYER_SPREAD) * values[0] for values in shortest)
        if steady or count >= most or time.perf_counter() > end:
            layer, beside_it = map(statistics.median, shortest)
            return layer / beside_it


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
