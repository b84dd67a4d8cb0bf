"""The process of one combination: it loads the network, and answers requests for times and scores in JSON lines.

It is started as ``python -m nin.speed_search.worker SPEC``. Nothing but its engine is imported.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from nin.speed_search.parent_watch import watch_parent
from nin.speed_search.runners import Setting, WorkerSpec, make_runner

# Seconds that one call of a candidate of threads and layout is repeated for.
TUNING_SECONDS = 0.15

# How long a network is called before each measured call, so that neither caches nor the spinning threads of the one
# before disturb it; see `nin.profiling.bench.runner`.
SETTLE_SECONDS, MEASURED_SECONDS = 0.1, 0.06


class Worker:
    """Answers the requests of `nin.speed_search.processes.WorkerProcess`.

    Args:
        spec: what to load.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        import numpy as np  # every engine takes its arrays

        self.spec = spec
        self.runner = make_runner(spec)
        rng = np.random.default_rng(0)
        self.inputs = {n: rng.standard_normal((n, *spec.input_shape)).astype(np.float32) for n in spec.batches}
        self.settings: dict[int, Setting] = {}
        candidates = self.runner.candidates()
        for batch, x in self.inputs.items():
            self.settings[batch] = spec.settings.get(batch, candidates[0])
            self.runner.use(self.settings[batch])
            self.runner.bind(x, self.settings[batch])()
        # before other settings are tried, so that it is that of one network
        self.peak_bytes = peak_memory_bytes()
        for batch in self.inputs:
            self.settings[batch] = spec.settings.get(batch) or self._fastest(batch, candidates)

    def _fastest(self, batch: int, candidates: list[Setting]) -> Setting:
        """Return the candidate with the shortest median, timed in turn."""
        if len(candidates) == 1:
            return candidates[0]
        calls = {setting: self.runner.bind(self.inputs[batch], setting) for setting in candidates}
        times: dict[Setting, list[float]] = {setting: [] for setting in candidates}
        for _ in range(3):
            for setting, call in calls.items():
                self.runner.use(setting)
                times[setting] += repeat(call, TUNING_SECONDS, least=2)[1:]
        return min(candidates, key=lambda setting: statistics.median(times[setting]))

    def ready(self) -> dict[str, Any]:
        """Return the settings that were the fastest and the peak memory before they were looked for."""
        settings = {batch: setting.to_dict() for batch, setting in self.settings.items()}
        return {"settings": settings, "peak_bytes": self.peak_bytes}

    def time(self, batch: int) -> dict[str, Any]:
        """Return the median milliseconds of a call on that many images."""
        setting = self.settings[batch]
        self.runner.use(setting)
        call = self.runner.bind(self.inputs[batch], setting)
        repeat(call, SETTLE_SECONDS, least=1)
        return {"ms": statistics.median(repeat(call, MEASURED_SECONDS, least=1))}

    def score(self, pixels: str, out: str) -> dict[str, Any]:
        """Write the scores of the images in a file, computed as many at a time as the largest batch that is timed."""
        import numpy as np

        images = np.load(pixels, mmap_mode="r")
        size = max(self.inputs)
        setting = self.settings[size]
        self.runner.use(setting)
        scores = []
        for start in range(0, len(images), size):
            part = normalise(images[start : start + size], self.spec.mean, self.spec.std)
            padded = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), np.float32)])
            scores.append(np.array(self.runner.bind(padded, setting)())[: len(part)])
        np.save(out, np.concatenate(scores).astype(np.float32))
        return {}


def normalise(pixels: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """Return ``(pixels / 255 - mean) / std`` as float32, of uint8 (N, C, H, W)."""
    import numpy as np

    mean_array, std_array = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (mean, std))
    return np.ascontiguousarray((pixels.astype(np.float32) / np.float32(255) - mean_array) / std_array)


def repeat(call: Any, seconds: float, *, least: int) -> list[float]:
    """Call for about so long, and return the milliseconds of each call."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1e6)
    return times


def peak_memory_bytes() -> int:
    """Return the most memory that this process had at a time (its resident set).

    Not ``getrusage``, whose figure on Linux is that of the process that started this one, too.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """Serve requests from standard input; it is closed by the program that started this process, or by its end."""
    requests = watch_parent()
    # libraries print what they like on standard output; the answers have a file of their own
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        worker = Worker(WorkerSpec.from_json(Path(sys.argv[1]).read_text(encoding="utf-8")))
        say(answers, worker.ready())
        while True:
            request = json.loads(requests.get())
            answer = worker.time if request.pop("verb") == "time" else worker.score
            say(answers, answer(**request))


def say(answers: TextIO, value: dict[str, Any]) -> None:
    """Write one answer."""
    answers.write(json.dumps(value) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
