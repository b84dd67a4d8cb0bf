"""The kernels compiled for GPUs that are not here: each fits each card, or gives way to other tiles and the library.

Kernels are compiled in processes of their own, as in this one Triton interprets them (see conftest.py).
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

CHECK = Path(__file__).parents[1] / "benchmarks/gpu/compile_check.py"


def run_python(*arguments, **environment):
    """Run Python in a process where Triton compiles; return what it printed, and what it complained of."""
    given = {**os.environ, "TRITON_INTERPRET": "0", **environment}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=given, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


def compile_grid(tmp_path, *arguments):
    out = tmp_path / "grid.json"
    run_python(str(CHECK), "--json", str(out), *arguments)
    return json.loads(out.read_text())


def test_default_tiles_fit_a_hopper(tmp_path):
    """Three layers of 192 in float32 took 1,050,112 bytes of its 232,448, and a training ended there."""
    rows = compile_grid(tmp_path, "--grid", "small", "--capability", "90", "--dtype", "bf16", "--dtype", "fp32")
    assert {row["dtype"] for row in rows} == {"bf16", "fp32 tf32", "fp32 ieee"}
    assert {"chain_forward", "pair_gradients"} <= {row["kernel"] for row in rows}
    # of gradients in float32 the next tiles may be the first that fit
    misfits = [row for row in rows if not row["fits"]]
    assert all(row["kernel"] == "layer_gradients" and row["dtype"] != "bf16" for row in misfits), misfits


def test_some_tiles_fit_each_card(tmp_path):
    cards = ("80", "86", "120")
    capabilities = [argument for card in cards for argument in ("--capability", card)]
    rows = compile_grid(tmp_path, "--grid", "small", "--dtype", "bf16", *capabilities)
    assert {row["capability"] for row in rows if row["fits"]} == {int(card) for card in cards}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("capability", ["80", "86", "89", "90", "120"])
def test_some_tiles_fit_each_card_for_many_widths(tmp_path, capability, dtype):
    compile_grid(tmp_path, "--grid", "large", "--capability", capability, "--dtype", dtype)


# A process that believes to have a GPU: Triton compiles for it. Only what was compiled cannot be started.
HEAD = """
import os, sys
sys.path.insert(0, {tests!r})
import torch, triton
from support.fake_gpu import CompilerDriver
triton.runtime.driver.set_active(CompilerDriver({capability}))
from nin.ops.arguments import ChainArguments
from nin.ops.gpu import dispatch, forward, launch, tile_sizes
"""


def run_with_gpu(code, capability=90, **environment):
    head = HEAD.format(tests=str(Path(__file__).parent), capability=capability)
    return run_python("-W", "always", "-c", head + code, **environment)


TILES = """
x = torch.empty(2, 192, 7, 7, device="meta").to(memory_format=torch.channels_last)
weights, biases = [torch.empty(192, 192, 1, 1, device="meta")] * 2, [torch.empty(192, device="meta")] * 2
chain = ChainArguments(weights, biases, (1, 1), (0, 0), (1, 1), ["relu"] * 2)
launched = []
def compile_only(kernel, grid, *arguments, **constants):
    compiled = launch.compile_kernel(kernel, grid, arguments, constants | launch.OPTIONS)
    launched.append((constants["num_stages"], compiled.metadata.shared))
forward.launch = compile_only
tiles = [tile_sizes.ChainTiles(64, (64, 64, 64), 4, stages, resident=False) for stages in (3, 1)]
for _ in range(2):
    forward.launch_chain(forward.ForwardArguments(x, torch.empty_like(x), chain), chain, tiles)
print(launched)
"""


def test_tiles_that_take_too_much_give_way_to_the_next():
    """The compiler is asked, not an estimate: with three stages it takes 1,050,112 bytes, with one 65,536."""
    printed, complaints = run_with_gpu(TILES)
    assert printed.strip() == "[(1, 65536), (1, 65536)]"
    assert complaints.count("takes 1,050,112 bytes of shared memory, of 232,448; other tiles") == 1


LIBRARY = """
os.environ["NIN_GPU"] = "triton"
def serve(*widths):
    x = torch.randn(2, widths[0], 4, 4)
    weights = [torch.randn(o, i, 1, 1) for i, o in zip(widths, widths[1:])]
    chain = ChainArguments(weights, [None, None], (1, 1), (0, 0), (1, 1), ["relu", "none"])
    want = torch.conv2d(torch.conv2d(x, weights[0]).relu(), weights[1])
    for _ in range(2):
        y = dispatch.mlpconv(x, chain)
        torch.testing.assert_close(y, want)
        assert dispatch.mlpconv_backward(y, x, y, chain, [True] * 5)[0].shape == x.shape
    print("served")
serve(5, 6, 3)
"""


def complaints_of(stderr):
    """Return the warnings, each of which may be there once, as there is no traceback."""
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if "Warning: nin: " in line]
    assert len(set(lines)) == len(lines)
    return lines


def test_an_architecture_that_triton_does_not_know():
    printed, stderr = run_with_gpu(LIBRARY, capability=7777)
    assert printed.strip() == "served"
    assert complaints_of(stderr)


def test_a_machine_without_a_c_compiler():
    """Triton compiles the start of each kernel with it, after the kernel."""
    launcher = "launcher_cls = staticmethod(lambda *a: subprocess.run(['/nonexistent/cc'], check=True))"
    printed, stderr = run_with_gpu(f"import subprocess\nCompilerDriver.{launcher}\n{LIBRARY}")
    assert printed.strip() == "served"
    assert any("/nonexistent/cc" in line for line in complaints_of(stderr))


def test_a_triton_that_cannot_be_imported(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text("raise ImportError('libtriton.so: undefined symbol')")
    code = f"""
import os, sys
sys.path.insert(0, {str(tmp_path)!r})
import torch, nin
from nin.ops.arguments import ChainArguments
from nin.ops.gpu import dispatch
{LIBRARY}
print(dispatch.triton_problem())
"""
    printed, stderr = run_python("-W", "always", "-c", code)
    assert printed.splitlines() == ["served", "Triton cannot be imported: libtriton.so: undefined symbol"]
    assert len(complaints_of(stderr)) == 1
