"""Time the operator on a GPU beside other engines, after checking every engine against float64.

    python benchmarks/gpu/kernels.py [--case TEXT] [--dtype bf16] [--seconds 90] [--max-autotune] [--out FOLDER]
        [--dry-run]

Engines: nin (its own choice), PyTorch eager in channels_last, cuBLASLt with its epilogue (1×1 chains, forward),
torch.compile with its defaults; with --max-autotune also nin in NCHW and with Triton forced, eager in NCHW and with
cuDNN's own search, and torch.compile's longest search, which takes 90 s a case. Two kinds of time: "eager" is CUDA
events around a call, host work included; "in a graph" is a call's share of a CUDA graph of several, replayed: the GPU's
time alone. Engines in turn within a round, inputs rotated, random data; medians with the 20th and 80th percentile.
kernels.jsonl and kernels.md grow with each row; when the time is over the page says what was left out. --dry-run does
all of it on small tensors on the CPU, as a test of this script.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measuring
import torch
from compile_check import CASES, Case
from torch import Tensor, nn

import nin
from nin.config import TrainConfig
from nin.ops.gpu import dispatch
from nin.profiling.bench.engines import to_torch_modules
from nin.training.step import TrainStep, make_model

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROTATED_BYTES = 256 << 20  # of inputs that take turns: five times an H200's L2 cache
STEP_BATCHES = (1024, 512, 2048)  # the bar's first
CALLS_IN_A_GRAPH = 4
SECONDS = 2.0  # that the engines of a case share

Call = Callable[[int], Any]


@dataclasses.dataclass(frozen=True)
class Engine:
    """How a model is called: in which layout, compiled or not, and what `NIN_GPU` says."""

    name: str
    ours: bool
    layout: torch.memory_format = torch.channels_last
    compiled: str = ""  # torch.compile's mode
    search: bool = False
    library: bool = False  # torch._addmm_activation on the pixels as rows
    variable: str = "auto"


ENGINES = (
    Engine("nin", True),
    Engine("eager channels_last", False),
    Engine("cuBLASLt", False, library=True),
    Engine("compile", False, compiled="default"),
)
MORE_ENGINES = (
    Engine("nin NCHW", True, torch.contiguous_format),
    Engine("nin, Triton forced", True, variable="triton"),
    Engine("eager NCHW", False, torch.contiguous_format),
    Engine("cuDNN's search, channels_last", False, search=True),
    Engine("compile max-autotune", False, compiled="max-autotune-no-cudagraphs"),
)


def takes(engine: Engine, case: Case, *, backward: bool) -> bool:
    """Return whether an engine can run a case: cuBLASLt's epilogue is for products of matrices with a ReLU."""
    return not engine.library or (case.kernel_size == 1 and case.activation == "relu" and not backward)


class LibraryChain(nn.Module):
    """A chain of 1×1 convolutions as products of matrices, bias and ReLU in cuBLASLt's epilogue.

    Args:
        model: the chain, of PyTorch's own modules.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.convs = nn.ModuleList(m for m in model.modules() if isinstance(m, nn.Conv2d))

    def forward(self, x: Tensor) -> Tensor:
        """Return the chain's result, (N, C, H, W) in channels_last."""
        images, _, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(images * height * width, -1)
        for conv in self.convs:
            rows = torch._addmm_activation(conv.bias, rows, conv.weight.flatten(1).T)
        return rows.view(images, height, width, -1).permute(0, 3, 1, 2)


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
    model = LibraryChain(model) if engine.library else model
    model = model.to(device=x[0].device, dtype=x[0].dtype, memory_format=engine.layout)
    run = torch.compile(model, mode=engine.compiled, dynamic=False) if engine.compiled else model
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


def run_case(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    backward: bool,
    budget: measuring.Budget,
    more: bool,
    runs: int,
) -> Iterator[dict[str, Any]]:
    """Check and time one case with every engine: yield what is eager, then what is in a graph."""
    size = torch.Size(case.input_shape).numel() * dtype.itemsize
    torch.manual_seed(0)
    count = max(2, -(-ROTATED_BYTES // size)) if device.type == "cuda" else 2
    x = [torch.randn(case.input_shape, device=device).to(dtype) for _ in range(min(count, 64))]
    engines = [e for e in (*ENGINES, *(MORE_ENGINES if more else ())) if takes(e, case, backward=backward)]
    engines = [e for e in engines if device.type == "cuda" or not e.compiled]
    weights = sum(p.numel() for p in build(case).parameters())
    values = x[0].numel() + case.input_shape[0] * case.widths[-1] * case.input_shape[2] * case.input_shape[3] + weights
    row: dict[str, Any] = {
        "case": case.name + (", forward + backward" if backward else ", forward"),
        "dtype": str(dtype).removeprefix("torch."),
        "least_bytes": values * dtype.itemsize,
        "relative_error": {e.name: error_against_float64(e, case, x[0], backward) for e in engines},
        "kept_bytes": {e.name: kept_bytes(e, case, x[0]) for e in engines if not e.compiled} if backward else {},
    }
    with dispatch.record_groups() as groups:
        calls = {e.name: prepare(e, case, x, backward)[0] for e in engines}
        calls[ENGINES[0].name](0)
    row["nin_ran"] = dispatch.engine_summary(groups)
    seconds = min(SECONDS, budget.left() / 4)
    yield {**row, "kind": "eager", "milliseconds": measuring.compare(calls, device, seconds=seconds, runs=runs)}
    if device.type == "cuda":
        graphs = {name: in_a_graph(call, min(len(x), CALLS_IN_A_GRAPH)) for name, call in calls.items()}
        times = measuring.compare(graphs, device, seconds=seconds, runs=runs, divisor=min(len(x), CALLS_IN_A_GRAPH))
        yield {**row, "kind": "in a graph", "milliseconds": times}


def in_a_graph(call: Call, count: int) -> Call:
    """Return a call that replays a CUDA graph of so many calls, each on another input."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(count + 2):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        kept = [call(i) for i in range(count)]

    def replay(i: int) -> Any:
        graph.replay()
        return kept

    return replay


def run_steps(batch: int, device: torch.device, budget: measuring.Budget, more: bool, runs: int) -> dict[str, Any]:
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
        mode = "max-autotune" if more else "reduce-overhead"
        compiled.model.forward = torch.compile(compiled.model.forward, mode=mode, dynamic=False)
        engines[f"compile {mode}"] = compiled
    calls: dict[str, Call] = {name: (lambda i, step=step: step(x, labels, 100, 1000)) for name, step in engines.items()}
    times = measuring.compare(calls, device, seconds=min(SECONDS, budget.left() / 8), runs=runs)
    case = f"NiN-CIFAR training step, batch {batch}"
    return {"case": case, "dtype": "autocast", "kind": "eager", "milliseconds": times}


def table(rows: list[dict[str, Any]], copy_bytes_per_s: float | None) -> str:
    """Return the results as Markdown: a line for each engine of each case."""
    lines = [
        "| case | kind | engine | median, ms | 20 to 80 % | times nin | of copy bandwidth | error |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        ours = row["milliseconds"].get("nin", {}).get("median_ms")
        for engine, t in row["milliseconds"].items():
            share = ""
            if copy_bytes_per_s and "least_bytes" in row and "backward" not in row["case"]:
                share = f"{row['least_bytes'] / t['median_ms'] * 1e3 / copy_bytes_per_s:.0%}"
            error = row.get("relative_error", {}).get(engine)
            shown = "" if error is None else f"{error:.1e}"
            lines.append(
                f"| {row['case']}, {row['dtype']} | {row['kind']} | {engine} | {t['median_ms']:.4f} "
                f"| {t['low_ms']:.4f} to {t['high_ms']:.4f} | {t['median_ms'] / ours:.2f} | {share} | {shown} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="part of a case's name; 'step' stands for the training steps")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=90.0, help="for all of it")
    parser.add_argument("--max-autotune", action="store_true", help="more engines, in minutes a case")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args(arguments)
    device, budget = measuring.choose_device(dry=given.dry_run), measuring.Budget(given.seconds)
    runs = 2 if given.dry_run else 50
    copy = measuring.copy_bytes_per_second(device)
    header = {**measuring.machine(device), "copy_bytes_per_s": copy, "backend": nin.backends()["cuda"]}
    results = measuring.Results(given.out, "kernels", header, lambda rows: table(rows, copy))
    longest_s = 0.0  # what a case took: none is begun that would not end
    for case in CASES:
        if given.case and not any(text in case.name for text in given.case):
            continue
        small = dataclasses.replace(case, input_shape=(2, case.input_shape[1], 6, 5)) if given.dry_run else case
        for dtype in given.dtype or ["bf16"]:
            for backward in (False, True):
                if results.rows and budget.left() <= longest_s:
                    results.leave_out(f"{case.name}, {dtype}, {'forward + backward' if backward else 'forward'}")
                    continue
                left = budget.left()
                for row in run_case(small, DTYPES[dtype], device, backward, budget, given.max_autotune, runs):
                    results.add(row)
                    print(f"{given.seconds - budget.left():6.0f} s  {row['case']}, {row['kind']}", flush=True)
                longest_s = max(longest_s, left - budget.left())
    if not given.case or "step" in given.case:
        for batch in (4,) if given.dry_run else STEP_BATCHES:
            if budget.left() < 5 and not given.dry_run:
                results.leave_out(f"training step, batch {batch}")
                continue
            results.add(run_steps(batch, device, budget, given.max_autotune, runs))


if __name__ == "__main__":
    main()
