"""Making a trained network narrower: statistics, spectra, a plan, the plan applied, and what was lost recovered."""

from nin.models.layer_shape import expand
from nin.models.plan import LayerPlan, Plan, Thinning
from nin.models.surgery import apply_plan
from nin.narrowing.analysis import fingerprint_subject
from nin.narrowing.distillation import FinetuneConfig, Tuner, finetune
from nin.narrowing.latency import Stopwatch
from nin.narrowing.options import NarrowOptions
from nin.narrowing.pipeline import NarrowResult, narrow
from nin.narrowing.report import Control, CurvePoint, LayerReport, NarrowReport

__all__ = [
    "Control",
    "CurvePoint",
    "FinetuneConfig",
    "LayerPlan",
    "LayerReport",
    "NarrowOptions",
    "NarrowReport",
    "NarrowResult",
    "Plan",
    "Stopwatch",
    "Thinning",
    "Tuner",
    "apply_plan",
    "expand",
    "finetune",
    "fingerprint_subject",
    "narrow",
]
