"""Compile the kernels for a GPU that need not be there; list registers, shared memory and spills.

    python benchmarks/gpu/compile_check.py [--capability 90] [--json FILE]

Every launch of the main cases is recorded as the launchers make it, compiled to machine code by Triton and the ptxas
that comes with it, and listed with its shared memory, registers, spilled bytes and matrix instructions. It ends with
status 1 where a kernel would not fit. Times need a GPU; this needs none.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nin.ops.arguments import ChainArguments
from nin.ops.gpu import backward, engine_plan, forward
from nin.ops.gpu.tile_sizes import H200

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MAX_CANDIDATES = 6  # tiles of a kernel that tuning tries at most


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of one call: input (N, C, H, W), widths, and the first layer's kernel and padding."""

    name: str
    input_shape: tuple[int, int, int, int]
    widths: tuple[int, ...]
    kernel_size: int = 1
    padding: int = 0
    activation: str = "relu"


CASES = (
    Case("chain 192→160→96", (512, 192, 32, 32), (160, 96)),
    Case("mlpconv 5×5 3→192→160→96", (512, 3, 32, 32), (192, 160, 96), 5, 2),
    Case("chain 192→192→192", (512, 192, 16, 16), (192, 192)),
    Case("chain 192→192→10", (512, 192, 8, 8), (192, 10)),
    Case("5×5 96→192", (512, 96, 16, 16), (192,), 5, 2),
    Case("3×3 192→192", (512, 192, 8, 8), (192,), 3, 1),
    Case("1×1 192→32", (512, 192, 28, 28), (32,)),
    Case("ConvNeXt 96→384→96, GELU", (64, 96, 56, 56), (384, 96), 1, 0, "gelu"),
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Resources of one compiled kernel."""

    case: str
    dtype: str
    layout: str
    kernel: str
    tiles: str
    warps: int
    stages: int
    shared_bytes: int
    registers: int
    spilled_bytes: int
    matrix_instructions: int


def record_launches(
    case: Case, dtype: torch.dtype, layout: torch.memory_format, all_candidates: bool = False
) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Return the launches (kernel, arguments, constants) of a forward and backward pass, on tensors without memory.

    With ``all_candidates``, those with all tiles that tuning would try, not with the defaults alone.
    """
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        launches.append((kernel, arguments, constants))

    x = torch.empty(case.input_shape, dtype=dtype, device="meta").to(memory_format=layout)
    sizes = [case.kernel_size] + [1] * (len(case.widths) - 1)
    channels = (case.input_shape[1], *case.widths)
    weights = [
        torch.empty(o, i, k, k, dtype=dtype, device="meta")
        for i, o, k in zip(channels, case.widths, sizes, strict=False)
    ]
    biases = [torch.empty(o, dtype=dtype, device="meta") for o in case.widths]
    chain = ChainArguments(weights, biases, (1, 1), (case.padding,) * 2, (1, 1), [case.activation] * len(weights))
    problem = engine_plan.ChainProblem.of(x, chain, "triton")
    forward_plan, backward_plan = engine_plan.plan_forward(problem), engine_plan.plan_backward(problem)
    with mock.patch.object(forward, "launch", record):
        for i in range(MAX_CANDIDATES if all_candidates else 1):
            y = forward.mlpconv(x, chain, with_candidate(forward_plan, i))
            needs = [True] * (1 + 2 * len(weights))
            backward.mlpconv_backward(torch.empty_like(y), x, y, chain, needs, with_candidate(backward_plan, i))
    return launches


def with_candidate(groups: Sequence[engine_plan.LayerGroup], i: int) -> list[Any]:
    """Return a plan in which each kernel has its i-th candidate alone, or its last one where it has fewer."""
    alone = []
    for group in groups:
        changes = {}
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            if field.name.endswith("tiles"):
                changes[field.name] = value[min(i, len(value) - 1) :][:1]
            elif field.name.endswith("plan"):
                changes[field.name] = tuple(with_candidate(value, i))
        alone.append(dataclasses.replace(group, **changes))
    return alone


def compile_launch(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], target: GPUTarget) -> Any:
    """Compile a kernel as the launch would: ones and constants are built in, multiples of 16 are known as such."""
    options = (
        {"num_warps": constants["num_warps"], "num_stages": constants["num_stages"]} if "num_warps" in constants else {}
    )
    signature, built_in, attributes = {}, {}, {}
    positional = dict(zip(kernel.arg_names, arguments, strict=False))
    for place, name in enumerate(kernel.arg_names):
        value = positional.get(name, constants.get(name))
        if name in constants or (not isinstance(value, Tensor) and value == 1):
            signature[name], built_in[(place,)] = "constexpr", value
            continue
        signature[name] = f"*{TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32" if value < 1 << 31 else "i64"
        if isinstance(value, Tensor) or value % 16 == 0:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=built_in, attrs=attributes)
    return triton.compile(source, target=target, options={**options, "enable_fp_fusion": True})


def resource_usage(machine_code: bytes) -> tuple[int, int]:
    """Return a thread's registers and its bytes of local memory, where spilled registers go."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = str(tool) if tool.exists() else shutil.which("cuobjdump")
    if command is None:
        raise SystemExit("cuobjdump is missing: it comes with Triton, or with CUDA's toolkit")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        text = subprocess.run([command, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers = [int(n) for n in re.findall(r"REG:(\d+)", text)]
    local = [int(n) for n in re.findall(r"(?:LOCAL|STACK):(\d+)", text)]
    return max(registers), max(local)


def check(
    cases: tuple[Case, ...], dtypes: list[torch.dtype], capability: int, all_candidates: bool = False
) -> Iterator[Compiled]:
    """Compile every launch of the cases, in both layouts; launches that are the same are compiled once."""
    target, seen = GPUTarget("cuda", capability, 32), set()
    for case in cases:
        for dtype in dtypes:
            for layout, layout_name in ((torch.channels_last, "channels_last"), (torch.contiguous_format, "NCHW")):
                for kernel, arguments, constants in record_launches(case, dtype, layout, all_candidates):
                    if kernel.__name__ == "add_parts":
                        continue
                    numbers = tuple(a for a in arguments if not isinstance(a, Tensor))
                    key = (kernel.__name__, dtype, numbers, tuple(constants.items()))
                    if key in seen:
                        continue
                    seen.add(key)
                    compiled = compile_launch(kernel, arguments, constants, target)
                    registers, local = resource_usage(compiled.asm["cubin"])
                    blocks = [f"{k}={constants[k]}" for k in ("BM", "BK", "BN", "B1", "B2", "B3") if k in constants]
                    blocks += ["resident"] if constants.get("RESIDENT") else []
                    matrix = len(re.findall(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"]))
                    yield Compiled(
                        case.name, TYPES[dtype], layout_name, kernel.__name__, " ".join(blocks), constants["num_warps"],
                        constants["num_stages"], compiled.metadata.shared, registers, local, matrix,
                    )  # fmt: skip


def table(rows: list[Compiled]) -> str:
    """Return the rows as a Markdown table."""
    head = "| case | dtype | layout | kernel | tiles | warps, stages | shared memory, kB | registers | spilled, bytes "
    lines = [head + "| matrix instructions |", "|" + "---|" * 10]
    lines += [
        f"| {r.case} | {r.dtype} | {r.layout} | {r.kernel} | {r.tiles} | {r.warps}, {r.stages} "
        f"| {r.shared_bytes / 1000:.0f} | {r.registers} | {r.spilled_bytes} | {r.matrix_instructions} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Check all cases; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="compute capability times ten")
    parser.add_argument("--dtype", action="append", choices=list(TYPES.values()), help="bf16 if not given")
    parser.add_argument("--case", action="append", help="part of a case's name; all if not given")
    parser.add_argument("--every-way", action="store_true", help="all tiles that tuning would try, not the defaults")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    dtypes = [dtype for dtype, name in TYPES.items() if name in (given.dtype or ["bf16"])]
    cases = tuple(c for c in CASES if not given.case or any(part in c.name for part in given.case))
    rows = []
    for row in check(cases, dtypes, given.capability, given.every_way):
        say(json.dumps(dataclasses.asdict(row), ensure_ascii=False))
        rows.append(row)
    say(table(rows))
    if given.json:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        header = {"date": datetime.date.today().isoformat(), "capability": given.capability, **versions}
        given.json.write_text(json.dumps({**header, "kernels": [dataclasses.asdict(r) for r in rows]}, indent=1) + "\n")
    return 1 if any(row.shared_bytes > H200.shared_bytes for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
