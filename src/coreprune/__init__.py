"""coreprune: make trained PyTorch networks physically smaller without their training data, with certificates.

from coreprune import Budget, prune
result = prune(model, example_inputs, Budget(macs=0.5))
result.model, result.plan, result.report
"""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers; at run time `__getattr__` below finds the names
    from coreprune.artifact import export_int8, export_onnx, export_program, load, open_model, read_plan, save
    from coreprune.errors import (
        ArtifactError,
        BudgetError,
        CoreprunError,
        GeometryError,
        InputError,
        ModelError,
        RankError,
    )
    from coreprune.finetune import Tuning, fine_tune_
    from coreprune.latency import Latency, compare_latency, measure_latency
    from coreprune.pruning import (
        Budget,
        Descent,
        Distill,
        Inspection,
        Plan,
        Repair,
        Report,
        Result,
        Rotated,
        apply_plan,
        certify,
        list_groups,
        make_plan,
        prune,
        rotate_residual,
    )
    from coreprune.queries import Queries, make_queries
    from coreprune.selectors import (
        L1,
        L2,
        BnScale,
        Cone,
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
        Uniform,
    )

# A new public name needs a line here and one above.
if TYPE_CHECKING:
    __version__: str

__all__ = [
    "L1",
    "L2",
    "ArtifactError",
    "BnScale",
    "Budget",
    "BudgetError",
    "Cone",
    "CoreprunError",
    "DOptimal",
    "Descent",
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
    "RankError",
    "Ranking",
    "Repair",
    "Report",
    "Result",
    "Rotated",
    "Tuning",
    "Uniform",
    "apply_plan",
    "certify",
    "compare_latency",
    "export_int8",
    "export_onnx",
    "export_program",
    "fine_tune_",
    "list_groups",
    "load",
    "make_plan",
    "make_queries",
    "measure_latency",
    "open_model",
    "prune",
    "read_plan",
    "rotate_residual",
    "save",
]

# The modules of the public names. Each comes after the modules that it imports anyway.
_HOMES = ("errors", "queries", "selectors", "pruning", "latency", "artifact", "finetune")
_MODULES = (*_HOMES, "coreset", "geometry", "graph", "report", "risk")
_RENAMED = {"inspect": "list_groups", "plan": "make_plan", "apply": "apply_plan"}  # until the release after 0.1

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import a name when it is first used (PEP 562): importing torch takes seconds, and not every use needs it."""
        if name in _RENAMED:
            old, name = name, _RENAMED[name]
            warnings.warn(f"coreprune.{old} is now coreprune.{name}.", DeprecationWarning, stacklevel=2)
        if name == "__version__":
            return version("coreprune")
        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        modules = (import_module(f"{__name__}.{home}") for home in _HOMES)
        found = next(vars(module)[name] for module in modules if name in vars(module))
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        """The names that `dir(coreprune)` lists, including those that are not imported yet."""
        return sorted({*globals(), *__all__, *_MODULES})
