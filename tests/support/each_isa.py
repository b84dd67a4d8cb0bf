"""Run the kernels' tests with each instruction set as if it were the machine's own (make test-isa).

A green run on one machine then means green on others. The tests that run with every instruction set anyway are left
out, and so is the machine's own set, which make test uses. PyTorch and oneDNN are held to the same processor.

Usage: python tests/support/each_isa.py [options of pytest]
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What depends on the processor.
FILES = ["test_ops.py", "test_ops_bottleneck.py", "test_ops_cpu*.py", "test_fusion.py", "test_layers.py", "test_api.py"]
# The environment in which PyTorch behaves as on a processor with no more than the instruction set.
AVX512 = {"ATEN_CPU_CAPABILITY": "avx512"}
PROCESSORS = {
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": AVX512 | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512_bf16": AVX512 | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avx512_amx": AVX512,
}
NAME = "from nin.ops.cpu import dispatch; print(dispatch.KERNELS and dispatch.KERNELS.name)"


def kernels_of(environment: dict[str, str]) -> str:
    """Return the name of the kernels that nin chooses in an environment."""
    run = subprocess.run([sys.executable, "-c", NAME], env=environment, check=True, capture_output=True, text=True)
    return run.stdout.strip()


def main() -> int:
    """Run the tests; return 1 if any failed."""
    plain = {key: value for key, value in os.environ.items() if key not in ("NIN_CPU_ISA", "NIN_CPU_WINOGRAD")}
    own = kernels_of(plain)
    files = sorted({str(path) for pattern in FILES for path in (ROOT / "tests").glob(pattern)})
    failed = []
    for isa, processor in PROCESSORS.items():
        environment = plain | processor | {"NIN_CPU_ISA": isa}
        served = kernels_of(environment)
        emulated = isa == "avx512_amx" and served == "avx512_bf16"  # by tests/conftest.py
        if isa == own or (served != isa and not emulated):
            print(f"{isa}: {'the own set of this machine, see make test' if isa == own else 'this machine lacks it'}")
            continue
        started = time.monotonic()
        options = ["-q", "--no-header", "--numprocesses=auto", "--maxprocesses=8", "-m", "not slow and not each_isa"]
        command = [sys.executable, "-m", "pytest", *options, *sys.argv[1:], *files]
        code = subprocess.run(command, env=environment, cwd=ROOT).returncode
        print(f"{isa}{', emulated' if emulated else ''}: exit status {code}, {time.monotonic() - started:.0f} s")
        failed += [isa] if code else []
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
