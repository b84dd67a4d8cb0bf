"""The results of a benchmark as a table for the terminal and as a page of charts in HTML."""

from html import escape

from rich.table import Table

from nin.display.svg_chart import Bar, bar_chart
from nin.profiling.bench.runner import Benchmark, EngineResult, Machine

STYLE = """:root{color-scheme:light dark;--paper:#fcfbf9;--ink:#1d1c1a;--quiet:#5f5b55;--nin:#2a6f97;--other:#c9c4bb}
@media(prefers-color-scheme:dark){:root{--paper:#161718;--ink:#ece9e4;--quiet:#aaa69e;--nin:#56b4e9;--other:#4b4f53}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;max-width:1120px;margin:0 auto;padding:28px 16px 48px;background:var(--paper);
color:var(--ink);overflow-wrap:break-word}p{color:var(--quiet);max-width:46em}
.cases{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:0 40px}
h2{font-size:1em;margin:1.6em 0 .3em}svg{display:block;width:100%;max-width:520px;height:auto}
svg text{font-size:10px;fill:var(--quiet)}.nin{fill:var(--nin)}.other{fill:var(--other)}
.spread{stroke:var(--ink);stroke-width:1.5}
@media(max-width:560px){svg text{font-size:12px}}@media(max-width:360px){svg text{font-size:13px}}"""


def rich_table(benchmark: Benchmark) -> Table:
    """Return a row for each engine of each case: its times, the fraction of the limit, its median over nin's."""
    result = Table(title=machine_summary(benchmark.machine), title_justify="left", caption_justify="left")
    notes = list(dict.fromkeys(line for m in benchmark.measurements for line in m.choices))
    if any((m.share_of_limit or 0) > 1 for m in benchmark.measurements):
        notes.append("Over 100 %: less arithmetic than tap by tap, of which the limit is (Winograd's transforms).")
    result.caption = "\n".join(notes) or None
    result.add_column("case")
    result.add_column("engine")
    for heading in ("median ms", "20 %", "80 %", "runs", "of the limit", "times nin"):
        result.add_column(heading, justify="right")
    for case, dtype in benchmark.cases():
        rows = benchmark.results_of(case, dtype)
        nin_ms = next((m.timing.median_ms for m in rows if m.engine == "nin" and m.timing), None)
        for i, m in enumerate(rows):
            result.add_row(f"{case}, {dtype}" if i == 0 else "", *_cells(m, nin_ms))
        result.add_section()
    return result


def _cells(m: EngineResult, nin_ms: float | None) -> list[str]:
    """Return the cells of one engine; ``nin_ms`` is nin's median for the same case, if there is one."""
    if m.timing is None:
        return [m.engine, m.reason]
    t = m.timing
    return [
        f"{m.engine} ({m.ran})" if m.ran else m.engine,
        *(f"{ms:.3f}" for ms in (t.median_ms, t.low_ms, t.high_ms)),
        str(t.runs),
        "" if m.share_of_limit is None else f"{m.share_of_limit:.0%}",
        "" if nin_ms is None else f"{t.median_ms / nin_ms:.2f}",
    ]


def html_page(benchmark: Benchmark) -> str:
    """Return a self-contained page with a bar chart of each case and dtype."""
    parts = [
        f"<div><h2>{escape(case)}, {escape(dtype)}</h2>{_engine_chart(case, benchmark.results_of(case, dtype))}</div>"
        for case, dtype in benchmark.cases()
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>nin bench</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style><main><h1>nin bench</h1><p>{escape(machine_summary(benchmark.machine))}</p>"
        "<p>Median time in milliseconds, shorter is better; the line spans the 20th to the 80th percentile.</p>"
        f'<div class="cases">{"".join(parts)}</div></main></html>\n'
    )


def machine_summary(machine: Machine) -> str:
    """Return a line with the processor, its limits, the kernel, the versions and the date."""
    peaks = ", ".join(f"{name} {peak:.0f} GFLOP/s" for name, peak in machine.peak_gflops.items() if peak)
    copy = f", copy {machine.copy_gbytes_per_second:.0f} GB/s" if machine.copy_gbytes_per_second else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    return (
        f"{machine.processor}, {machine.threads} threads; limits: {peaks or 'not measured'}{copy}; "
        f"malloc {machine.malloc}; {machine.kernel}; {versions}; {machine.date}"
    )


def _engine_chart(case: str, rows: list[EngineResult]) -> str:
    bars = [
        Bar(m.engine, note=m.reason)
        if m.timing is None
        else Bar(
            m.engine,
            [("nin" if m.engine.startswith("nin") else "other", m.timing.median_ms, 12)],
            (m.timing.low_ms, m.timing.high_ms),
            f"{m.timing.median_ms:.3f}",
        )
        for m in rows
    ]
    description = f"Median milliseconds of each engine for {case}."
    return bar_chart(bars, description=description, note_width=74)
