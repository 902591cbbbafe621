"""Where models meet numerics: selectors, budgets, plans, and prune()."""

from coreprune.pruning.budget import Budget
from coreprune.pruning.inspection import GroupRow, Inspection, inspect
from coreprune.pruning.pipeline import Result, apply, plan, prune
from coreprune.pruning.plan import GroupPlan, Plan
from coreprune.pruning.report import GroupReport, Report
from coreprune.pruning.selectors import (
    SELECTORS,
    LayerWeights,
    Lewis,
    Loewner,
    Magnitude,
    Mussay,
    Norm,
    Ranking,
    Selector,
    Uniform,
)

__all__ = [
    "SELECTORS",
    "Budget",
    "GroupPlan",
    "GroupReport",
    "GroupRow",
    "Inspection",
    "LayerWeights",
    "Lewis",
    "Loewner",
    "Magnitude",
    "Mussay",
    "Norm",
    "Plan",
    "Ranking",
    "Report",
    "Result",
    "Selector",
    "Uniform",
    "apply",
    "inspect",
    "plan",
    "prune",
]
