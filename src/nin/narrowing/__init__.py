"""Making a trained network narrower: statistics, spectra, a plan, the plan applied, and what was lost recovered."""

from nin.narrowing.options import NarrowOptions
from nin.narrowing.plan import LayerPlan, Plan, Thinning
from nin.narrowing.pricing import Stopwatch
from nin.narrowing.rebuilding import apply_plan
from nin.narrowing.reporting import Control, CurvePoint, LayerReport, NarrowReport
from nin.narrowing.structure import expand
from nin.narrowing.studying import fingerprint
from nin.narrowing.tuning import FinetuneConfig, Tuner, finetune
from nin.narrowing.working import NarrowResult, narrow

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
    "fingerprint",
    "narrow",
]
