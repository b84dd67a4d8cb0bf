"""Counts the parts of compiled networks: stretches of native steps, and what PyTorch computes between them.

    python benchmarks/fusion/parts.py [NAME …] [--size 96]

Networks of timm with random weights, one image, channels_last. Prints rows of `parts.md`.
"""

import argparse
import collections

import timm
import torch

import nin
from nin.fusion.compiled_plan import TorchAction

NETWORKS = (
    *("convnext_atto", "convnextv2_atto", "resnet18", "resnet50d", "resnext50_32x4d"),
    *("seresnet50", "regnetx_002", "regnety_002", "regnetz_005", "res2net50_14w_8s"),
    *("dpn48b", "ghostnet_050", "ghostnetv2_100", "mobilenetv2_050", "mobilenetv3_small_050"),
    *(
        "mobilenetv4_conv_small",
        "mobilenetv4_conv_medium",
        "mobilenetv4_hybrid_medium",
        "efficientnet_b0",
        "tf_efficientnet_b0",
    ),
    *("mnasnet_050", "rexnet_100", "densenet121", "inception_v3", "repvgg_a0"),
    *("mobileone_s0", "fastvit_t8", "starnet_s1", "inception_next_atto", "convmixer_768_32"),
    *("poolformer_s12", "edgenext_xx_small", "darknet53", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"),
)
LARGE = ("vit_", "swin_", "inception_v3")  # of a fixed or large size


def parts_of(name, size):
    """Return the number of parts and of those by PyTorch's functions, or why there are none, and the error."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval().to(memory_format=torch.channels_last)
    side = 224 if name.startswith(LARGE) else size
    x = torch.randn(1, 3, side, side).contiguous(memory_format=torch.channels_last)
    compiled = nin.fuse(model).compile()
    error = ((compiled(x) - model(x)).norm() / model(x).norm()).item()
    if compiled.reason:
        return "", compiled.reason, error
    (plan,) = compiled._plans.values()
    functions = [part.function for part in plan.parts if isinstance(part, TorchAction)]
    names = collections.Counter(getattr(function, "__name__", type(function).__name__) for function in functions)
    return len(plan.parts), ", ".join(f"{name} {count}" for name, count in names.most_common()), error


@torch.no_grad()
def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NETWORKS)
    parser.add_argument("--size", type=int, default=96)
    options = parser.parse_args()
    for name in options.names:
        parts, functions, error = parts_of(name, options.size)
        print(f"| {name} | {parts} | {functions} | {error:.1e} |", flush=True)


if __name__ == "__main__":
    main()
