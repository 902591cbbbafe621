"""coreprune: make trained PyTorch networks physically smaller without their training data, with certificates.

from coreprune import Budget, prune
result = prune(model, example_inputs, Budget(macs=0.5))
result.model, result.plan, result.report
"""

from coreprune.artifact import export_onnx, export_program, load, read_plan, save
from coreprune.errors import ArtifactError, BudgetError, CoreprunError, GeometryError, InputError, ModelError
from coreprune.latency import Latency, compare_latency, measure_latency
from coreprune.pruning import (
    L1,
    L2,
    BnScale,
    Budget,
    Distill,
    DOptimal,
    Folding,
    Fpgm,
    Functional,
    Inspection,
    Lewis,
    Loewner,
    Magnitude,
    Merging,
    Mussay,
    Norm,
    Pfp,
    Plan,
    Random,
    Ranking,
    Repair,
    Report,
    Result,
    Uniform,
    apply_plan,
    certify,
    list_groups,
    make_plan,
    prune,
)
from coreprune.queries import Queries, make_queries

__all__ = [
    "L1",
    "L2",
    "ArtifactError",
    "BnScale",
    "Budget",
    "BudgetError",
    "CoreprunError",
    "DOptimal",
    "Distill",
    "Folding",
    "Fpgm",
    "Functional",
    "GeometryError",
    "InputError",
    "Inspection",
    "Latency",
    "Lewis",
    "Loewner",
    "Magnitude",
    "Merging",
    "ModelError",
    "Mussay",
    "Norm",
    "Pfp",
    "Plan",
    "Queries",
    "Random",
    "Ranking",
    "Repair",
    "Report",
    "Result",
    "Uniform",
    "apply_plan",
    "certify",
    "compare_latency",
    "export_onnx",
    "export_program",
    "list_groups",
    "load",
    "make_plan",
    "make_queries",
    "measure_latency",
    "prune",
    "read_plan",
    "save",
]

_RENAMED = {"inspect": "list_groups", "plan": "make_plan", "apply": "apply_plan"}  # until the release after 0.1


def __getattr__(name: str) -> object:
    """Names of functions that hid modules, with a warning."""
    if name in _RENAMED:
        import warnings

        warnings.warn(f"coreprune.{name} is now coreprune.{_RENAMED[name]}.", DeprecationWarning, stacklevel=2)
        return globals()[_RENAMED[name]]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
