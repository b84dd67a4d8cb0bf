"""`nin bench`: time the operator and whole networks beside other engines."""

from pathlib import Path

from nin import folders
from nin.cli.console import ProgressBar, print_json, results
from nin.runtime.files import write_atomically


def bench(
    cases: list[str] | None = None,
    /,
    *,
    dtype: list[str] | None = None,
    engine: list[str] | None = None,
    device: str = "cpu",
    html: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Time the operator and whole networks beside other engines, in turn in one run, against this machine's limits.

    Args:
        cases: Which to time; all if not given. `nin bench list` names them.
        dtype: float32 or bfloat16; both if not given. May be given several times, as may the next.
        engine: nin, eager NCHW, … ; all that are installed if not given.
        device: Where to time: cpu, cuda, cuda:1, or auto for a GPU where there is one.
        html: Write a chart into this file.
        overwrite: Replace a file of that name.
        json: Print the measurements as JSON on standard output.
    """
    if html is not None:
        folders.check_new_file(html, overwrite=overwrite)
    import nin.profiling.bench

    if cases == ["list"]:
        results.print("\n".join(nin.profiling.bench.CASES))
        return
    chosen = {"cases": cases, "dtypes": dtype, "engines": engine}
    given = {name: values for name, values in chosen.items() if values}
    with ProgressBar("Measuring the machine") as bar:
        benchmark = nin.profiling.bench.run(**given, device=device, progress=bar.line, on_progress=bar.on_progress)
    if html is not None:
        write_atomically(html, nin.profiling.bench.html_page(benchmark))
    if json:
        print_json(benchmark.to_dict())
    else:
        results.print(nin.profiling.bench.rich_table(benchmark))
