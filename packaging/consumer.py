"""A program that uses nin, for the type checker: what it is promised is what it gets."""

from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor

import nin
from nin.exporters import ExportResult
from nin.inference.classifier import Prediction
from nin.profiling.cost import Cost
from nin.training import TrainResult


def train_and_use(folder: Path) -> dict[str, float]:
    result = nin.train("digits", nin.TrainConfig(epochs=1, precision="fp32"), out=folder)
    assert_type(result, TrainResult)
    classifier = nin.load(folder)
    assert_type(classifier, nin.Classifier)
    assert_type(classifier.predict("new.png"), list[Prediction])
    assert_type(classifier.confidence_maps("new.png", size=8), Tensor)
    assert_type(nin.export(folder, "model.onnx", preprocessing=True), ExportResult)
    return {p.label: p.confidence for p in classifier.predict(["a.png", "b.png"])}


def build(x: Tensor) -> int:
    layer = nin.MLPConv(3, (192, 160), kernel_size=5, padding=2, activation=("relu", None))
    assert_type(nin.mlpconv(layer.hidden(x), [torch.randn(8, 192, 1, 1)], [None]), Tensor)
    cost = nin.cost(nin.Bottleneck(256, 64, 256, kernel_size=4), (1, 256, 28, 28))
    assert_type(cost, Cost)
    assert_type(nin.backends(), dict[str, str])
    return cost.macs
