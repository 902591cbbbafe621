"""The error at the consumers of one group, for every number of units: on the queries, and on unseen ones."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from coreprune.coreset import FunctionalCoreset, held_out_curve, in_order
from coreprune.graph import Group
from coreprune.pruning.allocation.curves import balanced
from coreprune.pruning.layer.weights import LayerWeights
from coreprune.pruning.selectors import Ranking, Selector, ranking_of
from coreprune.pruning.selectors.functional import moments_of

CURVE_RIDGE = 1e-3
_WIDEST_FLOOR = 1200  # features; up to this many, T10′ takes about a second at most


def on_queries(group: Group, layer: LayerWeights, ranking: Ranking) -> FunctionalCoreset | None:
    """The error of the ranking's order on the queries (T10), and lower bounds of it; None without queries."""
    if not layer.readers:
        return None
    narrow = max(reader.mean.numel() for reader in layer.readers) <= _WIDEST_FLOOR
    units, order = group.size // group.unit, balanced(ranking.order, group)
    return in_order(moments_of(layer.readers), units, order, ridge=CURVE_RIDGE, unit_floor=narrow)


def held_out(
    group: Group, layer: LayerWeights, ranking: Ranking, selector: Selector, generator: torch.Generator
) -> Tensor | None:
    """The error on queries that neither the order nor the refit has seen (T12), (n+1,) float64.

    One half of the queries orders the units and refits the readers, and the other half measures the error; then the
    other way round. Each reader has the ridge that is best there, for every number of units. None if there are no two
    halves.
    """
    if not layer.readers or not all(reader.folds for reader in layer.readers):
        return None
    orders = [ranking.order, ranking.order]
    if selector.reads:  # an order that goes by the queries must not have seen those that measure the error
        halves = [[replace(r, covariance=r.folds[i].seen) for r in layer.readers] for i in range(2)]
        orders = [ranking_of(selector, replace(layer, readers=tuple(half)), generator).order for half in halves]
    units, total = group.size // group.unit, 0.0
    for reader in layer.readers:
        ways = zip(reader.folds, orders, strict=True)
        curves = torch.stack([held_out_curve(fold, units, balanced(order, group)) for fold, order in ways])
        total = total + curves.mean(dim=0).amin(dim=0)
    assert isinstance(total, Tensor)
    return total.cummin(dim=0).values
