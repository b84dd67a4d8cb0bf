"""Fuses many CNNs with random weights and compares results and gradients with the originals'.

    python benchmarks/fusion/sweep.py [--size 96]

12 networks of torchvision and 30 of timm. For each: the number of chains, the largest difference of the scores in
evaluation, from those of the original in float64 and beside what rounding does to the original, and, fused for
training, of the gradients. Writes `sweep.json` and `sweep.md`.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

import nin
from nin import checkpoint

HERE = Path(__file__).parent
TORCHVISION = (
    *("resnet18", "resnet50", "resnext50_32x4d", "vgg11_bn", "mobilenet_v2", "mobilenet_v3_small", "densenet121"),
    *("googlenet", "squeezenet1_1", "convnext_tiny", "efficientnet_b0", "shufflenet_v2_x1_0"),
)
TIMM = (
    *("convnext_atto", "convnextv2_atto", "convmixer_768_32", "mobilenetv2_100", "mobilenetv3_large_100"),
    *("mobilenetv4_conv_small", "efficientnet_lite0", "efficientnetv2_rw_t", "mnasnet_100", "fbnetc_100"),
    *("resnet10t", "resnet26d", "resnetv2_50", "resnest14d", "res2net50_26w_4s", "seresnet18", "skresnet18"),
    *("regnetx_002", "regnety_002", "densenet121", "dla34", "dpn48b", "hrnet_w18_small", "cspresnet50", "darknet53"),
    *("ghostnet_100", "repvgg_a0", "rexnet_100", "edgenext_xx_small", "inception_next_atto"),
)


def relative(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest value."""
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30))


@torch.no_grad()
def spread_norms(model: nn.Module, x: Tensor) -> None:
    """Give BatchNorm the statistics of ``x`` and weights that are not one and zero, so that wrong folding shows."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        if norm.weight is not None:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(std=0.1)
    for name, parameter in model.named_parameters():
        if "gamma" in name or "layer_scale" in name:  # they start near zero: what is behind them would not show
            parameter.uniform_(0.5, 1.5)
    model.train()(x)
    model.eval()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the gradient of every parameter, in training mode, dropout and stochastic depth seeded."""
    torch.manual_seed(1)
    model.zero_grad()
    scores = model.train()(x)
    (scores[0] if isinstance(scores, tuple) else scores).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(model: nn.Module, size: int) -> dict[str, Any]:
    """Fuse a model and return how far it is from the original."""
    x = torch.randn(2, 3, size, size)
    spread_norms(model, x)
    fused = nin.fuse(model.eval())
    with torch.no_grad():
        expected, own, got = copy.deepcopy(model).double()(x.double()), model(x), fused.model(x)
        half = copy.deepcopy(model).to(torch.bfloat16)(x.bfloat16())
        fused_half = nin.fuse(copy.deepcopy(model).to(torch.bfloat16)).model(x.bfloat16())
    trained = nin.fuse(model, training=True)
    exact = gradients(copy.deepcopy(model).double(), x.double())
    found = gradients(copy.deepcopy(trained.model).double(), x.double())
    largest = max(float(g.abs().max()) for g in exact.values())
    return {
        "chains": len(fused.chains),
        "scores_differ": relative(expected[1], expected[0]),
        "longest": max((len(c.layers) for c in fused.chains), default=0),
        "left": len(fused.left),
        "fp32": relative(got, expected),
        "fp32_of_the_original": relative(own, expected),
        "bf16": relative(fused_half, expected),
        "bf16_of_the_original": relative(half, expected),
        "chains_in_training": len(trained.chains),
        "gradients_fp64": max(float((found[n] - exact[n]).abs().max()) for n in exact) / largest,
        "same_keys": list(fused.model.state_dict()) == list(model.state_dict()),
    }


def is_right(row: dict[str, Any]) -> bool:
    """Return whether a network passes; one that answers the same for two images has shown nothing."""
    keeps = row["same_keys"] and row["scores_differ"] > 1e-3 and row["gradients_fp64"] < 1e-6
    single = row["fp32"] <= 2 * row["fp32_of_the_original"] + 1e-5
    # where bf16 alone leaves a quarter of the score, or more, to chance, it cannot be compared
    half = row["bf16"] <= 2 * row["bf16_of_the_original"] + 0.02 or row["bf16_of_the_original"] > 0.25
    return bool(keeps and single and half)


def main() -> None:
    """Check all networks and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    rows = {}
    for library, names in (("torchvision", TORCHVISION), ("timm", TIMM)):
        for name in names:
            if arguments.names and name not in arguments.names:
                continue
            torch.manual_seed(0)
            if library == "timm":
                model = timm.create_model(name, pretrained=False, num_classes=10)
            else:
                options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
                model = torchvision.models.get_model(name, weights=None, num_classes=10, **options)
            rows[f"{library} {name}"] = row = check(model, arguments.size)
            print(f"{'ok ' if is_right(row) else 'BAD'} {library} {name} {row}", flush=True)
    right = sum(map(is_right, rows.values()))
    if arguments.names:
        return
    versions = {"torchvision": torchvision.__version__, "timm": timm.__version__}
    header = {"date": datetime.date.today().isoformat(), "machine": {**checkpoint.environment(), **versions}}
    (HERE / "sweep.json").write_text(json.dumps({**header, "size": arguments.size, "rows": rows}, indent=1) + "\n")
    lines = [
        f"# {right} of {len(rows)} networks keep results and gradients",
        "",
        f"`python benchmarks/fusion/sweep.py`, {arguments.size}×{arguments.size} pixels, random weights; torch "
        f"{torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}; {header['date']}. "
        "Largest difference from the scores of the original in float64, over the largest; beside it that of the "
        "original in the same dtype. Gradients in float64, over the largest of all.",
        "",
        "| network | chains | left | fp32 | original | bf16 | original | chains in training | gradients |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {name} | {r['chains']} | {r['left']} | {r['fp32']:.1e} | "
            f"{r['fp32_of_the_original']:.1e} | {r['bf16']:.1e} | "
            f"{r['bf16_of_the_original']:.1e} | {r['chains_in_training']} | {r['gradients_fp64']:.1e} |"
            for name, r in rows.items()
        ),
    ]
    (HERE / "sweep.md").write_text("\n".join(lines) + "\n")
    sys.exit(right != len(rows))


if __name__ == "__main__":
    main()
