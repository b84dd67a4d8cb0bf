"""Networks of depthwise and 1×1 layers, random weights: narrowed to 0.6 of their multiply-accumulates, and timed.

python benchmarks/narrowing/modern_networks.py [--share 0.6] [--size 224] [--images 32] [--threads 1] [NAME ...]

It needs timm. Calibration images are noise: random weights say nothing about accuracy. Both networks are timed in turn
in one process, in plain PyTorch and after `nin.fuse` with an example of the batch size; the ratio of an engine is that
of its own two medians. Prints one line of JSON for each network.
"""

import argparse
import json
import resource
import time
import warnings

import timm
import torch
from any_cnn import create
from torch import nn

import nin
from nin.runtime.timer import time_interleaved

NAMES = ("mobilenetv3_small_100", "mobilenetv4_conv_small", "convnext_atto", "tf_efficientnet_lite0", "ghostnet_100")


def engines(model: nn.Module, x: torch.Tensor) -> dict[str, nn.Module]:
    """Return the network as each engine runs it."""
    return {"eager": model, "fuse": nin.fuse(model, x).model}


@torch.inference_mode()
def timings(before: nn.Module, after: nn.Module, x: torch.Tensor, runs: int) -> dict[str, dict[str, float]]:
    """Return the medians in ms of each engine before and after, and their ratio."""
    forms = {
        (name, when): model
        for when, network in (("before", before), ("after", after))
        for name, model in engines(network, x).items()
    }
    calls = {f"{name} {when}": lambda model=model: model(x) for (name, when), model in forms.items()}
    found = time_interleaved(calls, runs=runs, settle_ms=20)
    figures = {}
    for name in dict.fromkeys(name for name, _ in forms):
        old, new = (found[f"{name} {when}"].median_ms for when in ("before", "after"))
        figures[name] = {"before": round(old, 2), "after": round(new, 2), "ratio": round(new / old, 3)}
    return figures


def check(name: str, options: argparse.Namespace) -> dict[str, object]:
    """Narrow one network and return what was found."""
    model = create(f"timm/{name}")
    with torch.no_grad():
        for module in model.modules():  # ConvNeXt's blocks begin as next to nothing: no layer would matter
            if isinstance(getattr(module, "gamma", None), nn.Parameter):
                nn.init.ones_(module.gamma)
    batches = list(torch.randn(options.images, 3, options.size, options.size).split(16))
    start, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few images for wide layers
        result = nin.narrow(
            model, batches, macs=options.share, options=nin.NarrowOptions(measure_latency=False, passes=options.passes)
        )
    figures: dict[str, object] = {
        "model": name,
        "macs": result.report.macs,
        "share": round(result.report.macs[1] / result.report.macs[0], 3),
        "pruned": [len(result.plan.pruned), sum(layer.form != "keep" for layer in result.plan.layers)],
        "error of the scores": result.report.calibration_error,
        "seconds": round(time.perf_counter() - start, 1),
        "MB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) // 1024,
    }
    for batch in options.batch:
        x = torch.randn(batch, 3, options.size, options.size)
        figures[f"ms, batch {batch}"] = timings(model, result.model, x, options.runs)
    return figures


def main() -> None:
    """Print one line of JSON for each network."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--passes", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps({"torch": torch.__version__, "timm": timm.__version__, "threads": options.threads}))
    for name in options.names or NAMES:
        print(json.dumps(check(name, options)), flush=True)


if __name__ == "__main__":
    main()
