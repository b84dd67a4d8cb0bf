"""What fuse finds in the networks of timm and torchvision, with random weights and small images."""

from collections import Counter

import pytest
import timm
import torch
import torchvision
from torch import nn

import nin

# For each network how many chains of each kind: blocks by their layers, "+" with squeeze-and-excitation.
NETWORKS = {
    "timm mobilenetv3_small_050": {"block of 3": 2, "block of 5+": 8, "block of 4+": 1, "chain": 3},
    "torchvision mobilenet_v3_small": {"block of 3": 2, "block of 5+": 8, "block of 4+": 1, "chain": 2},
    "timm mobilenetv4_conv_small_035": {"block of 3": 11, "block of 2": 2, "chain": 6},
    "timm convnext_atto": {"ConvNeXt block": 12},
}
SLOW = {
    "timm mobilenetv3_large_100": {"block of 3": 6, "block of 5+": 8, "block of 2": 1, "chain": 3},
    "timm mobilenetv2_100": {"block of 3": 16, "block of 2": 1, "chain": 2},
    "timm efficientnet_b0": {"block of 5+": 15, "block of 4+": 1, "chain": 2},
    "timm efficientnet_lite0": {"block of 3": 15, "block of 2": 1, "chain": 2},
    "timm mnasnet_small": {"block of 3": 4, "block of 5+": 10, "block of 2": 1, "chain": 2},
    "timm semnasnet_100": {"block of 3": 7, "block of 5+": 8, "block of 2": 1, "chain": 2},
    "timm mnasnet_100": {"block of 3": 16, "block of 2": 1, "chain": 2},
    "timm ghostnet_100": {"block of 2": 7, "block of 4+": 2, "chain": 36},
    "timm convnext_tiny": {"ConvNeXt block": 18},
    "timm convnextv2_atto": {"chain": 12},
    "timm regnetx_002": {"chain": 31},
    "timm regnety_002": {"chain": 44},
    "torchvision mobilenet_v2": {"block of 3": 16, "block of 2": 1, "chain": 2},
    "torchvision mobilenet_v3_large": {"block of 3": 6, "block of 5+": 8, "block of 2": 1, "chain": 2},
    "torchvision efficientnet_b0": {"block of 5+": 15, "block of 4+": 1, "chain": 2},
    "torchvision mnasnet1_0": {"block of 3": 16, "block of 2": 1, "chain": 2},
    "torchvision convnext_tiny": {"ConvNeXt block": 18},
    "torchvision regnet_y_400mf": {"chain": 53},
}


def make(name):
    """Return a network with statistics as after training."""
    library, _, model_name = name.partition(" ")
    create = timm.create_model if library == "timm" else torchvision.models.get_model
    model = create(model_name, **({} if library == "timm" else {"weights": None})).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "layer_scale")):  # which begin at a millionth
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def kind(found):
    chain = found.chain
    if chain.normalizes:
        return "ConvNeXt block"
    return f"block of {len(found.layers)}{'+' * ('mean' in chain.steps)}" if chain.bottleneck else "chain"


@pytest.mark.parametrize("name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_what_is_found_and_float32_against_float64(name):
    with torch.no_grad():
        model = make(name)
        fused = nin.fuse(model)
        assert Counter(map(kind, fused.chains)) == {**NETWORKS, **SLOW}[name]
        x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
        result, exact = fused.model(x), model.double()(x.double())
        assert (result - exact).abs().max() <= 1e-5 * exact.abs().max()
