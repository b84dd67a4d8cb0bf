"""Run every test and benchmark that matters on a GPU, in five minutes.

    python benchmarks/gpu/run_all.py [--data DIR] [--piece NAME …] [--out FOLDER] [--list] [--dry-run]
        [--max-autotune] [--tune]

DIR holds the files of Fashion-MNIST and `cifar10.npz`, which prepare.py makes of an image folder beforehand; a piece
whose data are missing is left out. Each piece is a process of its own with a time of its own, within which it stops by
itself and says what it left out; each row is written when it is measured. So a run that is stopped keeps what it has,
and a piece can be run again alone. Ends with status 1 where a piece failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
TESTS = HERE.parent.parent / "tests"
# A piece stops by itself within its seconds; then it is given so many more to start in and to end a case.
GRACE_S = 20


@dataclasses.dataclass(frozen=True)
class Piece:
    """A process: its command and its seconds.

    Attributes:
        command: what follows ``python``.
        seconds: that it may take.
        by_default: whether it runs where no piece is named.
        limited: whether it takes ``--seconds`` and stops by itself.
    """

    command: list[str]
    seconds: float
    by_default: bool = True
    limited: bool = True


def pieces(data: Path | None, out: Path, *, dry: bool, more: bool) -> dict[str, Piece]:
    """Return the pieces; those whose data are not there are not among them."""
    dry_run = ["--dry-run"] if dry else []
    extra = ["--out", str(out), *dry_run]
    slower = 5.0 if more or dry else 1.0  # a dry run is for machines that have other work too
    kernels = [str(HERE / "kernels.py"), *(["--max-autotune"] if more else [])]
    chains = ["--case", "192→192→10" if dry else "→"]
    files = [str(TESTS / name) for name in ("test_ops_gpu.py", "test_gpu_paths.py", "test_ops_gpu_plan.py")]
    tests = ["-m", "pytest", "-v", "--tb=short", "-m", "not slow"]
    chosen = ["-k", "empty_batch"] if dry else ["-n", "8"]
    result = {
        "tests": Piece([*tests, *(files[:1] if dry else files), *chosen], 90, limited=False),
        "kernels": Piece([*kernels, *chains, *extra], 90 * slower),
        "steps": Piece([*kernels, "--case", "step", "--out", str(out / "steps"), *dry_run], 30 * slower),
    }
    if (HERE / "host_time.py").exists():
        result["host"] = Piece(
            [str(HERE / "host_time.py"), "--json", str(out / "host.json")], 20 * slower, limited=False
        )
    train = [str(HERE / "train.py")]
    if dry:
        result["digits"] = Piece([*train, "digits", "--epochs", "1", *extra], 30 * slower)
    if data is not None and (data / "FashionMNIST").exists():
        result["fashion-mnist"] = Piece([*train, "fashion-mnist", "--data-dir", str(data), *extra], 30)
    if data is not None and (data / "cifar10.npz").exists():
        result["cifar10"] = Piece([*train, str(data / "cifar10.npz"), "--epochs", "30", *extra], 60)
    result["amx"] = Piece([str(HERE / "amx.py"), *extra], 60, by_default=dry)
    compiled = [str(HERE / "compile_check.py"), "--json", str(out / "compiled.json")]
    result["compile"] = Piece(compiled, 600, by_default=False, limited=False)
    return result


def run(name: str, piece: Piece, out: Path, *, tune: bool) -> bool:
    """Run a piece, its output into NAME.log; return whether it ended well."""
    limit = ["--seconds", str(piece.seconds)] if piece.limited else []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **({"NIN_GPU_TUNE": "full"} if tune else {})}
    started, log = time.monotonic(), out / f"{name}.log"
    with log.open("w") as file:
        command = [sys.executable, *piece.command, *limit]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            status = process.wait(piece.seconds + GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
    ended = "ended" if status == 0 else f"FAILED with status {status}, see {log},"
    print(f"{name}: {ended} after {time.monotonic() - started:.0f} s", flush=True)
    return status == 0


def main(arguments: list[str] | None = None) -> int:
    """Run the pieces; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--piece", action="append")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="small, on the CPU, as a test of these scripts")
    parser.add_argument("--max-autotune", action="store_true", help="more engines, in five times as long")
    parser.add_argument("--tune", action="store_true", help="nin measures all tiles, without a limit of time")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    known = pieces(given.data, given.out, dry=given.dry_run, more=given.max_autotune)
    unknown = set(given.piece or ()) - set(known)
    if unknown:
        parser.error(f"--piece must be among {', '.join(known)}, got {', '.join(sorted(unknown))}")
    failed = []
    for name in given.piece or [name for name, piece in known.items() if piece.by_default]:
        if given.list:
            print(name, f"{known[name].seconds:.0f} s", *known[name].command)
        elif not run(name, known[name], given.out, tune=given.tune):
            failed.append(name)
    if not given.piece and not given.dry_run:
        missing = [name for name in ("fashion-mnist", "cifar10") if name not in known]
        print(f"left out, their data are not in --data: {', '.join(missing)}" if missing else "all pieces were run")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
