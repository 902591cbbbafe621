"""The error at the consumers of one group, for every number of units: on the queries, and on unseen ones.

Where a convolution has too many features, the moments are those of single kernel positions. Their error leaves out that
neighbouring positions go wrong together. So it is scaled by what some whole patches show, at a few widths (T14).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from coreprune.coreset import FunctionalCoreset, in_order, map_errors
from coreprune.coreset._readers import features
from coreprune.coreset.held_out import RIDGES, least_held_out
from coreprune.graph import Group
from coreprune.pruning.allocation.curves import balanced
from coreprune.pruning.layer.weights import LayerWeights, Reader
from coreprune.pruning.selectors import Ranking, Selector, ranking_of
from coreprune.pruning.selectors.functional import moments_of

CURVE_RIDGE = 1e-3
_WIDE = 1152  # features; with more, one way and every second ridge are enough, because each takes seconds
_WIDEST_FLOOR = 1200  # features; up to this many, T10′ takes about a second at most
_WIDTHS = (0.0, 0.25, 0.5, 0.75, 0.9)  # of all units, at which whole patches are looked at


def on_queries(group: Group, readers: tuple[Reader, ...], ranking: Ranking) -> FunctionalCoreset | None:
    """The error of the ranking's order on the queries (T10), and lower bounds of it; None without queries."""
    if not readers:
        return None
    narrow = max(reader.mean.numel() for reader in readers) <= _WIDEST_FLOOR
    units, order = group.size // group.unit, balanced(ranking.order, group)
    found = in_order(moments_of(readers), units, order, ridge=CURVE_RIDGE, unit_floor=narrow)
    if all(reader.patches is None for reader in readers):
        return found
    each = [in_order([m], units, order, ridge=CURVE_RIDGE).errors for m in moments_of(readers)]
    errors = sum(e * over_patches(r, units, order) for e, r in zip(each, readers, strict=True))
    assert isinstance(errors, Tensor)
    errors = errors.flip(0).cummax(dim=0).values.flip(0)  # an error that falls with fewer units is noise of the ratio
    return replace(found, errors=errors, optimum=torch.zeros_like(errors))  # no floor is known over patches


def held_out(
    group: Group, layer: LayerWeights, ranking: Ranking, selector: Selector, generator: torch.Generator
) -> Tensor | None:
    """The error on queries that neither the order nor the refit has seen (T12), (n+1,) float64.

    One half of the queries orders the units and refits the readers, and the other half measures the error; then the
    other way round, unless the group is very wide. Each reader has the ridge that is best there, for every number of
    units. None if there are no two halves.
    """
    if not layer.readers or not all(reader.folds for reader in layer.readers):
        return None
    wide = max(reader.mean.numel() for reader in layer.readers) > _WIDE
    ways, ridges = (1, RIDGES[1::2]) if wide else (2, RIDGES)
    orders = [ranking.order] * ways
    if selector.reads:  # an order that goes by the queries must not have seen those that measure the error
        halves = [[replace(r, covariance=r.folds[i].seen) for r in layer.readers] for i in range(ways)]
        orders = [ranking_of(selector, replace(layer, readers=tuple(half)), generator).order for half in halves]
    orders = [balanced(order, group) for order in orders]
    units, total = group.size // group.unit, 0.0
    for reader in layer.readers:
        scale = over_patches(reader, units, balanced(ranking.order, group))
        total = total + scale * least_held_out(reader.folds[:ways], units, orders, ridges)
    assert isinstance(total, Tensor)
    return total.cummin(dim=0).values


def over_patches(reader: Reader, units: int, order: Tensor) -> Tensor | float:
    """By how much the error over whole patches exceeds what the moments say, (units+1,); between a few widths, a guess.

    It is 1 if the reader's features are whole patches.
    """
    if reader.patches is None:
        return 1.0
    at = [round(share * units) for share in _WIDTHS]
    ratios = []
    for k in at:
        keep = features(order[:k], reader.mean.numel() // units)
        whole, known = map_errors(reader.patches, reader.covariance, keep, CURVE_RIDGE)
        ratios.append(whole / known if known > 0 else 1.0)
    return torch.from_numpy(np.interp(np.arange(units + 1), at, ratios)).to(order.device)
