"""Time the CPU kernels on two threads in bf16, beside PyTorch: on a processor with AMX, where there is one.

    python benchmarks/gpu/amx.py [--seconds 60] [--threads 2] [--out FOLDER] [--dry-run]

Machines with a Hopper have processors with AMX, which the tests of nin's kernels emulate elsewhere. Chain 192→160→96,
NiN-CIFAR with 64 images and with one, and their training steps; engines nin, eager, and torch.compile with its
defaults. The page says which instruction set served, and whether the processor has AMX at all.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import measuring
import torch

import nin
from nin.ops.cpu import dispatch
from nin.profiling.bench import runner

CASES = ("chain-192-160-96", "nin-cifar-64", "nin-cifar-1", "train-chain-192-160-96", "train-nin-cifar-64")


def instruction_set() -> dict[str, Any]:
    """Return what the processor has, and what nin's kernels take of it."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return {
        "processor_has_amx": "amx_bf16" in flags,
        "nin_takes": dispatch.KERNELS.name if dispatch.KERNELS is not None else "reference",
        "pytorch_takes": torch.backends.cpu.get_cpu_capability(),
        "backend": nin.backends()["cpu"],
    }


def table(rows: list[dict[str, Any]], used: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    amx = "has AMX" if used["processor_has_amx"] else "has no AMX: nothing here is a measurement of it"
    head = f"The processor {amx}. nin's kernels: {used['nin_takes']}; PyTorch: {used['pytorch_takes']}.\n\n"
    lines = ["| case | engine | median, ms | 20 to 80 % | times nin |", "|" + "---|" * 5]
    ours = {(r["case"], r["beside"]): r["timing"]["median_ms"] for r in rows if r["engine"] == "nin" and r["timing"]}
    for row in rows:
        t = row["timing"]
        if t is None:
            lines.append(f"| {row['case']} | {row['engine']} | {row['reason']} | | |")
            continue
        beside = ours.get((row["case"], row["beside"]))
        ratio = f"{t['median_ms'] / beside:.2f}" if beside else ""
        span = f"{t['low_ms']:.3f} to {t['high_ms']:.3f}"
        lines.append(f"| {row['case']} | {row['engine']} | {t['median_ms']:.3f} | {span} | {ratio} |")
    return head + "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="for all of it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--dry-run", action="store_true", help="one case and no compiler, as a test of this script")
    given = parser.parse_args(arguments)
    budget, used = measuring.Budget(given.seconds), instruction_set()
    torch.set_num_threads(given.threads)
    header = {**measuring.machine(torch.device("cpu")), "device": f"CPU, {given.threads} threads", **used}
    results = measuring.Results(given.out, "amx", header, lambda rows: table(rows, used))
    print(table([], used).splitlines()[0], flush=True)
    cases = CASES[2:3] if given.dry_run else CASES
    # what is compiled comes last: it takes longer to compile than to measure
    rounds = [(case, engines) for engines in (("nin", "eager"), ("nin", "compile")) for case in cases]
    longest_s = 0.0
    for i, (case, engines) in enumerate(rounds[: len(cases)] if given.dry_run else rounds):
        left = budget.left()
        if results.rows and left <= longest_s:
            results.leave_out(f"{case}, {engines[-1]}")
            continue
        runner.SECONDS_PER_CASE = 0.01 if given.dry_run else 0.4 * left / (len(rounds) - i)
        runner.SETTLE_MS = 0.0 if given.dry_run else 20.0
        for one in runner.run([case], dtypes=["bfloat16"], engines=engines, progress=print).measurements:
            results.add({**dataclasses.asdict(one), "beside": engines[-1]})
        longest_s = left - budget.left() if engines[-1] == "compile" else 0.0


if __name__ == "__main__":
    main()
