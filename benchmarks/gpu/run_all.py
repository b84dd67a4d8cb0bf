"""Run every test and benchmark that needs a GPU, in pieces of less than ten minutes each.

    python benchmarks/gpu/run_all.py [--data DIR] [--piece NAME …] [--out FOLDER] [--list] [--dry-run]

DIR holds `cifar10` (an image folder, or the files of cifar10), and the files of Fashion-MNIST and MNIST; a piece whose
data are missing says so and is left out. Each piece is a process of its own, stopped after ten minutes, and writes its
own results, so a piece can be run again alone. Ends with status 1 where a piece failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
LIMIT_S = 590


def pieces(data: Path | None, out: Path, dry: bool) -> dict[str, list[str]]:
    """Return each piece's command; those that need data that are not there are left out."""
    extra = ["--out", str(out), *(["--dry-run"] if dry else [])]
    kernels = [str(HERE / "kernels.py"), *extra]
    result = {
        "tests": ["-m", "pytest", "-q", str(HERE.parent.parent / "tests/test_ops_gpu.py")],
        "compile": [str(HERE / "compile_check.py"), "--json", str(out / "compiled.json")],
        "main": [*kernels, "--case", "192→160→96"],
        "others": [*kernels, "--case", "192→192", "--case", "→32", "--case", "ConvNeXt"],
        "steps": [*kernels, "--case", "step"],
    }
    for name in ("main", "others", "steps"):  # one folder each: they write files of the same name
        result[name][result[name].index("--out") + 1] = str(out / name)
    train = [str(HERE / "train.py")]
    if data is not None:
        sets = {
            "cifar10": [str(data / "cifar10"), "--epochs", "30"],
            "fashion-mnist": ["fashion-mnist", "--data-dir", str(data), "--epochs", "30"],
            "mnist": ["mnist", "--data-dir", str(data), "--epochs", "20", "--plain"],
        }
        result |= {name: [*train, *arguments, *extra] for name, arguments in sets.items()}
    elif dry:
        result["digits"] = [*train, "digits", "--epochs", "1", "--runs", "2", *extra]
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the pieces; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--piece", action="append")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    known = pieces(given.data, given.out, given.dry_run)
    unknown = set(given.piece or ()) - set(known)
    if unknown:
        parser.error(f"--piece must be among {', '.join(known)}, got {', '.join(sorted(unknown))}")
    failed = []
    for name in given.piece or known:
        if given.list:
            print(name, *known[name])
            continue
        started = time.monotonic()
        try:
            status = subprocess.run([sys.executable, *known[name]], timeout=LIMIT_S, check=False).returncode
        except subprocess.TimeoutExpired:
            status = -1
        print(f"{name}: {'ended' if status == 0 else 'FAILED'} after {time.monotonic() - started:.0f} s", flush=True)
        failed += [name] if status else []
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
