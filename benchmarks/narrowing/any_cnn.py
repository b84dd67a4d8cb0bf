"""Any CNN: torchvision's and timm's networks with random weights to 0.7 of their multiply-accumulates.

python benchmarks/narrowing/any_cnn.py [--size 64] [--threads 1] [NAME ...]      # timm's are timm/NAME

It needs timm and nin's extra onnx.

For each: MACs before and after; whether shape and dtype of the result stay; whether the weights load again into
`nin.apply_plan` with weights_only=True; how far torch.export's and ONNX Runtime's results are from eager, as a share
of the largest value; how far a network factorised at full rank is from the original; and which layers became slower.
Random weights say nothing about accuracy.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

import nin
from nin.models.surgery import to_plain_layers
from nin.narrowing import LayerPlan, Plan
from nin.narrowing.analysis import analyse
from nin.narrowing.reconstruction import reconstruct

NAMES = (
    *("resnet18", "resnet50", "vgg16", "mobilenet_v2", "densenet121", "googlenet", "convnext_tiny", "efficientnet_b0"),
    *("timm/mobilenetv3_small_050", "timm/resnet10t", "timm/regnetx_002", "timm/lcnet_050", "timm/repvgg_a0"),
    *("timm/ghostnet_050", "timm/hardcorenas_a", "timm/mnasnet_small", "timm/fbnetc_100", "timm/convnext_atto"),
)

# largest distance from eager that is taken for rounding, as a share of the largest value; ONNX Runtime adds in
# another order, and networks with random weights end in differences of large values
TOLERANCES = {"torch.export differs by": 1e-4, "full rank differs by": 1e-4, "ONNX Runtime differs by": 1e-3}


def create(name: str) -> nn.Module:
    """Return a network with random weights, in evaluation mode."""
    torch.manual_seed(0)
    if name.startswith("timm/"):
        import timm

        model = timm.create_model(name.removeprefix("timm/"), pretrained=False).eval()
        for module in model.modules():  # untrained residual branches begin at zero: nothing would depend on them
            if isinstance(module, nn.BatchNorm2d) and not bool(module.weight.any()):
                nn.init.ones_(module.weight)
        return model
    options = {"init_weights": True, "aux_logits": False} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, **options).eval()


def distance(got: Tensor, wanted: Tensor) -> float:
    """Return the largest difference as a share of the largest value."""
    return float((got - wanted).abs().max() / wanted.abs().max())


def at_full_rank(model: nn.Module, batches: list[Tensor], cache: Path) -> float:
    """Return how far the network is from itself with every layer that allows it factorised at full rank.

    Layers get the output form, and every second k×k layer the Tucker form.
    """
    original = to_plain_layers(model).eval()
    known = analyse(original, batches, skip=(), cache=cache)
    layers = []
    for number, (name, spec) in enumerate(known.specs.items()):
        form: tuple[str, int | None, int | None] = ("keep", None, None)
        whole = spec.out_channels // spec.groups
        if name in known.sensitivities and name not in known.reasons:
            form = ("output", None, whole)
            if spec.taps > 1 and spec.groups == 1 and number % 2 and spec.patch <= 1200:
                form = ("tucker", spec.in_channels, whole)
        layers.append(LayerPlan(name, *form, spec.in_channels, spec.out_channels))
    plan = Plan(tuple(layers), (), "macs", 0.5)
    new, _ = reconstruct(original, plan, known, batches, passes=1)
    with torch.no_grad():
        wanted, got = original(batches[0]), new(batches[0])
    return float((got - wanted).norm() / wanted.norm())


def through_onnx(model: nn.Module, x: Tensor) -> Tensor:
    """Return what ONNX Runtime gives."""
    import onnxruntime

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def check(name: str, size: int, *, timings: bool) -> dict[str, object]:
    """Narrow one network and return what was found."""
    model = create(name)
    batches = [torch.randn(8, 3, size, size) for _ in range(2)]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # 16 images are few for 512 channels
        cache = Path(folder) / "found.safetensors"
        settings = nin.NarrowOptions(measure_latency=timings, revert_slower=timings, passes=8, cache=cache)
        result = nin.narrow(model, batches, macs=0.7, options=settings)
        seconds = time.perf_counter() - started
        full_rank = at_full_rank(model, batches, cache)
    x = batches[0]
    with torch.no_grad():
        wanted, got = model(x), result.model(x)
        exported = torch.export.export(result.model, (x,)).module()(x)
    file = io.BytesIO()
    torch.save(result.model.state_dict(), file)
    file.seek(0)
    again = nin.apply_plan(create(name), result.plan)
    again.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        reloaded = again.eval()(x)
    slower = [
        layer.name
        for layer in result.report.layers
        if layer.latency_ms_before is not None
        and layer.latency_ms_after is not None
        and layer.latency_ms_after > layer.latency_ms_before
    ]
    found = {
        "shape and dtype kept": got.shape == wanted.shape and got.dtype == wanted.dtype,
        "loads again": bool(torch.equal(reloaded, got)),
        "torch.export differs by": distance(exported, got),
        "ONNX Runtime differs by": distance(through_onnx(result.model, x), got),
        "full rank differs by": full_rank,
        "slower layers": slower if timings else "not measured",
    }
    right = found["shape and dtype kept"] and found["loads again"] and not (timings and slower)
    near = all(float(str(found[key])) < tolerance for key, tolerance in TOLERANCES.items())
    return {
        "model": name,
        "passes": bool(
            right and near and result.report.macs[1] <= 0.7 * result.report.macs[0] and not (timings and slower)
        ),
        "macs": result.report.macs,
        "thinned": len(result.plan.pruned),
        "factorised": sum(layer.form != "keep" for layer in result.plan.layers),
        **found,
        "seconds": round(seconds, 1),
        "notes": result.report.notes,
    }


def main() -> None:
    """Print one line of JSON for each network."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-timings", action="store_true", help="where other jobs run")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.names or NAMES:
        print(json.dumps(check(name, arguments.size, timings=not arguments.no_timings)), flush=True)


if __name__ == "__main__":
    main()
