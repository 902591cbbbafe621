"""Decide which elements of module lists leave whole, before widths are allocated."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from coreprune._progress import Progress, silent
from coreprune.errors import BudgetError
from coreprune.graph import Element, Traced
from coreprune.graph.members import apart
from coreprune.pruning.allocation.budget import Budget
from coreprune.pruning.plans.decide import Decision, error_of

log = logging.getLogger(__name__)

_TRIED = 3  # elements of which the error of the whole is found out in one step


def shallower(
    traced: Traced,
    ranked: Mapping[str, Decision],
    losses: Mapping[str, float],
    budget: Budget,
    tell: Progress | None = None,
) -> Traced:
    """The model with elements that are to leave, if that makes the predicted error smaller under the same budget.

    Step by step: of the elements whose loss is least for what they cost, the first few are tried. Widths are allocated
    without each, and the one leaves with which the sum of all errors is least, if it is less than before. An element
    leaves only if the model runs without it and computes what it computes when the element passes on what enters.

    Raises BudgetError if the budget cannot be met without all blocks that may leave.

    ranked: from `rank`, with errors on queries. losses: by name of an element, what the outputs lose without it, in the
        units of the errors. budget: of MACs, parameters or bytes.
    """
    tell = tell or silent
    found, _ = traced.elements
    open_ = {name: e for name, e in found.items() if math.isfinite(losses.get(name, math.inf))}
    saved = {name: _saved(traced, e, budget) for name, e in open_.items()}
    least = _error(traced, ranked, losses, budget)
    left = len(open_)
    while True:
        open_ = {n: e for n, e in open_.items() if saved[n] > 0 and _may(traced, e)}
        best: tuple[float, str, Traced] | None = None
        for name in sorted(open_, key=lambda n: losses[n] / saved[n])[:_TRIED]:
            fewer = traced.dropping([open_[name]])
            error = _error(fewer, ranked, losses, budget)
            # As long as the budget cannot be met, what costs the least for its size goes.
            if error < min(least, math.inf if best is None else best[0]) or (best is None and least == math.inf):
                best = error, name, fewer
        tell("depth", len(traced.dropped), left)
        if best is None:
            if least == math.inf and traced.dropped:
                raise _out_of_reach(traced, budget)
            return traced
        error, name, fewer = best
        if problem := traced.check.without(fewer.dropped):
            log.info("%s stays: %s", name, problem)
        else:
            least, traced = error, fewer
        del open_[name]


def without_any(traced: Traced) -> str:
    """Why no element of a module list may leave, in words; empty if one may."""
    found, refused = traced.elements
    if found:
        return ""
    if not refused:
        return "the model has no list of modules (nn.ModuleList, nn.Sequential) with several elements."
    some = "; ".join(f"{name}: {why}" for name, why in list(refused.items())[:3])
    more = f"; and {len(refused) - 3} more" if len(refused) > 3 else ""
    return f"no element of a list of modules is a block with a skip connection around it ({some}{more})."


def _error(traced: Traced, ranked: Mapping[str, Decision], losses: Mapping[str, float], budget: Budget) -> float:
    """The sum of the predicted errors; infinite if the budget cannot be met."""
    try:
        widths = error_of(traced, ranked, budget)
    except BudgetError:
        return math.inf
    return widths + sum(losses[e.name] for e in traced.dropped)


def _out_of_reach(traced: Traced, budget: Budget) -> BudgetError:
    """That the budget cannot be met with as few blocks as possible either."""
    assert traced.whole is not None
    slim = {name: group.unit * group.section_count for name, group in traced.free.items()}
    dense, least = (getattr(c, budget.kind) for c in (traced.whole.cost_model(), traced.cost_model(slim)))
    return BudgetError(
        f"{budget.kind}={budget.limit:g} cannot be met: without {len(traced.dropped)} blocks and with every free group "
        f"at its least width, {least:,} of the dense model's {dense:,} are left ({least / max(dense, 1):.1%}). Raise "
        "the budget, or lower min_width or round_to."
    )


def _saved(traced: Traced, element: Element, budget: Budget) -> float:
    """What a model of full width saves without an element."""
    costs = (t.cost_model() for t in (traced, traced.dropping([element])))
    dense, fewer = (getattr(cost, budget.kind) for cost in costs)
    return float(dense - fewer)


def _may(traced: Traced, element: Element) -> bool:
    """Whether an element may leave beside those that do: it is apart from them, and one of its list stays."""
    if any(not apart(element, other) for other in traced.dropped):
        return False
    path = element.name.rpartition(".")[0]
    gone = sum(e.name.rpartition(".")[0] == path for e in traced.dropped)
    holder = traced.model.get_submodule(path)
    return gone + 1 < len(list(holder.children()))
