"""Narrowing a trained network: structured pruning of channels plus low-rank factorisation of layers.

The steps are those of the field: a dependency graph says which channels can go together, the Fisher information how
much each direction of a layer's output matters, a search space lists the widths and ranks of every layer with their
losses, a multiple-choice knapsack picks one for each layer within a budget, and layerwise reconstruction fits the new
weights to the original's outputs. No labels are needed; distillation afterwards is optional.
"""

from nin.models.narrowing_plan import ChannelPruning, LayerPlan, Plan
from nin.models.surgery import apply_plan, to_plain_layers
from nin.narrowing.distillation import DistillationStep, FinetuneConfig, finetune
from nin.narrowing.latency import ModelTimer
from nin.narrowing.options import NarrowOptions
from nin.narrowing.pipeline import NarrowResult, narrow
from nin.narrowing.report import ControlReport, CurvePoint, LayerReport, NarrowReport

__all__ = [
    "ChannelPruning",
    "ControlReport",
    "CurvePoint",
    "DistillationStep",
    "FinetuneConfig",
    "LayerPlan",
    "LayerReport",
    "ModelTimer",
    "NarrowOptions",
    "NarrowReport",
    "NarrowResult",
    "Plan",
    "apply_plan",
    "finetune",
    "narrow",
    "to_plain_layers",
]
