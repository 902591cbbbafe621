"""coreprune: make trained PyTorch networks physically smaller without their training data, with certificates.

from coreprune import Budget, prune
result = prune(model, example_inputs, Budget(keep=0.5))
result.model, result.plan, result.report
"""

from coreprune.errors import BudgetError, CoreprunError, GeometryError, InputError, ModelError
from coreprune.pruning import (
    Budget,
    Inspection,
    Lewis,
    Loewner,
    Magnitude,
    Mussay,
    Norm,
    Plan,
    Ranking,
    Report,
    Result,
    Uniform,
    apply,
    inspect,
    plan,
    prune,
)

__all__ = [
    "Budget",
    "BudgetError",
    "CoreprunError",
    "GeometryError",
    "InputError",
    "Inspection",
    "Lewis",
    "Loewner",
    "Magnitude",
    "ModelError",
    "Mussay",
    "Norm",
    "Plan",
    "Ranking",
    "Report",
    "Result",
    "Uniform",
    "apply",
    "inspect",
    "plan",
    "prune",
]
