"""Times seven networks as they are, fused, under torch.compile, and fused under it, in turn within one process.

    python benchmarks/fusion/speed.py [NAME …] [--batches 1 16] [--dtypes fp32 bf16] [--no-compile]

224×224 pixels, channels_last, random weights, evaluation. Ratios are medians over rounds in which every engine ran
once. Adds to `speed.json` and writes `speed.md`.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import statistics
from pathlib import Path

import timm
import torch

import nin
from nin import checkpoint
from nin.runtime import device
from nin.runtime.timer import time_interleaved

HERE = Path(__file__).parent
NETWORKS = {
    "ConvNeXt atto": "convnext_atto",
    "ConvMixer 768/32": "convmixer_768_32",
    "MobileNetV2": "mobilenetv2_100",
    "ResNet-18": "resnet18",
    "ResNet-50": "resnet50",
    "SqueezeNet": "squeezenet1_1",
    "VGG-16": "vgg16",
}
ENGINES = ("eager", "compile", "fused", "fused + compile")
RATIOS = {
    "fused over eager": ("eager", "fused"),
    "fused over compile": ("compile", "fused"),
    "both over eager": ("eager", "fused + compile"),
    "both over compile": ("compile", "fused + compile"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load(name: str) -> torch.nn.Module:
    """Return a network with random weights."""
    if name.startswith("squeezenet"):
        import torchvision

        return torchvision.models.get_model(name, weights=None)
    return timm.create_model(name, pretrained=False)


@torch.no_grad()
def measure(name: str, batch: int, dtype: str, *, compiled: bool, runs: int) -> dict[str, float | str]:
    """Return the median milliseconds of each engine."""
    torch.manual_seed(0)
    size = 112 if name.startswith("convmixer") else 224
    model = load(name).eval().to(DTYPES[dtype], memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(batch, 3, size, size).to(DTYPES[dtype]).contiguous(memory_format=torch.channels_last)
    fused = nin.fuse(model, x, runs=5)
    engines = {"eager": lambda: model(x), "fused": lambda: fused.model(x)}
    if compiled:
        torch._dynamo.reset()
        fast = torch.compile(copy.deepcopy(model))
        both = torch.compile(copy.deepcopy(fused.model))
        engines["compile"] = lambda: fast(x)
        engines["fused + compile"] = lambda: both(x)
    times = time_interleaved(engines, runs=runs, warmup=3)
    forms = [chain.form for chain in fused.chains]
    counts = ", ".join(f"{forms.count(form)} {form}" for form in dict.fromkeys(forms))
    return {**{engine: t.median_ms for engine, t in times.items()}, "forms": counts}


def write(rows: dict[str, dict[str, float | str]], header: dict[str, object]) -> None:
    """Write the table and the geometric means."""
    lines = [
        "# Fused networks beside PyTorch",
        "",
        f"`python benchmarks/fusion/speed.py`; {header['processor']}, {header['threads']} threads, torch "
        f"{torch.__version__}, timm {timm.__version__}; {header['date']}. Medians in ms, engines in turn in one "
        "process, channels_last; 224×224 pixels (ConvMixer: 112×112). A ratio above 1: fused is faster.",
        "",
        f"| network | dtype | batch | {' | '.join(ENGINES)} | {' | '.join(RATIOS)} | chains |",
        f"|---|---|---:|{'---:|' * (len(ENGINES) + len(RATIOS))}---|",
    ]
    over: dict[str, list[float]] = {name: [] for name in RATIOS}
    for key, row in rows.items():
        cells = [f"{row[engine]:.2f}" if engine in row else "–" for engine in ENGINES]
        for name, (slow, fast) in RATIOS.items():
            ratio = float(row[slow]) / float(row[fast]) if slow in row and fast in row else None
            cells.append("–" if ratio is None else f"{ratio:.2f}")
            over[name] += [] if ratio is None else [ratio]
        lines.append(f"| {key.replace('; ', ' | ')} | {' | '.join(cells)} | {row['forms']} |")
    means = {name: statistics.geometric_mean(ratios) for name, ratios in over.items() if ratios}
    lines += ["", "Geometric means: " + ", ".join(f"{name} {mean:.2f}" for name, mean in means.items()) + "."]
    (HERE / "speed.md").write_text("\n".join(lines) + "\n")
    (HERE / "speed.json").write_text(json.dumps({**header, "means": means, "rows": rows}, indent=1) + "\n")


def main() -> None:
    """Measure and keep what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(NETWORKS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--runs", type=int, default=11)
    arguments = parser.parse_args()
    device.keep_freed_memory()
    environment = checkpoint.environment()
    header = {"date": datetime.date.today().isoformat(), **environment}
    path = HERE / "speed.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    for name in arguments.names:
        for dtype in arguments.dtypes:
            for batch in arguments.batches:
                row = measure(NETWORKS[name], batch, dtype, compiled=not arguments.no_compile, runs=arguments.runs)
                rows[f"{name}; {dtype}; {batch}"] = row
                print(name, dtype, batch, row, flush=True)
                write(rows, header)


if __name__ == "__main__":
    main()
