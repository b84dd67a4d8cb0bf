"""One search of `nin.speed`: its forms, its processes, their rounds, and what is known so far."""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nin.display.pace import StageFraction
from nin.engines.catalog import ENGINES, NARROWING_ENGINES
from nin.errors import UserError
from nin.ops import backends
from nin.runtime.device import cpu_has_bf16, processor_name
from nin.runtime.fingerprint import fingerprint
from nin.runtime.progress import ProgressCallback
from nin.speed_search.builder import Builder
from nin.speed_search.combinations import ORIGINAL, REFERENCE, Combination, narrowed_form
from nin.speed_search.forms import NarrowingSettings, narrowed
from nin.speed_search.networks import load_network
from nin.speed_search.processes import WorkerError, WorkerProcess
from nin.speed_search.quality import Quality, compare, load_scores
from nin.speed_search.result import Row, SpeedResult, choose
from nin.speed_search.runners import Setting, WorkerSpec
from nin.speed_search.settings import CALIBRATION_IMAGES, NARROWING_IMAGES, SpeedSettings
from nin.speed_search.state import SearchState
from nin.speed_search.subject import Subject
from nin.speed_search.timing import Interval, median_interval, time_in_rounds

# Narrowed forms are not tried where the original takes so many times the fastest time: narrowing speeds all engines up
# by about the same.
HOPELESS = 1.6

# Each takes memory as long as the rounds go on, for every narrowed form.
MOST_CONTENDERS = 6

# Seconds of the rounds for each batch size: of the original's combinations, then of the contenders'.
SCREENING_SECONDS, FINAL_SECONDS = 45.0, 120.0

# What the steps take, in about a second, for the time that is left.
STEP_WEIGHTS = {"build": 15, "start": 10, "score": 5, "narrow": 90, "screening": 45, "final": 120, "control": 15}

VERSIONS = ("network-in-network", "torch", "onnxruntime", "openvino", "nncf")


class SearchSession:
    """One search: its processes, and what is known so far."""

    def __init__(
        self,
        subject: Subject,
        settings: SpeedSettings,
        work: Path,
        stop: Callable[[], bool],
        progress: ProgressCallback,
    ) -> None:
        self.subject, self.settings, self.stop, self.on_progress = subject, settings, stop, progress
        self.work = work
        calibration = subject.calibration_pixels(CALIBRATION_IMAGES, settings.seed)
        pixels, self.labels = subject.test_pixels(settings.test_images)
        tensors = [t for _, t in sorted(subject.model.state_dict().items())]
        shown = {**settings.to_dict(), "network": subject.name, "preprocessing": subject.preprocessing}
        self.fingerprint = fingerprint([repr(sorted(shown.items())), *tensors, calibration, pixels])
        self.pixels, self.calibration = work / "test.npy", work / "calibration.npy"
        self.arrays = {self.pixels: pixels.numpy(), self.calibration: calibration.numpy()}
        self.state = SearchState(work, self.fingerprint)
        self.builder = Builder(subject, self.state, self.calibration, full_range=bool(torch.cpu._is_vnni_supported()))
        self.workers: dict[Combination, WorkerProcess] = {}
        self.rows: dict[Combination, Row] = {}
        self.notes_of_forms: dict[str, str] = {}  # why they could not be made
        self.part, self.part_number, shares = "", 0, len(settings.shares)
        self.parts = shares + 3 if shares else 2
        engines = len(self.engines())
        contenders = len(settings.shares) * -(-engines // 2)
        weights, timed = STEP_WEIGHTS, len(settings.batches)
        each = weights["build"] + weights["start"] + weights["score"]
        self.done, self.total = (
            0,
            (
                each * (engines + contenders)
                + weights["narrow"] * len(settings.shares)
                + (weights["screening"] + weights["final"] + weights["control"]) * timed
            ),
        )

    def run(self) -> SpeedResult:
        """Measure and choose."""
        self._begin_part("As it is")
        for path, array in self.arrays.items():
            np.save(path, array)
        load_before = system_load()
        with contextlib.ExitStack() as stack:
            stack.callback(self._close_all)
            self._add_form(ORIGINAL, None)
            originals = [Combination(ORIGINAL, number, engine) for number, engine in self.engines()]
            for combination in originals:
                self._prepare(combination)
            if self.rows[REFERENCE].reason:
                raise UserError(f"the network cannot be run as it is: {self.rows[REFERENCE].reason}")
            self._time("screening", list(self.workers), SCREENING_SECONDS)
            contenders = self._contenders()
            self._drop_others(contenders)
            fastest = find_fastest([self.rows[each] for each in contenders], self.settings.batches[0])
            for share in self.settings.shares:
                self._begin_part(f"Narrowed to {share:g}")
                form = narrowed_form(share, self.settings.narrow_by)
                if not self._add_form(form, share, fastest):
                    continue
                for combination in contenders:
                    self._prepare(dataclasses.replace(combination, form=form))
            if self.settings.shares:
                self._begin_part("All side by side")
                self._time("final", list(self.workers), FINAL_SECONDS)
            self._begin_part("Control")
            control = self._control()
        rows = tuple(self.rows.values())
        chosen = choose(rows, self.settings.lose, self.settings.batches[0])
        loads = load_before, system_load()
        s = self.subject
        return SpeedResult(
            s.name,
            s.images.name,
            s.labelled,
            self.settings.lose,
            self.settings.batches,
            rows,
            chosen,
            control,
            describe_machine(loads),
            tuple(self._notes()),
        )

    def engines(self) -> list[tuple[str, str]]:
        """Return number types and engines that are asked for, the reference first; missing ones too."""
        asked = [(number, name) for name in self.settings.engines for number in ENGINES[name].numbers]
        reference = REFERENCE.number, REFERENCE.engine
        return [reference, *(pair for pair in asked if pair != reference)]

    def scores_path(self, combination: Combination) -> Path:
        """Return the file with the scores of a combination."""
        return self.work / f"{combination.key}.npy"

    def _begin_part(self, name: str) -> None:
        """Name the part of the search that begins, as progress shows it: "Narrowed to 0.8 (2 of 6)"."""
        self.part_number += 1
        self.part = f"{name} ({self.part_number} of {self.parts})"

    def _step(self, text: str, weight: str | None = None, fraction: tuple[float, float] = (0, 0)) -> None:
        """Say what is being done, and stop where that is asked for."""
        inner = round(STEP_WEIGHTS[weight] * fraction[0] / fraction[1]) if weight and fraction[1] else 0
        self.on_progress(f"{self.part}: {text}", min(self.done + inner, self.total - 1), self.total)
        if self.stop():
            raise KeyboardInterrupt

    def _add_form(self, form: str, share: float | None, fastest: Combination = REFERENCE) -> bool:
        """Write the network of a form; return whether there is one.

        Args:
            form: its name.
            share: that a narrowed form keeps; None for the network as it is.
            fastest: the combination in whose engine a share of the latency is timed.
        """
        folder = self.builder.folder(form) / "network"
        key = f"form {form}"
        if (reason := self.state.get(f"{key} failed")) is not None:
            self.notes_of_forms[form] = reason
            return False
        if not self.state.get(key):
            if share is None:
                self.subject.save(folder, self.subject.model)
            else:
                how = self._narrowing_settings(fastest)
                stages = StageFraction()

                def progress(what: str, done: int, total: int) -> None:
                    self._step(f"{what[:1].lower()}{what[1:]}", "narrow", (stages(done, total), 1))

                try:
                    model, plan = narrowed(self.subject, share, how, self.work, self.stop, progress)
                except UserError as error:
                    self.state.set(f"{key} failed", str(error))
                    self.notes_of_forms[form] = str(error)
                    return False
                self.subject.save(folder, model, plan)
            self.state.set(key, True)
        self.done += 0 if share is None else STEP_WEIGHTS["narrow"]
        self.builder.models[form] = load_network(folder, plain=False, trust=True)
        return True

    def _narrowing_settings(self, fastest: Combination) -> NarrowingSettings:
        """Return how forms are narrowed; by latency, timed with the number of threads that was best for the fastest."""
        s = self.settings
        how = NarrowingSettings(NARROWING_IMAGES, s.finetune, s.seed, s.narrow_by, batch=s.batches[0])
        if s.narrow_by == "macs":
            return how
        threads = self.rows[fastest].settings[s.batches[0]].threads
        engines = {name: narrowing for narrowing, name in NARROWING_ENGINES.items()}
        return dataclasses.replace(how, engine=engines.get(fastest.engine, "pytorch"), threads=threads)

    def _prepare(self, combination: Combination) -> None:
        """Build a combination, start its process, and compare its answers; or note why that cannot be."""
        reason = ENGINES[combination.engine].missing(combination.number) or self._unsuited(combination)
        self._step(f"building {combination}")
        if not reason:
            try:
                self.builder.build(combination)
                self.done += STEP_WEIGHTS["build"]
                self._step(f"starting {combination}")
                worker = self._start(combination)
                self.done += STEP_WEIGHTS["start"]
                self._step(f"comparing the answers of {combination}")
                self._add_row(combination, worker)
                self.done += STEP_WEIGHTS["score"]
                return
            except (UserError, WorkerError) as error:
                reason = str(error)
        self.rows[combination] = Row(combination, reason=reason)

    def _unsuited(self, combination: Combination) -> str:
        if combination.number == "bfloat16" and not cpu_has_bf16():
            return "this processor has no instructions for bfloat16"
        return ""

    def _start(self, combination: Combination, name: str = "") -> WorkerProcess:
        """Return the process of a combination, ready; its settings are looked for once."""
        p, known = self.subject.preprocessing, self.state.get(f"settings {combination.key}") or {}
        settings = {int(batch): Setting(**values) for batch, values in known.items()}
        if combination.engine == "compile" and not known:  # each number of threads would be compiled anew
            eager = self.rows[REFERENCE].settings
            settings = {batch: Setting(setting.threads, "channels_last") for batch, setting in eager.items()}
        spec = WorkerSpec(
            combination.engine,
            combination.number,
            str(self.builder.path(combination)),
            self.subject.input_shape,
            tuple(sorted(self.settings.batches)),
            p.mean,
            p.std,
            self.settings.threads,
            settings,
            self.subject.trust or self.subject.info is None,
        )
        worker = WorkerProcess(spec, self.work, name or combination.key)
        try:
            worker.wait_until_ready()
        except BaseException:
            worker.close()
            raise
        if not name:
            self.workers[combination] = worker
            if not known:
                found = {str(batch): setting.to_dict() for batch, setting in worker.settings.items()}
                self.state.set(f"settings {combination.key}", found)
                self.state.set(f"memory {combination.key}", worker.peak_bytes)
        return worker

    def _add_row(self, combination: Combination, worker: WorkerProcess) -> None:
        key, scores = f"scored {combination.key}", self.scores_path(combination)
        if not self.state.get(key):
            worker.score(self.pixels, scores)
            self.state.set(key, True)
        self.rows[combination] = Row(
            combination,
            quality=self._quality(scores),
            file_bytes=sum(path.stat().st_size for path in self.builder.files(combination)),
            peak_bytes=self.state.get(f"memory {combination.key}"),
            settings=worker.settings,
        )

    def _quality(self, scores: Path) -> Quality:
        return compare(load_scores(scores), load_scores(self.scores_path(REFERENCE)), self.labels)

    def _time(self, stage: str, combinations: list[Combination], seconds: float) -> None:
        """Time combinations in turn at every batch size; rounds that were made before an interruption count."""
        by_key = {combination.key: combination for combination in combinations}
        for batch in self.settings.batches:
            key = f"{stage} {batch}"
            times = {name: list(values) for name, values in (self.state.get(key) or {}).items()}
            timers = {name: functools.partial(self.workers[c].time, batch) for name, c in by_key.items()}

            def on_round(number: int, batch: int = batch) -> None:
                self._step(f"timing {len(by_key)} combinations, {batch} at a time, round {number}", stage, (number, 40))

            on_round(0)
            found = time_in_rounds(timers, seconds=seconds, before=times, on_round=on_round)
            self.state.set(key, found)
            self.done += STEP_WEIGHTS[stage]
            for name, combination in by_key.items():
                row = self.rows[combination]
                latency = {**row.latency, batch: median_interval(found[name])}
                self.rows[combination] = dataclasses.replace(row, latency=latency)

    def _contenders(self) -> list[Combination]:
        """Return the combinations of the original whose number type and engine narrowed forms are tried in."""
        timed = [row for row in self.rows.values() if row.latency]
        best = {n: min(row.latency[n].median for row in timed) for n in self.settings.batches}

        def ratio(row: Row) -> float:
            return min(row.latency[n].median / best[n] for n in self.settings.batches)

        ranked = sorted((row for row in timed if ratio(row) <= HOPELESS), key=ratio)
        return [row.combination for row in ranked[:MOST_CONTENDERS]]

    def _drop_others(self, contenders: list[Combination]) -> None:
        """End the processes of the others, where narrowed forms are to be timed beside the contenders."""
        if not self.settings.shares:
            return
        for combination in set(self.workers) - {REFERENCE, *contenders}:
            self.workers.pop(combination).close()
            reason = (
                f"timed in the first rounds only and not narrowed: more than {HOPELESS:g} times the fastest's time, or "
                f"not among the first {MOST_CONTENDERS}"
            )
            self.rows[combination] = dataclasses.replace(self.rows[combination], reason=reason)

    def _control(self) -> dict[int, tuple[Interval, Interval]]:
        """Return the original's times in the rounds, and once more in a new process after them."""
        times = {}
        with self._start(REFERENCE, "control") as worker:
            for batch in self.settings.batches:
                self._step(f"timing the original once more, {batch} at a time")
                again = time_in_rounds({"again": functools.partial(worker.time, batch)}, seconds=0.0)["again"]
                times[batch] = self.rows[REFERENCE].latency[batch], median_interval(again)
                self.done += STEP_WEIGHTS["control"]
        return times

    def _notes(self) -> Iterator[str]:
        for form, reason in self.notes_of_forms.items():
            yield f"{form}: {reason}"
        if not self.subject.labelled:
            yield (
                f"The {len(self.subject.images.test):,} images have no labels for this network's scores: what is "
                "lost is the share of answers that differ from the original's, an upper bound of lost accuracy."
            )

    def _close_all(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()


def system_load() -> float:
    """Return how many programs have wanted a core over the last minute, on average; 0 where that is not known."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def describe_machine(loads: tuple[float, float]) -> dict[str, Any]:
    """Return processor, cores, kernel, versions, date, and the machine's load when the search began and ended."""
    versions = {}
    for package in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "kernel": backends()["cpu"],
        "versions": versions,
        "load": [round(value, 1) for value in loads],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def find_fastest(rows: Iterable[Row], batch: int) -> Combination:
    """Return the combination that takes the least time with that many images at a time."""
    return min(rows, key=lambda row: row.latency[batch].median).combination
