"""Measure cases into results.json beside this file: ``python measure.py CASE[,CASE...] [ENGINE,...]``.

Run it for a few cases at a time, because compiling for all engines takes minutes; a case that is measured again
replaces its older times. The machine's roofline is that of the last run. Writes results.md and chart.html too.
"""

import dataclasses
import json
import sys
from pathlib import Path

from nin.profiling import bench
from nin.profiling.bench.engines import ENGINES
from nin.profiling.bench.report import machine_summary
from nin.runtime.timer import Timing

FOLDER = Path(__file__).parent


def load(path):
    """Return the results of a file, if there is one."""
    if not path.exists():
        return []
    return [
        bench.EngineResult(**row | {"timing": row["timing"] and Timing(**row["timing"])})
        for row in json.loads(path.read_text())["measurements"]
    ]


def markdown(result):
    """Return a page with one line for each case and dtype."""
    lines = [
        "# The CPU kernel beside other engines",
        "",
        machine_summary(result.machine) + ".",
        "",
        "2 cores of an AMD EPYC (Zen 5) with AVX-512 and bf16, without AMX, shared with other work. Medians in ms, all "
        "engines of a row in turn within one process; `ratio` is the fastest other engine over `nin`, each in its "
        "better layout. Percentiles, numbers of runs and shares of the machine's limits are in `results.json`. Rows in "
        "which another engine was faster on 2026-11-21, again on one core, and where their time goes: "
        "[`one-core-behind.md`](one-core-behind.md).",
        "",
        "| case | dtype | " + " | ".join(ENGINES) + " | ratio |",
        "|---|---|" + "---:|" * (len(ENGINES) + 1),
    ]
    for case, dtype in result.cases():
        times = {m.engine: m.timing for m in result.results_of(case, dtype)}
        cells = [f"{times[e].median_ms:.3f}" if times.get(e) else "–" for e in ENGINES]
        ratio = result.ratio(case, dtype)
        lines.append(f"| {case} | {dtype} | {' | '.join(cells)} | {'–' if ratio is None else f'{ratio:.2f}'} |")
    return "\n".join(lines) + "\n"


def main(cases, engines):
    """Measure, and write the three files."""
    new = bench.run(cases, engines=engines)
    kept = [m for m in load(FOLDER / "results.json") if m.case not in cases]
    order = list(bench.CASES)
    rows = sorted(kept + new.measurements, key=lambda m: order.index(m.case))
    result = dataclasses.replace(new, measurements=rows)
    (FOLDER / "results.json").write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    (FOLDER / "results.md").write_text(markdown(result))
    (FOLDER / "chart.html").write_text(bench.html_page(result))


if __name__ == "__main__":
    main(sys.argv[1].split(","), sys.argv[2].split(",") if len(sys.argv) > 2 else list(ENGINES))
