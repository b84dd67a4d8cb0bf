"""The compiled library built with other options, for what this machine lacks."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build_native(folder, target, *options):
    if shutil.which("g++") is None or shutil.which("cmake") is None:
        pytest.skip("needs g++ and cmake")
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(folder), *options], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(folder), "--target", target], check=True, capture_output=True)


# those of nin.ops.cpu.library, which conftest must not import before it has set Triton's variable
INSTRUCTION_SETS = ("avx512_amx", "avx512_bf16", "avx512", "avx2", "portable")
