"""What a selector takes and gives.

    ranking = selector(layer, generator)     # LayerWeights, torch.Generator -> Ranking
    coreset = ranking.coreset(k)             # which k units stay, and the factors of their outgoing weights

Each of ours is a small frozen dataclass whose fields are its options. A selector of your own may be a plain function
from a layer to its scores (`own`). `prune(method=...)` takes either, or a name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from coreprune._shapes import Float, Int, Tensor
from coreprune._shown import brief
from coreprune.coreset import Coreset, DrawStream, from_stream
from coreprune.errors import InputError
from coreprune.pruning.layer.weights import LayerWeights


@dataclass(frozen=True)
class Ranking:
    """What a selector says about the n units of a layer. A unit is a channel, or several that only leave together.

    method: the name of the selector. scores: (n,) float64; units with larger scores stay longer. order: (n,) int64, all
    units, best first; the first k of them are the choice of size k. note: one sentence for the report, for example
    which form of the selector ran. stream: the draws of a sampling selector, or None if nothing was drawn; with
    sign_split it has 2n items. rule: makes the coreset of k < n units, for selectors that do more than keep the first k
    of the order (merging, folding).
    """

    method: str
    scores: Float[Tensor, " n"]
    order: Int[Tensor, " n"]
    note: str = ""
    stream: DrawStream | None = None
    rule: Callable[[int], Coreset] | None = None
    __repr__ = brief

    def coreset(self, k: int) -> Coreset:
        """Return the coreset of k units: made by the rule, or cut from the stream, or the first k of the order."""
        n = self.scores.numel()
        if not 1 <= k <= n:
            raise InputError(f"a coreset of this layer has between 1 and {n} units, not {k}.")
        if self.rule is not None and k < n:
            return self.rule(k)
        if self.stream is not None:
            return from_stream(self.stream, k, n)
        indices = self.order[:k].sort().values
        return Coreset(indices, torch.ones(k, dtype=torch.float64, device=indices.device))


@runtime_checkable
class Selector(Protocol):
    """The interface of every selector."""

    @property
    def name(self) -> str:
        """What `method=`, plans and reports call it."""
        ...

    @property
    def reads(self) -> bool:
        """Whether it needs `LayerWeights.readers`, which are there only if there are queries."""
        ...

    def __call__(self, layer: LayerWeights, generator: torch.Generator) -> Ranking:
        """Rank the units of one layer. All randomness comes from the generator."""
        ...


def ranked(name: str, scores: Tensor, note: str = "", *, rule: Callable[[int], Coreset] | None = None) -> Ranking:
    """Rank units by their scores, largest first, and the first of equals first. Nothing is sampled or re-weighted.

    name: of the selector. scores: (n,) float64. note, rule: as in `Ranking`.
    """
    return Ranking(name, scores, torch.argsort(scores, descending=True, stable=True), note, rule=rule)
