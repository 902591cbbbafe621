"""What every selector takes and gives: one signature.

    ranking = selector(layer, generator)     # LayerWeights, torch.Generator -> Ranking
    coreset = ranking.coreset(k)             # which k channels stay, and the factors of their outgoing weights

A selector is a small frozen dataclass whose fields are its options. `prune(method=...)` takes one, or its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch

from coreprune._shapes import Float, Int, Tensor
from coreprune.coreset import Coreset, DrawStream, from_stream
from coreprune.errors import InputError
from coreprune.pruning.layer.weights import LayerWeights


@dataclass(frozen=True)
class Ranking:
    """What a selector says about a layer.

    method: its name. scores: (n,) float64, larger stays first. order: (n,) int64, all channels, the first k are the
    choice of size k. note: which form ran and what limits it, in words. stream: the draws of a sampling selector, or
    None for a deterministic one; with sign_split its items are 2n. rule: makes the coreset of k < n channels where that
    is not a cut of order or stream (merging, folding).
    """

    method: str
    scores: Float[Tensor, " n"]
    order: Int[Tensor, " n"]
    note: str = ""
    stream: DrawStream | None = None
    rule: Callable[[int], Coreset] | None = None

    def coreset(self, k: int) -> Coreset:
        """Return the coreset of k channels: re-weighted if sampled, merged by a rule, and as they are if ranked."""
        n = self.scores.numel()
        if not 1 <= k <= n:
            raise InputError(f"a coreset of this layer has between 1 and {n} channels, not {k}.")
        if self.rule is not None and k < n:
            return self.rule(k)
        if self.stream is not None:
            return from_stream(self.stream, k, n)
        indices = self.order[:k].sort().values
        return Coreset(indices, torch.ones(k, dtype=torch.float64, device=indices.device))


@runtime_checkable
class Selector(Protocol):
    """The one signature."""

    name: ClassVar[str]
    reads: ClassVar[bool]  # whether it needs `LayerWeights.readers`, that is, queries

    def __call__(self, layer: LayerWeights, generator: torch.Generator) -> Ranking:
        """Rank the channels of one layer."""
        ...


def ranked(name: str, scores: Tensor, note: str = "", *, rule: Callable[[int], Coreset] | None = None) -> Ranking:
    """Largest scores first, no sampling. Raises InputError for scores that are not finite."""
    if not bool(torch.isfinite(scores).all()):
        channel = int((~torch.isfinite(scores)).nonzero()[0, 0])
        raise InputError(
            f"{name}: the score of channel {channel} is not finite, so its weights, or a norm behind them, have a NaN "
            "or infinite entry. Prune a checkpoint that is finite."
        )
    return Ranking(name, scores, torch.argsort(scores, descending=True, stable=True), note, rule=rule)
