"""Making a trained network narrower: statistics, spectra, a plan, the plan applied, and what was lost recovered."""

from nin.narrowing.plan import LayerPlan, Plan, Thinning
from nin.narrowing.rebuilding import apply_plan
from nin.narrowing.recovering import FinetuneConfig, finetune
from nin.narrowing.reporting import LayerReport, NarrowReport
from nin.narrowing.working import NarrowOptions, NarrowResult, narrow

__all__ = [
    "FinetuneConfig",
    "LayerPlan",
    "LayerReport",
    "NarrowOptions",
    "NarrowReport",
    "NarrowResult",
    "Plan",
    "Thinning",
    "apply_plan",
    "finetune",
    "narrow",
]
