"""Prune a model: selectors, budgets, plans, and prune()."""

from coreprune.pruning.allocation.budget import Budget
from coreprune.pruning.allocation.spending import CostFunction
from coreprune.pruning.distill.distill import Distill, distill_
from coreprune.pruning.inspection import GroupRow, Inspection, list_groups
from coreprune.pruning.layer.weights import LayerWeights, NormStatistics
from coreprune.pruning.pipeline import Result, apply_plan, make_plan, prune
from coreprune.pruning.plans.plan import GroupPlan, Plan
from coreprune.pruning.repair.lockstep import Refit, Repair
from coreprune.pruning.reporting.certificates import certify
from coreprune.pruning.reporting.report import GroupReport, Report
from coreprune.pruning.selectors import (
    L1,
    L2,
    SELECTORS,
    BnScale,
    DOptimal,
    Folding,
    Fpgm,
    Functional,
    Lewis,
    Loewner,
    Magnitude,
    Merging,
    Mussay,
    Norm,
    Pfp,
    Random,
    Ranking,
    Selector,
    Uniform,
)

__all__ = [
    "L1",
    "L2",
    "SELECTORS",
    "BnScale",
    "Budget",
    "CostFunction",
    "DOptimal",
    "Distill",
    "Folding",
    "Fpgm",
    "Functional",
    "GroupPlan",
    "GroupReport",
    "GroupRow",
    "Inspection",
    "LayerWeights",
    "Lewis",
    "Loewner",
    "Magnitude",
    "Merging",
    "Mussay",
    "Norm",
    "NormStatistics",
    "Pfp",
    "Plan",
    "Random",
    "Ranking",
    "Refit",
    "Repair",
    "Report",
    "Result",
    "Selector",
    "Uniform",
    "apply_plan",
    "certify",
    "distill_",
    "list_groups",
    "make_plan",
    "prune",
]
