"""Selectors in function space: which channels answer best for the others on the queries (ours)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coreprune._shapes import Tensor
from coreprune.coreset import Moments, d_optimal, functional_order
from coreprune.coreset.functional import Search
from coreprune.pruning.layer.weights import LayerWeights, Reader
from coreprune.pruning.selectors.base import Ranking, ranked


@dataclass(frozen=True)
class Functional:
    """Greedy residual pivoting on the consumers' covariances (`functional_coreset`, T10).

    search: "backward" gives up the unit whose loss costs least, from all of them down; "forward" collects the unit that
        explains most; "best" does both. ridge: as a multiple of the mean variance.
    """

    search: Search = "backward"
    ridge: float = 1e-4
    reads = True
    name = "functional"

    def __call__(self, layer: LayerWeights, generator: torch.Generator) -> Ranking:  # noqa: ARG002 (one signature)
        """Rank the channels of one layer."""
        if not layer.readers:
            return _unseen(self.name, layer)
        order = functional_order(moments_of(layer.readers), len(layer.incoming), ridge=self.ridge, search=self.search)
        return _ranking(self.name, order, f"{self.search} pivoting, {_readers(layer.readers)}")


@dataclass(frozen=True)
class DOptimal:
    """The Löwner ellipsoid of the channels as functions on the queries: support first, layer by layer (`d_optimal`)."""

    ridge: float = 1e-4
    reads = True
    name = "d-optimal"

    def __call__(self, layer: LayerWeights, generator: torch.Generator) -> Ranking:  # noqa: ARG002 (one signature)
        """Rank the channels of one layer."""
        if not layer.readers:
            return _unseen(self.name, layer)
        found = d_optimal(moments_of(layer.readers), len(layer.incoming), ridge=self.ridge)
        return _ranking(self.name, found.order, f"Löwner support in function space, {_readers(layer.readers)}")


def moments_of(readers: tuple[Reader, ...]) -> list[Moments]:
    """What the function-space coresets need of the readers."""
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
    """A group that no linear map reads (q·k, a sum): nothing to measure, so the largest weights stay."""
    return ranked(name, torch.linalg.vector_norm(layer.weights, dim=1), "no linear map reads it: by magnitude")
