"""Launches by Triton's own compiler and launcher, over a driver that launches nothing: no GPU is needed.

In processes of their own, where kernels are compiled and not interpreted.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]

SCRIPTS = Path(__file__).parents[1] / "benchmarks/gpu"

HEAD = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
from fake_driver import FakeDriver
driver = FakeDriver()
import json, warnings
import torch, triton
from nin.ops.arguments import ChainArguments
from nin.ops.gpu import dispatch, forward, launch

def call(widths, dtype=torch.bfloat16, offset=0):
    store = torch.randn(2 * widths[0] * 9 + offset)
    x = store.to(dtype)[offset:].view(2, 3, 3, widths[0]).permute(0, 3, 1, 2)
    weights = [torch.randn(o, i, 1, 1).to(dtype) for i, o in zip(widths, widths[1:])]
    biases = [torch.randn(o).to(dtype) for o in widths[1:]]
    return x, ChainArguments(weights, biases, (1, 1), (0, 0), (1, 1), ["relu"] * len(weights))
"""

# Every launch of a forward and backward pass by Triton's own look-up too: the driver must see the same of both.
SAME = """
SIZES = {"*": 8, "i32": 4, "i64": 8, "constexpr": 0}
def check(made, tensors):
    compiled = launch.compile_kernel(made.kernel, made.grid, (*tensors, *made.numbers), made.constants)
    kinds = [kind[0] if kind.startswith("*") else kind for kind in compiled.src.signature.values()]
    driver.expect_parameters([SIZES[kind] for kind in kinds if kind != "constexpr"])
    seen = []
    for start in (made.look_up, made):
        start(tensors) if start is made else start(*tensors, *made.numbers, **made.constants)
        seen.append(driver.last_launch())
    driver.expect_parameters([])
    assert seen[0] == seen[1], (made.name, seen)
    assert seen[0]["parameters"][0] == tensors[0].data_ptr()
    names.append(made.name)

import contextlib
names = []
@contextlib.contextmanager
def recorder(made, tensors):
    check(made, tensors)
    yield

for widths, dtype, offset in (((24, 40, 16), torch.bfloat16, 0), ((24, 40), torch.float16, 1)):
    x, chain = call(widths, dtype, offset)
    plan, backward_plan = dispatch.forward_plan(x, chain), dispatch.backward_plan(x, chain)
    with launch.record_launches(recorder):
        y = forward.mlpconv(x, chain, plan)
        from nin.ops.gpu import backward
        backward.mlpconv_backward(y, x, y, chain, [True] * (1 + 2 * len(chain.weights)), backward_plan)
print(json.dumps(names))
"""


def run_python(code, **environment):
    given = {**os.environ, "TRITON_INTERPRET": "0", "NIN_GPU": "triton", **environment}
    done = subprocess.run([sys.executable, "-c", HEAD + code], capture_output=True, text=True, env=given, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_started_kernel_gets_what_tritons_look_up_gives_it():
    names = run_python(SAME)
    assert {"chain_forward", "layer_forward", "pair_gradients", "layer_gradients", "add_parts"} <= set(names)


REPLAY = """
seen = []
for offset in (0, 0, 1, 1):
    x, chain = call((24, 40, 16), offset=offset)
    driver.expect_parameters([8] * 8)
    before = driver.launches()
    y = dispatch.mlpconv(x, chain)
    last = driver.last_launch()
    # x, first weight and bias, second weight and bias, the last ones again, y
    wanted = [t.data_ptr() for t in (x, chain.weights[0], chain.biases[0], *[chain.weights[1], chain.biases[1]] * 2, y)]
    assert last["parameters"] == wanted, (last, wanted)
    seen.append([driver.launches() - before, last["function"][0], len(dispatch._calls)])
print(json.dumps(seen))
"""


def test_a_replay_launches_on_the_calls_own_tensors():
    first, again, unaligned, unaligned_again = run_python(REPLAY)
    assert [count for count, *_ in (first, again, unaligned, unaligned_again)] == [1] * 4
    # an address that is no multiple of 16 has a kernel of its own
    assert first[1] == again[1] != unaligned[1] == unaligned_again[1]
    assert [plans for *_, plans in (first, again, unaligned, unaligned_again)] == [1, 1, 2, 2]


# Versions of Triton whose compiled kernels are started otherwise.
CHANGED = {
    "another order": "old = Kernel.__getitem__\nKernel.__getitem__ = lambda self, grid: "
    "lambda *args, stream=None: old(self, grid)(*args[::-1], stream=stream)",
    "other parameters": "Kernel.__getitem__ = lambda self, grid: lambda *args: None",
}
CHECK = """
Kernel = triton.compiler.compiler.CompiledKernel
CHANGE
starts = []
make = launch.KernelLaunch._compile
def _compile(self, arguments):
    before = driver.launches()
    make(self, arguments)
    starts.append([self.start is not None, driver.launches() - before])
launch.KernelLaunch._compile = _compile
rows = []
x, chain = call((24, 40, 16))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        before = driver.launches()
        dispatch.mlpconv(x, chain)
        rows.append(driver.launches() - before)
print(json.dumps([rows, starts, [str(w.message) for w in said if "nin:" in str(w.message)]]))
"""


def test_a_kernel_that_is_started_as_known_is_compared_with_tritons_look_up_once():
    launches, starts, said = run_python(CHECK.replace("CHANGE", ""))
    assert (launches, starts, said) == ([1, 1], [[True, 0]], [])


@pytest.mark.parametrize("change", list(CHANGED.values()), ids=CHANGED)
def test_tritons_look_up_serves_where_kernels_are_started_otherwise(change):
    launches, starts, (said,) = run_python(CHECK.replace("CHANGE", change))
    assert (launches, starts) == ([1, 1], [[False, 0]])
    assert "starts kernels in a way of its own" in said


TOO_LARGE = """
from nin.ops.gpu import h100_timings, tile_sizes
h100_timings.estimate_us = lambda problem, *, backward: {"triton": 1.0}
forward.tile_sizes.chain_shared_bytes = lambda *arguments: 1  # whatever is estimated
rows = []
for limit, widths in ((232_448, (24, 40, 16)), (1_000, (24, 40, 32))):  # the second is less than any tiles take
    launch.tile_sizes.device_limits = lambda x: tile_sizes.DeviceLimits(limit, 132)
    x, chain = call(widths)
    before = driver.launches()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        y = dispatch.mlpconv(x, chain)
    said = [str(w.message) for w in said if "nin:" in str(w.message)]
    rows.append([driver.launches() - before, said, dispatch.forward_plan(x, chain)[0].choice.engine])
print(json.dumps(rows))
"""


@pytest.mark.parametrize("engine", ["triton", "auto"])
def test_what_the_compiler_takes_decides(engine):
    fitting, (launches, said, chosen) = run_python(TOO_LARGE, NIN_GPU=engine, NIN_GPU_TUNE="0")
    assert fitting == [1, [], "triton"]
    assert (launches, chosen) == (0, "cudnn")
    assert all("bytes of shared memory, of 1,000; other tiles, or else the library" in line for line in said)
    assert len(said) == len(set(said)) > 0


def test_host_times_are_measured(tmp_path):
    file = tmp_path / "times.json"
    command = [sys.executable, str(SCRIPTS / "host_time.py"), "--runs", "3", "--case", "1×1", "--json", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    (row,) = rows.values()
    assert row["inference_launches"] == 1
    # forward, backward, and the sum of the bias's parts
    assert row["training_launches"] == 3
    assert row["plans"] == 2
    assert row["inference_us"] > 0
    assert row["training_us"] > 0
    assert "1×1 192→32" in done.stdout
