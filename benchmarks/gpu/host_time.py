"""Time what a call on a GPU costs the host, its Python and its launches, without a GPU.

    python benchmarks/gpu/host_time.py [--case TEXT] [--json FILE]

The path is that of a GPU: the dispatcher, the operator's kernels for CUDA, the replay of a planned call, Triton's own
launcher. Only libcuda is replaced, by one whose launches do nothing (`fake_driver`), and the tensors lie on the CPU, so
allocations are the CPU's. The library's products of matrices are replaced by an operator that does nothing: on the CPU
each took 13 µs of arithmetic. The library's gradients of a k×k layer compute on the CPU, and that is in the figures.
Medians of single calls on one thread, in microseconds; ``--percentile 5`` is nearly the least, for a machine with other
work.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["NIN_GPU"] = "triton"
# without a GPU at hand PyTorch says so whenever it is asked for one
warnings.filterwarnings("ignore", message="CUDA initialization")

from fake_driver import FakeDriver  # noqa: E402

CASES = {
    "chain 192→160→96": (192, (160, 96), 1),
    "1×1 192→32": (192, (32,), 1),
    "mlpconv 5×5 3→192→160→96": (3, (192, 160, 96), 5),
}
RUNS = 2000


percentile = 50


def time_us(call: Callable[[], Any], runs: int) -> float:
    """Return that percentile of a call's times in microseconds."""
    times = []
    for _ in range(runs):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return sorted(times)[len(times) * percentile // 100] / 1e3


def host_times(driver: FakeDriver, channels: int, widths: Sequence[int], kernel_size: int, runs: int) -> dict[str, Any]:
    """Return the times of one layer at batch 1, one pixel."""
    import torch

    import nin
    from nin.ops.cpu import dispatch as cpu_dispatch
    from nin.ops.gpu import dispatch

    cpu_dispatch.KERNELS = None  # or the cache of the CPU's calls would answer, which a tensor on a GPU does not meet
    torch.manual_seed(0)
    layer = nin.MLPConv(channels, widths, kernel_size=kernel_size).bfloat16()
    x = torch.randn(1, channels, kernel_size, kernel_size).bfloat16().to(memory_format=torch.channels_last)
    weights, biases = [conv.weight for conv in layer.convs], [conv.bias for conv in layer.convs]
    inputs = [x.clone().requires_grad_(), *weights, *biases]

    def train() -> None:
        torch.autograd.grad(nin.mlpconv(inputs[0], weights, biases), inputs, grad)

    with torch.no_grad():
        y = nin.mlpconv(x, weights, biases)
        grad = torch.ones_like(y)
        before = driver.launches()
        nin.mlpconv(x, weights, biases)
        launches = driver.launches() - before
        inference = time_us(lambda: nin.mlpconv(x, weights, biases), runs)
    train()
    before = driver.launches()
    train()
    training_launches = driver.launches() - before
    own = _Nothing.apply

    def nothing() -> None:
        torch.autograd.grad(own(grads, y, *inputs), inputs, grad)

    grads = [torch.empty_like(t) for t in inputs]
    step, autograd = time_us(train, runs), time_us(nothing, runs)
    return {
        "inference_us": inference,
        "inference_launches": launches,
        "forward_and_backward_us": step,
        "autograd_us": autograd,
        "training_us": step - autograd,
        "training_launches": training_launches,
        "plans": len(dispatch._calls),
    }


def _nothing_class() -> Any:
    import torch

    class Nothing(torch.autograd.Function):
        """What autograd itself takes: a function of as many tensors, that computes nothing."""

        @staticmethod
        def forward(ctx: Any, grads: Any, y: Any, *tensors: Any) -> Any:
            ctx.grads = grads
            ctx.save_for_backward(*tensors)
            return y.view_as(y)

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            assert ctx.saved_tensors
            return (None, None, *ctx.grads)

    return Nothing


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, and write the results where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--case", help="part of a case's name")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--percentile", type=int, default=50, choices=range(100), metavar="P", help="of the times; 50")
    given = parser.parse_args(arguments)
    global percentile
    percentile = given.percentile
    driver = FakeDriver()

    import torch

    from nin.ops import schema
    from nin.ops.gpu import dispatch
    from nin.runtime.device import keep_freed_memory

    global _Nothing
    _Nothing = _nothing_class()
    torch.set_num_threads(1)
    keep_freed_memory()  # as the allocator of a GPU does
    # CPU tensors take the GPU's kernels
    schema.register_backend("cpu", dispatch.mlpconv, dispatch.mlpconv_backward, allow_override=True)
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.out", lambda a, b, *, out: out, "CPU", allow_override=True)
    results = {
        name: host_times(driver, *case, given.runs) for name, case in CASES.items() if (given.case or "") in name
    }
    print(f"{'case':28}{'inference':>12}{'launches':>10}{'training':>12}{'launches':>10}{'autograd':>12}")
    for name, row in results.items():
        times = f"{row['inference_us']:9.1f} µs{row['inference_launches']:10}{row['training_us']:9.1f} µs"
        print(f"{name:28}{times}{row['training_launches']:10}{row['autograd_us']:9.1f} µs")
    if given.json:
        given.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
