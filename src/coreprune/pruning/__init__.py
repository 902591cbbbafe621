"""Prune a model: budgets, plans, repair, distillation, reports and prune(). Selectors are in `coreprune.selectors`."""

from coreprune.pruning.allocation.budget import Budget
from coreprune.pruning.allocation.spending import CostFunction
from coreprune.pruning.applying import apply_plan
from coreprune.pruning.distill.distill import distill_
from coreprune.pruning.distill.options import Distill
from coreprune.pruning.inspection import GroupRow, Inspection, list_groups
from coreprune.pruning.pipeline import Result, prune
from coreprune.pruning.planning import make_plan
from coreprune.pruning.plans.plan import GroupPlan, Plan
from coreprune.pruning.repair.descent import Descended
from coreprune.pruning.repair.options import Repair
from coreprune.pruning.repair.refit import Refit
from coreprune.pruning.repair.twins import Descent
from coreprune.pruning.reporting.certify import certify
from coreprune.pruning.reporting.report import Compared, GroupReport, Report
from coreprune.pruning.rotation import Rotated, rotate_residual
from coreprune.pruning.timing.pace import MetLatency

__all__ = [
    "Budget",
    "Compared",
    "CostFunction",
    "Descended",
    "Descent",
    "Distill",
    "GroupPlan",
    "GroupReport",
    "GroupRow",
    "Inspection",
    "MetLatency",
    "Plan",
    "Refit",
    "Repair",
    "Report",
    "Result",
    "Rotated",
    "apply_plan",
    "certify",
    "distill_",
    "list_groups",
    "make_plan",
    "prune",
    "rotate_residual",
]
