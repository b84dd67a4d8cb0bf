"""Time the operator on a GPU beside other engines, after checking every engine against float64.

    python benchmarks/gpu/kernels.py [--case TEXT] [--dtype bf16] [--out FOLDER] [--dry-run]

Engines: nin (by its own choice), nin with Triton forced, PyTorch eager in NCHW and channels_last, eager with
cuDNN's own search, torch.compile with max-autotune. CUDA events around each call, engines in turn within a round,
inputs rotated so that none is in the L2 cache, random data; medians with the 20th and 80th percentile. Writes
kernels.json and kernels.md. --dry-run does all of it on small tensors on the CPU, as a test of this script.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measuring
import torch
from compile_check import CASES, Case
from torch import Tensor, nn

import nin
from nin.config import TrainConfig
from nin.ops.arguments import ChainArguments
from nin.ops.gpu import dispatch
from nin.profiling.bench.engines import to_torch_modules
from nin.training.step import TrainStep, make_model

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROTATED_BYTES = 256 << 20  # of inputs that take turns: five times an H200's L2 cache
STEP_BATCHES = (512, 1024, 2048)
SECONDS = 2.0  # that the engines of a case share

Call = Callable[[int], Any]


@dataclasses.dataclass(frozen=True)
class Engine:
    """How a model is called: in which layout, compiled or not, and what `NIN_GPU` says."""

    name: str
    ours: bool
    layout: torch.memory_format = torch.channels_last
    compiled: bool = False
    search: bool = False
    variable: str = "auto"


ENGINES = (
    Engine("nin", True),
    Engine("nin NCHW", True, torch.contiguous_format),
    Engine("nin, Triton forced", True, variable="triton"),
    Engine("eager NCHW", False, torch.contiguous_format),
    Engine("eager channels_last", False),
    Engine("cuDNN's search, channels_last", False, search=True),
    Engine("compile max-autotune", False, compiled=True),
)


def build(case: Case) -> nn.Module:
    """Return the case as this package's layer, the same weights each time."""
    torch.manual_seed(0)
    return nin.MLPConv(
        case.input_shape[1], case.widths, kernel_size=case.kernel_size, padding=case.padding, activation=case.activation
    )


@contextlib.contextmanager
def setting(engine: Engine) -> Iterator[None]:
    """Set what the engine needs, for one call or one preparation."""
    before = os.environ.get("NIN_GPU"), torch.backends.cudnn.benchmark
    os.environ["NIN_GPU"], torch.backends.cudnn.benchmark = engine.variable, engine.search
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before[1]
        os.environ.pop("NIN_GPU")
        if before[0] is not None:
            os.environ["NIN_GPU"] = before[0]


def prepare(engine: Engine, case: Case, x: list[Tensor], backward: bool) -> tuple[Call, nn.Module]:
    """Return the call of round i, and the model; a backward call computes all gradients of a given gradient."""
    model = build(case) if engine.ours else to_torch_modules(build(case))
    model = model.to(device=x[0].device, dtype=x[0].dtype, memory_format=engine.layout)
    run = torch.compile(model, mode="max-autotune-no-cudagraphs", dynamic=False) if engine.compiled else model
    inputs = [t.contiguous(memory_format=engine.layout) for t in x]
    if not backward:

        def infer(i: int) -> Tensor:
            with torch.no_grad(), setting(engine):
                return run(inputs[i % len(inputs)])

        return infer, model
    leaves = [t.requires_grad_() for t in inputs]
    with torch.no_grad():
        grad = torch.randn_like(model(leaves[0]))

    def differentiate(i: int) -> Any:
        leaf = leaves[i % len(leaves)]
        with setting(engine):
            return torch.autograd.grad(run(leaf), [leaf, *model.parameters()], grad)

    return differentiate, model


def error_against_float64(engine: Engine, case: Case, x: Tensor, backward: bool) -> float:
    """Return the largest error over the largest value, of the result or of any gradient, on two images."""
    few = [x[:2]]
    call, model = prepare(engine, case, few, backward=False)
    results: Any = (call(0),)
    exact = to_torch_modules(build(case)).to(x.device).double()
    exact.load_state_dict(dict(zip(exact.state_dict(), (p.double() for p in model.state_dict().values()), strict=True)))
    leaf = few[0].detach().double().requires_grad_()
    wanted: Any = (exact(leaf),)
    if backward:
        wanted = torch.autograd.grad(wanted[0].sum(), [leaf, *exact.parameters()])
        with setting(engine):
            again = few[0].detach().contiguous(memory_format=engine.layout).requires_grad_()
            results = torch.autograd.grad(model(again).sum(), [again, *model.parameters()])
    return max(
        ((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()
        for got, want in zip(results, wanted, strict=True)
    )


def kept_bytes(engine: Engine, case: Case, x: Tensor) -> int:
    """Return the bytes that the forward pass keeps for the backward pass, input, result and weights not among them."""
    model = (build(case) if engine.ours else to_torch_modules(build(case))).to(device=x.device, dtype=x.dtype)
    leaf = x.detach().contiguous(memory_format=engine.layout).requires_grad_()
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), setting(engine):
        y = model(leaf)
    for known in (leaf, y, *model.parameters()):
        kept.pop(known.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def run_case(case: Case, dtype: torch.dtype, device: torch.device, backward: bool, runs: int) -> dict[str, Any]:
    """Check and time one case with every engine."""
    size = torch.Size(case.input_shape).numel() * dtype.itemsize
    torch.manual_seed(0)
    count = max(2, -(-ROTATED_BYTES // size)) if device.type == "cuda" else 2
    x = [torch.randn(case.input_shape, device=device).to(dtype) for _ in range(min(count, 64))]
    engines = [e for e in ENGINES if device.type == "cuda" or not e.compiled]
    errors = {e.name: error_against_float64(e, case, x[0], backward) for e in engines}
    calls = {e.name: prepare(e, case, x, backward)[0] for e in engines}
    times = measuring.compare(calls, device, seconds=SECONDS, runs=runs)
    weights = sum(p.numel() for p in build(case).parameters())
    values = x[0].numel() + case.input_shape[0] * case.widths[-1] * case.input_shape[2] * case.input_shape[3] + weights
    with setting(ENGINES[0]):
        geometry = ((1, 1), (case.padding,) * 2, (1, 1), [case.activation] * len(case.widths))
        convs = build(case).convs
        chain = ChainArguments([c.weight for c in convs], [c.bias for c in convs], *geometry)  # type: ignore[union-attr]
        groups = (dispatch.backward_plan if backward else dispatch.forward_plan)(x[0], chain)
    return {
        "case": case.name + (", forward + backward" if backward else ", forward"),
        "dtype": str(dtype).removeprefix("torch."),
        "least_bytes": values * dtype.itemsize,
        "nin_ran": [{"first": g.first, "count": g.count, "fused": g.fused} for g in groups],
        "relative_error": errors,
        "kept_bytes": {e.name: kept_bytes(e, case, x[0]) for e in engines if not e.compiled} if backward else {},
        "milliseconds": times,
    }


def run_steps(batch: int, device: torch.device, runs: int) -> dict[str, Any]:
    """Time a training step of NiN-CIFAR: ours, replayed or not, and PyTorch's own layers."""
    config = TrainConfig(recipe="speed", batch_size=batch, model="nin_cifar", device=str(device))
    recipe = config.resolve(images=50_000, image_size=32, flip=True, shift=2)
    unreplayed = dataclasses.replace(recipe, recipe="default")

    def network() -> nn.Module:
        return make_model(recipe, channels=3, classes=10, size=32)

    x = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,), device=device)
    engines = {"nin, one graph": TrainStep(network, recipe), "nin": TrainStep(network, unreplayed)}
    engines["eager channels_last"] = TrainStep(lambda: to_torch_modules(network()), unreplayed)
    if device.type == "cuda":
        compiled = TrainStep(lambda: to_torch_modules(network()), unreplayed)
        compiled.model.forward = torch.compile(compiled.model.forward, mode="max-autotune", dynamic=False)
        engines["compile max-autotune"] = compiled
    calls: dict[str, Call] = {name: (lambda i, step=step: step(x, labels, 100, 1000)) for name, step in engines.items()}
    times = measuring.compare(calls, device, seconds=SECONDS, runs=runs)
    return {"case": f"NiN-CIFAR training step, batch {batch}", "dtype": "autocast", "milliseconds": times}


def table(rows: list[dict[str, Any]], copy_bytes_per_s: float | None) -> str:
    """Return the results as Markdown: a line for each engine of each case."""
    lines = ["| case | engine | median, ms | 20 to 80 % | times nin | of copy bandwidth | error |", "|" + "---|" * 7]
    for row in rows:
        ours = row["milliseconds"].get("nin", {}).get("median_ms")
        for engine, t in row["milliseconds"].items():
            share = ""
            if copy_bytes_per_s and "least_bytes" in row and "backward" not in row["case"]:
                share = f"{row['least_bytes'] / t['median_ms'] * 1e3 / copy_bytes_per_s:.0%}"
            error = row.get("relative_error", {}).get(engine)
            shown = "" if error is None else f"{error:.1e}"
            lines.append(
                f"| {row['case']}, {row['dtype']} | {engine} | {t['median_ms']:.4f} | {t['low_ms']:.4f} to "
                f"{t['high_ms']:.4f} | {t['median_ms'] / ours:.2f} | {share} | {shown} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="part of a case's name; 'step' stands for the training steps")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args(arguments)
    device = measuring.choose_device(dry=given.dry_run)
    started, runs = time.monotonic(), 2 if given.dry_run else 50
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if given.case and not any(text in case.name for text in given.case):
            continue
        small = dataclasses.replace(case, input_shape=(2, case.input_shape[1], 6, 5)) if given.dry_run else case
        for dtype in given.dtype or ["bf16"]:
            for backward in (False, True):
                rows.append(run_case(small, DTYPES[dtype], device, backward, runs))
                print(f"{time.monotonic() - started:6.0f} s  {rows[-1]['case']}", flush=True)
    if not given.case or "step" in given.case:
        rows += [run_steps(batch, device, runs) for batch in ((4,) if given.dry_run else STEP_BATCHES)]
    copy = measuring.copy_bytes_per_second(device)
    header = {**measuring.machine(device), "copy_bytes_per_s": copy, "backend": nin.backends()["cuda"]}
    page = measuring.title("Kernels", header) + table(rows, copy)
    measuring.write(given.out, "kernels", {**header, "rows": rows}, page)


if __name__ == "__main__":
    main()
