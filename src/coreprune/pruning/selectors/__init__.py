"""Selectors: rules that rank or sample the channels of one layer, behind one signature (`base`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from coreprune.errors import InputError
from coreprune.pruning.layer.weights import LayerWeights, NormStatistics, Reader
from coreprune.pruning.selectors.base import Ranking, Selector
from coreprune.pruning.selectors.folding import Folding
from coreprune.pruning.selectors.functional import DOptimal, Functional
from coreprune.pruning.selectors.merging import Merging
from coreprune.pruning.selectors.norms import L1, L2, BnScale, Fpgm, Magnitude, Random
from coreprune.pruning.selectors.pfp import Pfp
from coreprune.pruning.selectors.sampling import Lewis, Loewner, Mussay, Norm, Uniform

SELECTORS: Mapping[str, Callable[[], Selector]] = {
    selector.name: selector
    for selector in (
        *(Functional, DOptimal),
        *(Loewner, Lewis, Norm, Mussay, Pfp, Uniform),
        *(Merging, Folding),
        *(L1, L2, Magnitude, Fpgm, BnScale, Random),
    )
}


def resolve(method: str | Selector, repaired: bool = True) -> Selector:
    """Return the selector of that name with its default options, or the selector itself.

    "auto" goes by what measured best (docs/benchmarks.md): functional where a repair follows, and otherwise folding,
    which makes up for what it removes by itself.
    Raises InputError for an unknown name, and lists the known ones.
    """
    if method == "auto":
        return Functional() if repaired else Folding()
    if isinstance(method, type):
        raise InputError(f"method is the class {method.__name__}; pass an object of it: {method.__name__}().")
    if callable(method) and hasattr(method, "name"):
        return method
    if isinstance(method, str) and method in SELECTORS:
        return SELECTORS[method]()
    raise InputError(
        f"unknown selector {method!r}; known: auto, {', '.join(sorted(SELECTORS))}. "
        "Pass one of these names, or an object such as Loewner(ridge=None)."
    )


__all__ = [
    "L1",
    "L2",
    "SELECTORS",
    "BnScale",
    "DOptimal",
    "Folding",
    "Fpgm",
    "Functional",
    "LayerWeights",
    "Lewis",
    "Loewner",
    "Magnitude",
    "Merging",
    "Mussay",
    "Norm",
    "NormStatistics",
    "Pfp",
    "Random",
    "Ranking",
    "Reader",
    "Selector",
    "Uniform",
    "resolve",
]
