"""Compile the kernels for a GPU that need not be there; list registers, shared memory and spills.

    python benchmarks/gpu/compile_check.py [--capability 90] [--json FILE]
    python benchmarks/gpu/compile_check.py --grid large [--capability 80] [--json FILE]

Every launch of the main cases is recorded as the launchers make it, compiled to machine code by Triton and the ptxas
that comes with it, and listed with its shared memory, registers, spilled bytes and matrix instructions. With ``--grid``
the kernels of many widths and dtypes, both precisions of float32 among them, are compiled as far as their shared memory
is known, with one candidate of their tiles after the other until one fits the card. It ends with status 1 where a
kernel fits with none. Times need a GPU; this needs none.
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
from triton._C.libtriton import ir, nvidia, passes
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia_compiler
from triton.compiler import ASTSource, make_backend

from nin.ops.arguments import ChainArguments
from nin.ops.gpu import backward, engine_plan, forward
from nin.ops.gpu.problem import ChainProblem

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
    case: Case, dtype: torch.dtype, layout: torch.memory_format, *, candidate: int = 0, shared_bytes: int | None = None
) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Return the launches (kernel, arguments, constants) of a forward and backward pass, on tensors without memory.

    Args:
        case: the shapes.
        dtype: of all tensors.
        layout: of the images.
        candidate: which of the tiles that tuning would try, 0 for the default.
        shared_bytes: of the card that it is planned for; a Hopper's if not given.
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
    problem = ChainProblem.of(x, chain, "triton")
    if shared_bytes is not None:
        problem = dataclasses.replace(problem, device=dataclasses.replace(problem.device, shared_bytes=shared_bytes))
    forward_plan, backward_plan = engine_plan.plan_forward(problem), engine_plan.plan_backward(problem)
    with mock.patch.object(forward, "launch", record):
        y = forward.mlpconv(x, chain, with_candidate(forward_plan, candidate))
        needs = [True] * (1 + 2 * len(weights))
        backward.mlpconv_backward(torch.empty_like(y), x, y, chain, needs, with_candidate(backward_plan, candidate))
    return launches


# ---- the grid --------------------------------------------------------------------------------------------------

# Bytes of shared memory that a block may have, by compute capability times ten: 1 kB less than an SM has.
CARDS = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}

SMALL_GRID = (
    Case("192→192→192", (2, 192, 7, 7), (192, 192)),  # took 1,050,112 bytes of a Hopper in float32
)
LARGE_GRID = (
    *SMALL_GRID,
    Case("192→160→96", (2, 192, 32, 32), (160, 96)),
    Case("1→3→2", (2, 1, 8, 8), (3, 2)),
    Case("5×5 1→192→160→96", (2, 1, 28, 28), (192, 160, 96), 5, 2),
    Case("5×5 3→192→160→96", (2, 3, 32, 32), (192, 160, 96), 5, 2),
    Case("5×5 96→192→192→192", (2, 96, 14, 14), (192, 192, 192), 5, 2),
    Case("3×3 192→192→192→10", (2, 192, 7, 7), (192, 192, 10), 3, 1),
    Case("192→32", (2, 192, 28, 28), (32,)),
    Case("96→384→96", (2, 96, 56, 56), (384, 96), 1, 0, "gelu"),
    Case("256→64→256", (2, 256, 14, 14), (64, 256), 1, 0, "silu"),
    Case("300→17→65→33", (2, 300, 9, 9), (17, 65, 33)),
    Case("512→512→512", (2, 512, 7, 7), (512, 512)),
    Case("768→3072→768", (2, 768, 7, 7), (3072, 768), 1, 0, "gelu"),
)


@dataclasses.dataclass(frozen=True)
class Fit:
    """The shared memory of a kernel with one candidate of its tiles; ``launch`` counts the case's launches."""

    case: str
    dtype: str
    capability: int
    kernel: str
    launch: int
    tiles: str
    shared_bytes: int
    fits: bool


def find_fits(case: Case, dtype: torch.dtype, capability: int) -> Iterator[Fit]:
    """Compile each kernel of a forward and backward pass with one candidate after the other until one fits the card."""
    limit, fitting, seen = CARDS[capability], set(), {}
    for i in range(MAX_CANDIDATES):
        launches = record_launches(case, dtype, torch.channels_last, candidate=i, shared_bytes=limit)
        for place, (kernel, arguments, constants) in enumerate(launches):
            if place in fitting or kernel.__name__ == "add_parts":  # sums that need no matrix unit
                fitting.add(place)
                continue
            key = (kernel.__name__, *(a for a in arguments if not isinstance(a, Tensor)), *constants.items())
            if key not in seen:
                taken = seen[key] = shared_bytes(kernel, arguments, constants, capability)
                precision = f" {constants['PRECISION']}" if dtype == torch.float32 else ""
                name = TYPES[dtype] + precision
                tiles, fits = describe(constants), taken <= limit
                yield Fit(case.name, name, capability, kernel.__name__, place, tiles, taken, fits)
            if seen[key] <= limit:
                fitting.add(place)
        if len(fitting) == len(launches):
            return


def without_fit(rows: Sequence[Fit]) -> list[str]:
    """Return the kernels that fit with none of their tiles."""
    fitting: dict[str, bool] = {}
    for row in rows:
        name = f"{row.kernel} of {row.case}, launch {row.launch}, {row.dtype}, on {row.capability}"
        fitting[name] = fitting.get(name, False) or row.fits
    return [name for name, fits in fitting.items() if not fits]


def fit_table(rows: Sequence[Fit]) -> str:
    """Return as a Markdown table, for each card and dtype, which of their tiles the kernels fit with."""
    launches: dict[tuple[int, str], dict[tuple[str, int], list[bool]]] = {}
    for row in rows:
        kernels = launches.setdefault((row.capability, row.dtype), {})
        kernels.setdefault((row.case, row.launch), []).append(row.fits)
    lines = [
        "| card | dtype | compiled | kernels | fit by the default tiles | by later ones | by none |",
        "|---" * 7 + "|",
    ]
    for (capability, dtype), kernels in launches.items():
        found = kernels.values()
        default, later = sum(fits[0] for fits in found), sum(any(fits) and not fits[0] for fits in found)
        counts = sum(map(len, found)), len(found), default, later, len(found) - default - later
        lines.append(f"| {capability // 10}.{capability % 10} | {dtype} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines) + "\n"


def shared_bytes(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], capability: int) -> int:
    """Return the shared memory that the compiler takes: what ``compiled.metadata.shared`` says, in a third of the time.

    The compiler knows it once it has placed the kernel's tiles, before it makes machine instructions.
    """
    target, source = GPUTarget("cuda", capability, 32), kernel_source(kernel, arguments, constants)
    backend = make_backend(target)
    options = backend.parse_options({"arch": f"sm{capability}", **compile_options(constants)})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, functions, modules, context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    metadata = {"target": target, **options.__dict__}
    for name in ("ttir", "ttgir"):
        module = stages[name](module, metadata)
    placing = ir.pass_manager(context)
    passes.convert.add_scf_to_cf(placing)
    passes.gluon.add_inliner(placing)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(placing, capability, get_ptx_version(options, capability))
    placing.run(module, "placing")
    return int(module.get_int_attr("ttg.shared"))


def get_ptx_version(options: Any, capability: int) -> int:
    """Return the version of PTX that Triton takes for the GPU."""
    return int(nvidia_compiler.get_ptx_version_from_options(options, capability))


def check_grid(
    cases: Sequence[Case], capabilities: Sequence[int], dtypes: Sequence[torch.dtype], say: Callable[[str], None]
) -> list[Fit]:
    """Compile a grid and say each row as it is known; float32 in both precisions."""
    convolutions: Any = torch.backends.cudnn.conv
    rows = []
    for capability in capabilities:
        for dtype in dtypes:
            for precision in ("tf32", "ieee") if dtype == torch.float32 else ("tf32",):
                before, convolutions.fp32_precision = convolutions.fp32_precision, precision
                try:
                    for case in cases:
                        for row in find_fits(case, dtype, capability):
                            say(json.dumps(dataclasses.asdict(row), ensure_ascii=False))
                            rows.append(row)
                finally:
                    convolutions.fp32_precision = before
    return rows


# ---- the main cases --------------------------------------------------------------------------------------------


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
    """Compile a kernel as the launch would."""
    source = kernel_source(kernel, arguments, constants)
    return triton.compile(source, target=target, options=compile_options(constants))


def compile_options(constants: dict[str, Any]) -> dict[str, Any]:
    """Return what of a launch's constants is for the compiler, not for the kernel."""
    return {n: constants[n] for n in ("num_warps", "num_stages") if n in constants} | {"enable_fp_fusion": True}


def describe(constants: dict[str, Any]) -> str:
    """Return a launch's tiles in words."""
    blocks = [f"{k}={constants[k]}" for k in ("BM", "BK", "BN", "B1", "B2", "B3", "CHUNKS") if k in constants]
    pipeline = [f"{constants[n]} {n.removeprefix('num_')}" for n in ("num_warps", "num_stages") if n in constants]
    return " ".join(blocks + (["resident"] if constants.get("RESIDENT") else []) + pipeline)


def kernel_source(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> ASTSource:
    """Return a kernel as the launch has it: ones and constants are built in, multiples of 16 are known as such."""
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
    return ASTSource(fn=kernel, signature=signature, constexprs=built_in, attrs=attributes)


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
                candidates = range(MAX_CANDIDATES if all_candidates else 1)
                launches = (launch for i in candidates for launch in record_launches(case, dtype, layout, candidate=i))
                for kernel, arguments, constants in launches:
                    if kernel.__name__ == "add_parts":
                        continue
                    # what Triton compiles a number for: pieces of the pixels differ in theirs
                    numbers = tuple((a == 1, a % 16 == 0, a >= 1 << 31) for a in arguments if not isinstance(a, Tensor))
                    key = (kernel.__name__, dtype, numbers, tuple(constants.items()))
                    if key in seen:
                        continue
                    seen.add(key)
                    compiled = compile_launch(kernel, arguments, constants, target)
                    registers, local = resource_usage(compiled.asm["cubin"])
                    matrix = len(re.findall(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"]))
                    yield Compiled(
                        case.name, TYPES[dtype], layout_name, kernel.__name__, describe(constants),
                        constants["num_warps"], constants["num_stages"], compiled.metadata.shared, registers, local,
                        matrix,
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
    parser.add_argument(
        "--capability",
        type=int,
        action="append",
        choices=CARDS,
        help="compute capability times ten; 90, of a grid all",
    )
    parser.add_argument("--dtype", action="append", choices=list(TYPES.values()), help="bf16, of a grid all")
    parser.add_argument("--case", action="append", help="part of a case's name; all if not given")
    parser.add_argument("--every-way", action="store_true", help="all tiles that tuning would try, not the defaults")
    parser.add_argument("--grid", choices=("small", "large"), help="what fits each card, not the main cases")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    wanted = given.dtype or (list(TYPES.values()) if given.grid else ["bf16"])
    dtypes = [dtype for dtype, name in TYPES.items() if name in wanted]
    known = {None: CASES, "small": SMALL_GRID, "large": LARGE_GRID}[given.grid]
    cases = tuple(c for c in known if not given.case or any(part in c.name for part in given.case))
    if given.grid:
        fits = check_grid(cases, given.capability or list(CARDS), dtypes, say)
        if given.json:
            given.json.write_text(json.dumps([dataclasses.asdict(row) for row in fits], indent=1) + "\n")
        say(fit_table(fits))
        misfits = without_fit(fits)
        say(f"{len(fits)} compiled, {len(misfits)} kernels fit with no tiles" + "".join(f"\n{m}" for m in misfits))
        return 1 if misfits else 0
    (capability,) = given.capability or [90]
    rows = []
    for row in check(cases, dtypes, capability, given.every_way):
        say(json.dumps(dataclasses.asdict(row), ensure_ascii=False))
        rows.append(row)
    say(table(rows))
    if given.json:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        header = {"date": datetime.date.today().isoformat(), "capability": capability, **versions}
        given.json.write_text(json.dumps({**header, "kernels": [dataclasses.asdict(r) for r in rows]}, indent=1) + "\n")
    return 1 if any(row.shared_bytes > CARDS[capability] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
