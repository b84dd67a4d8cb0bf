"""Any CNN: torchvision's networks with random weights to 0.7 of their multiply-accumulates.

python benchmarks/narrowing/any_cnn.py [--size 64] [NAME ...]

For each: MACs before and after, whether shape and dtype of the result stay, whether the weights load again into
`nin.apply_plan` with weights_only=True, and how far torch.export's result is from eager. Random weights say nothing
about accuracy.
"""

from __future__ import annotations

import argparse
import io
import json
import time
import warnings

import torch
import torchvision

import nin

NAMES = (
    "resnet18",
    "resnet50",
    "vgg16",
    "mobilenet_v2",
    "densenet121",
    "googlenet",
    "convnext_tiny",
    "efficientnet_b0",
)


def check(name: str, size: int) -> dict[str, object]:
    """Narrow one network and return what was found."""
    torch.manual_seed(0)
    options = {"init_weights": True} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    batches = [torch.randn(8, 3, size, size) for _ in range(2)]
    started = time.perf_counter()
    settings = nin.NarrowOptions(measure_latency=False, revert_slower=False, passes=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # 16 images are few for 512 channels
        result = nin.narrow(model, batches, macs=0.7, options=settings)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        wanted, got = model(batches[0]), result.model(batches[0])
        exported = torch.export.export(result.model, (batches[0],)).module()(batches[0])
    file = io.BytesIO()
    torch.save(result.model.state_dict(), file)
    file.seek(0)
    again = nin.apply_plan(torchvision.models.get_model(name, weights=None, **options).eval(), result.plan)
    again.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        reloaded = again(batches[0])
    return {
        "model": name,
        "macs": result.report.macs,
        "thinned": len(result.plan.thinned),
        "factorised": sum(layer.form != "keep" for layer in result.plan.layers),
        "shape and dtype kept": got.shape == wanted.shape and got.dtype == wanted.dtype,
        "loads again": bool(torch.equal(reloaded, got)),
        "export differs by": float((exported - got).abs().max() / got.abs().max()),
        "calibration error": result.report.calibration_error,
        "seconds": round(seconds, 1),
        "notes": result.report.notes,
    }


def main() -> None:
    """Print one line of JSON for each network."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.names or NAMES:
        print(json.dumps(check(name, arguments.size)), flush=True)


if __name__ == "__main__":
    main()
