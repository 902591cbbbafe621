"""Selectors by name: ours, those that other installed packages register, and functions named as module:function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from coreprune._plugins import Registry, imported
from coreprune.errors import InputError, first_line
from coreprune.pruning.selectors.base import Selector
from coreprune.pruning.selectors.folding import Folding
from coreprune.pruning.selectors.functional import DOptimal, Functional
from coreprune.pruning.selectors.merging import Merging
from coreprune.pruning.selectors.norms import L1, L2, BnScale, Fpgm, Magnitude, Random
from coreprune.pruning.selectors.own import Own, own
from coreprune.pruning.selectors.pfp import Pfp
from coreprune.pruning.selectors.sampling import Cone, Lewis, Loewner, Mussay, Norm, Uniform

Method = str | Selector | Callable[..., Any]

_OURS: Mapping[str, type[Selector]] = {
    selector.name: selector
    for selector in (
        *(Functional, DOptimal),
        *(Loewner, Cone, Lewis, Norm, Mussay, Pfp, Uniform),
        *(Merging, Folding),
        *(L1, L2, Magnitude, Fpgm, BnScale, Random),
    )
}


def _adapted(name: str, found: Any) -> Selector:
    """What a package registers under a name, or "module:name" stands for, as a selector."""
    if isinstance(found, type):
        try:
            found = found()
        except Exception as error:  # the code of somebody else
            raise InputError(
                f"the selector {name!r} cannot be made without arguments ({first_line(error)})."
            ) from error
    return found if type(found) in _OURS.values() else own(found, None if ":" in name else name)


SELECTORS: Mapping[str, Callable[[], Selector]] = Registry("coreprune.selectors", _OURS, _adapted)


def resolve(method: Method, repaired: bool = True, queries: bool = True) -> Selector:
    """Return the selector that `method=` stands for: a selector, its name, a function, or "module:function".

    "auto" takes what measured best (docs/benchmarks.md): functional if a repair follows, and otherwise folding, which
    makes up for what it removes by itself.

    repaired: whether a repair follows. queries: whether there are any.

    Raises InputError for an unknown name, for what is not a selector, and for one that needs queries if there are none.
    """
    if isinstance(method, str) and method.casefold() == "auto":
        return Functional() if repaired else Folding()
    selector = _found(method)
    if selector.reads and not queries:
        raise InputError(
            f"the selector {selector.name!r} needs queries, but there are none (queries=None). Pass queries, or "
            "choose a selector that needs none, such as 'folding'."
        )
    return selector


def _found(method: Any) -> Selector:
    if isinstance(method, str):
        name = method.casefold().replace("_", "-")
        if name in SELECTORS:
            return SELECTORS[name]()
        if ":" in method:
            return _not_ours(_adapted(method, imported(method)))
    elif isinstance(method, Own) or type(method) in _OURS.values():
        return method
    elif callable(method):
        return _not_ours(own(method))
    raise InputError(
        f"unknown selector {method!r}; known: auto, {', '.join(sorted(SELECTORS))}. Pass one of these names, an object "
        "such as Loewner(ridge=None), a function from a layer to scores, or where it is: 'my_package.module:function'."
    )


def _not_ours(selector: Selector) -> Selector:
    """Refuse one of our names for something else: certificates and reports go by the name."""
    if type(selector) not in _OURS.values() and selector.name in ("auto", *_OURS):
        raise InputError(
            f"{selector.name!r} is the name of one of coreprune's own selectors. Give yours another: set its "
            "attribute `name`."
        )
    return selector
