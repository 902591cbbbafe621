"""Selectors that compare channels by their values on the queries: which can best replace the others (ours)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from coreprune._shapes import Tensor
from coreprune.coreset import Coreset, Moments, d_optimal, exchanged, functional_order
from coreprune.coreset.functional import Search
from coreprune.coreset.held_out import least_held_out
from coreprune.pruning.layer.weights import LayerWeights, Reader
from coreprune.pruning.selectors.base import Ranking, ranked

_NARROW = 256  # kept features; every swap factorises matrices of that size


@dataclass(frozen=True)
class Functional:
    """Keep the units from which the layers that read them can best be refitted, on the queries.

    Greedy pivoting on the covariances of what those layers read (`functional_coreset`, T10).

    search: "backward" starts with all units, and gives up the one whose loss costs least, again and again. "forward"
        starts with none, and adds the one that explains most. "best" does both, and takes the better one.
    ridge: added to the covariances, as a multiple of the mean variance.
    exchange: where at most a quarter stays, swap units as long as that lowers the error (T15), and keep that choice if
        its refit is better on queries that it has not seen, too. Not for groups with very many features.
    """

    search: Search = "backward"
    ridge: float = 1e-4
    exchange: bool = True
    reads = True
    name = "functional"

    def __call__(self, layer: LayerWeights, generator: torch.Generator) -> Ranking:  # noqa: ARG002 (one signature)
        """Rank the units of one layer."""
        if not layer.readers:
            return _unseen(self.name, layer)
        order = functional_order(moments_of(layer.readers), len(layer.incoming), ridge=self.ridge, search=self.search)
        found = _ranking(self.name, order, f"{self.search} pivoting, {_readers(layer.readers)}")
        return replace(found, rule=partial(self._coreset, layer.readers, order)) if self.exchange else found

    def _coreset(self, readers: tuple[Reader, ...], order: Tensor, k: int) -> Coreset:
        kept, units = order[:k].sort().values, order.numel()
        widest = max(reader.mean.numel() for reader in readers)
        if 4 * k <= units and k * widest // units <= _NARROW:
            other = exchanged(moments_of(readers), units, kept, ridge=self.ridge)
            if unseen(readers, units, other) < unseen(readers, units, kept):
                kept = other
        return Coreset(kept, torch.ones(k, dtype=torch.float64, device=kept.device))


@dataclass(frozen=True)
class DOptimal:
    """Keep the units that span the Löwner ellipsoid of all units, seen as functions on the queries (`d_optimal`).

    The contact points of the ellipsoid come first, then those of the units that are left, and so on.

    ridge: added to the covariances, as a multiple of the mean variance.
    """

    ridge: float = 1e-4
    reads = True
    name = "d-optimal"

    def __call__(self, layer: LayerWeights, generator: torch.Generator) -> Ranking:  # noqa: ARG002 (one signature)
        """Rank the units of one layer."""
        if not layer.readers:
            return _unseen(self.name, layer)
        found = d_optimal(moments_of(layer.readers), len(layer.incoming), ridge=self.ridge)
        return _ranking(self.name, found.order, f"Löwner support in function space, {_readers(layer.readers)}")


def unseen(readers: tuple[Reader, ...], units: int, kept: Tensor) -> float:
    """The error of the refit on some units, on the half of the queries that it has not seen (T12); 0 without halves."""
    rest = torch.ones(units, dtype=torch.bool, device=kept.device)
    rest[kept] = False
    order, total = torch.cat([kept, rest.nonzero()[:, 0]]), 0.0
    for reader in readers:
        if reader.folds:
            total += float(least_held_out(reader.folds, units, [order] * len(reader.folds))[kept.numel()])
    return total


def moments_of(readers: tuple[Reader, ...]) -> list[Moments]:
    """The covariances and the worth of errors, as `functional_coreset` takes them."""
    return [Moments(reader.covariance, reader.gram) for reader in readers]


def _ranking(name: str, order: Tensor, note: str) -> Ranking:
    n = order.numel()
    scores = torch.empty(n, dtype=torch.float64, device=order.device)
    scores[order] = torch.arange(n, 0, -1, dtype=torch.float64, device=order.device)
    return Ranking(name, scores, order, note)


def _readers(readers: tuple[Reader, ...]) -> str:
    features = " + ".join(str(reader.mean.numel()) for reader in readers[:4])
    return f"{len(readers)} consumer{'s' if len(readers) > 1 else ''} with {features} features"


def _unseen(name: str, layer: LayerWeights) -> Ranking:
    """For a group that only a sum reads, or anything else that is not a reader: the largest weights stay."""
    return ranked(name, torch.linalg.vector_norm(layer.weights, dim=1), "no linear map reads it: by magnitude")
