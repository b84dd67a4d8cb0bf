"""A CUDA driver that launches nothing, under Triton's own launcher: what a call costs the host, without a GPU.

Kernels are compiled for compute capability 9.0 and loaded and launched as on a GPU, by the code that does it there;
``fake_libcuda.c`` takes the place of libcuda. Tensors lie on the CPU, and their addresses are what a launch is given.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

CAPABILITY = (9, 0)


class FakeDriver:
    """Start the driver in this process; Triton must not have been used in it before."""

    def __init__(self) -> None:
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise SystemExit("a C compiler is missing: Triton's launcher is compiled where it runs")
        folder = Path(tempfile.mkdtemp(prefix="nin-fake-driver-"))
        path = folder / "libcuda.so.1"
        source = Path(__file__).with_name("fake_libcuda.c")
        options = ["-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([compiler, *options, "-o", str(path), str(source)], check=True)
        (folder / "libcuda.so").symlink_to(path)
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        # the launcher, a shared library of its own, finds it by its name
        self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self._library.fake_launch_count.restype = ctypes.c_int64
        self._library.fake_last_launch.restype = ctypes.POINTER(ctypes.c_int64)

        import torch
        import triton
        from triton.backends.nvidia.driver import CudaDriver

        with mock.patch.object(torch.cuda, "is_available", return_value=True):
            driver = CudaDriver()
        # PyTorch's answers, which want a GPU
        driver.get_current_device = lambda: 0
        driver.get_device_capability = lambda device=None: CAPABILITY
        driver.get_current_stream = lambda device=None: 0
        triton.runtime.driver.set_active(driver)
        self.driver = driver

    def launches(self) -> int:
        """Return how many kernels were launched."""
        return self._library.fake_launch_count()

    def expect_parameters(self, sizes: Sequence[int]) -> None:
        """Say how many bytes each parameter of the next kernels has; none, where they are not looked at."""
        self._library.fake_expect_parameters(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
        self._sizes = sizes

    def last_launch(self) -> dict[str, list[int]]:
        """Return the last launch: grid, block, shared memory, stream, function and parameters."""
        noted = self._library.fake_last_launch()
        names = ("grid", 3), ("block", 3), ("shared_bytes", 1), ("stream", 1), ("function", 1)
        found, start = {}, 0
        for name, count in (*names, ("parameters", len(self._sizes))):
            found[name] = list(noted[start : start + count])
            start += count
        return found
