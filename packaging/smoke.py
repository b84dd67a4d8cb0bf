"""The smoke test of a wheel: in an empty environment of each Python there is, the main job, away from the checkout.

    make smoke                                          with each of python3.11 to python3.14 that is on the path
    python packaging/smoke.py PYTHON…                   with others

Every environment gets what the wheel says it needs and nothing else. It is removed afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETS = ("portable", "avx2", "avx512", "avx512_bf16")  # what the machine lacks gives way to the next one down
SHOW = "import nin; print(nin.backends()['cpu'].partition(' (')[0], end='')"
CANDIDATES = ("python3.11", "python3.12", "python3.13", "python3.14")
CONSUMER = ROOT / "packaging" / "consumer.py"


def main(given: list[str]) -> int:
    """Test the wheel in dist/ with the Pythons given, or with those that are found; return the exit status."""
    (wheel,) = (ROOT / "dist").glob("network_in_network-*.whl")
    found = {version: python for python in given or CANDIDATES if (version := version_of(python))}
    for version, python in found.items():
        with tempfile.TemporaryDirectory(prefix="nin-smoke-") as folder:
            try_wheel(wheel, python, Path(folder))
        print(f"Python {version}: {wheel.name} works")
    return 0 if found else 1


def version_of(python: str) -> str | None:
    """Return the version of a Python, or None where there is none of that name."""
    path = shutil.which(python)
    command = [path or "", "-c", "import platform; print(platform.python_version())"]
    result = subprocess.run(command, capture_output=True, text=True, check=False) if path else None
    return result.stdout.strip() if result is not None and result.returncode == 0 else None


def try_wheel(wheel: Path, python: str, folder: Path) -> None:
    """Install and do the main job: train, predict, count, export; then check a program's types against it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "NIN_"))}

    def run(*command: object) -> str:
        words = [str(word) for word in command]
        return subprocess.run(words, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout

    uv = (sys.executable, "-m", "uv")
    run(*uv, "venv", "--quiet", "--python", python, folder / "env")
    inside = folder / "env" / "bin"
    run(*uv, "pip", "install", "--quiet", "--python", inside / "python", wheel)
    served = {run("env", f"NIN_CPU_ISA={name}", inside / "python", "-W", "error", "-c", SHOW) for name in SETS}
    print(f"kernels on this machine: {', '.join(sorted(served))}")
    if any(not name.startswith("nin ") for name in served):
        raise SystemExit("the wheel's CPU library does not serve")
    trained = json.loads(run(inside / "nin", "train", "digits", "--epochs", "3", "--out", "run", "--json"))
    if trained["test_accuracy"] < 0.5:
        raise SystemExit(f"it does not learn: {trained}")
    picture = "from PIL import Image; Image.new('L', (8, 8), 99).save('new.png')"
    run(inside / "python", "-c", picture)
    json.loads(run(inside / "nin", "predict", "run", "new.png", "--json"))
    json.loads(run(inside / "nin", "export", "run", "--format", "pt2", "--json"))
    run(inside / "nin", "cost", "run")
    shutil.copy(CONSUMER, folder)
    mypy = (sys.executable, "-m", "mypy", "--strict", "--python-executable", inside / "python", "--config-file=")
    run(*mypy, "--allow-untyped-calls", "--cache-dir", ROOT / ".mypy_cache" / "smoke", "consumer.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
