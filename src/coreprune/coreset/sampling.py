"""Importance sampling of channels, with re-weighting.

q_i = importance_i / T, m draws with replacement, and V'_jk = V_jk · (times k was drawn) / (m q_k). This makes F'(x) an
unbiased estimate of the next layer for every x. T6 bounds its error (`bounds.sampling_bound`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from coreprune._seed import as_generator
from coreprune._shapes import Float, Int, Tensor
from coreprune._shown import brief
from coreprune.coreset.merging import Merge
from coreprune.errors import InputError


@dataclass(frozen=True)
class Coreset:
    """Kept channels and the factors of their outgoing weights.

    indices: (k,) int64 kept channels, ascending.
    weights: (k,) float64, V'_jk = weights_k · V_jk where V_jk ≥ 0 (everywhere, unless `negative_weights` is given).
    negative_weights: (k,) float64 factors where V_jk < 0, after a sign-split sample. Otherwise None.
    draws: m, the number of draws; 0 for a deterministic choice.
    merge: into which kept channels the removed ones are merged, or None when they are dropped. V' is `weights` times
        the kept columns, plus the columns merged into them.
    """

    indices: Int[Tensor, " k"]
    weights: Float[Tensor, " k"]
    negative_weights: Float[Tensor, " k"] | None = None
    draws: int = 0
    merge: Merge | None = None
    __repr__ = brief

    def outgoing(self, outgoing: Float[Tensor, "J n"]) -> Float[Tensor, "J k"]:
        """Return the re-weighted outgoing weights V' (J, k), given all outgoing weights V (J, n)."""
        kept = outgoing[:, self.indices]
        factors = self.weights.to(kept)
        if self.negative_weights is not None:
            factors = torch.where(kept >= 0, factors, self.negative_weights.to(kept))
        if self.merge is None:
            return kept * factors
        return kept * factors + (self.merge.outgoing(outgoing)[:, self.indices] - kept)

    def incoming(self, incoming: Float[Tensor, "n d"]) -> Float[Tensor, "k d"]:
        """Return the new incoming rows of the kept channels: the given rows, or the means of the merged ones."""
        return (incoming if self.merge is None else self.merge.incoming(incoming))[self.indices]


@dataclass(frozen=True)
class DrawStream:
    """An endless i.i.d. sequence of draws, described by the order in which new items appear in it.

    Cutting the stream where `order[t-1]` first appears gives t distinct items, so one stream holds a nested coreset
    for every size. Items of probability zero never appear.

    order: (k,) int64 items by first appearance. probabilities: (n,) float64, sum 1. seed: for the repeated draws
    between first appearances.
    """

    order: Int[Tensor, " k"]
    probabilities: Float[Tensor, " n"]
    seed: int
    __repr__ = brief

    def cut(self, t: int) -> tuple[Int[Tensor, " t"], int]:
        """How often each of order[:t] has been drawn when the t-th distinct item appears, and the total of draws.

        Single draws are not simulated. Before each new item comes a geometric number of repeats, spread multinomially
        over the items seen so far. The result is exact in distribution, and takes O(t²) however small the smallest
        probability is.
        """
        rng = np.random.default_rng(self.seed)
        q = self.probabilities[self.order].cpu().numpy()
        unseen = np.cumsum(q[::-1])[::-1]  # unseen[s] = probability that a draw is new after s distinct items
        counts = np.zeros(t, dtype=np.int64)
        for s in range(t):
            if s:
                repeats = min(int(rng.geometric(min(1.0, unseen[s]))) - 1, _MOST_REPEATS)
                counts[:s] += rng.multinomial(repeats, q[:s] / q[:s].sum())
            counts[s] += 1
        return torch.as_tensor(counts, device=self.order.device), int(counts.sum())


# Keeps counts exact in float64 where an item's probability is below 1e-12. Further repeats would change nothing there.
_MOST_REPEATS = 2**40


def draw_stream(importance: Float[Tensor, " n"], seed: int | torch.Generator = 0) -> DrawStream:
    """Start an i.i.d. stream with probabilities proportional to `importance`.

    importance: (n,), finite, ≥ 0, not all zero. seed: a number, or a generator to draw from.

    Raises InputError for other importances or seeds.
    """
    importance = _as_importance(importance)
    probabilities = importance / importance.sum()
    q = probabilities.cpu().numpy()
    rng = _numpy_generator(as_generator(seed))
    positive = np.flatnonzero(q)
    # The first appearances of an i.i.d. stream come in the order of independent exponential clocks with rates q.
    order = positive[np.argsort(rng.exponential(size=positive.size) / q[positive])]
    return DrawStream(torch.as_tensor(order, device=importance.device), probabilities, int(rng.integers(2**62)))


def sample(
    importance: Float[Tensor, "*sign n"],
    m: int,
    seed: int | torch.Generator = 0,
    *,
    unit: Literal["distinct", "draws"] = "distinct",
    sign_split: bool = False,
    replacement: bool = True,
) -> Coreset:
    """Sample channels by importance and re-weight them.

    importance: (n,) ≥ 0. With `sign_split`, (2, n): the importances for the positive and the negative outgoing weights.
    m: the number of distinct channels to keep (unit="distinct"), or the number of draws (unit="draws").
    sign_split: sample positive and negative outgoing weights separately (Mussay et al. 2020). There are 2n items, one
        per channel and sign, each with its own probability and its own factor.
    replacement: False draws m distinct items with inclusion probabilities π_i = min(1, m·q_i) (rescaled to sum to m;
        systematic sampling in random order) and factors 1/π_i. This is unbiased, but T6 does not cover it.
    seed: a number, or a generator to draw from.

    With unit="distinct", asking for all channels of positive importance keeps them with factor 1, without estimating.
    Raises InputError when m is below 1 or above n, or when the importances are negative, non-finite or all zero.
    """
    if sign_split and (importance.ndim != 2 or importance.shape[0] != 2):
        raise InputError(f"with sign_split, importance has shape (2, n), but it is {tuple(importance.shape)}.")
    if not sign_split and importance.ndim != 1:
        raise InputError(f"importance has shape (n,), but it is {tuple(importance.shape)}.")
    n = importance.shape[-1]
    if isinstance(m, bool) or not isinstance(m, int) or m < 1:
        raise InputError(f"m must be a whole number ≥ 1, but it is {m!r}.")
    if unit not in ("distinct", "draws"):
        raise InputError(f"unknown unit {unit!r}; known: distinct, draws.")
    if unit == "distinct" and m > n:
        raise InputError(f"{m} distinct channels were asked for, but there are only {n}.")
    items, generator = _as_importance(importance.reshape(-1)), as_generator(seed)
    if not replacement:
        return _without_replacement(items, min(m, n), generator, n)
    if unit == "distinct":
        return from_stream(draw_stream(items, generator), m, n)
    q = (items / items.sum()).cpu().numpy()
    counts = torch.as_tensor(_numpy_generator(generator).multinomial(m, q / q.sum()), device=items.device)
    factors = torch.where(counts > 0, counts / (m * torch.as_tensor(q, device=items.device)), 0.0)
    return _coreset(factors, n, m)


def from_stream(stream: DrawStream, m: int, n: int) -> Coreset:
    """Cut a stream over n items (2n if sign-split) where m distinct channels have appeared.

    If m is at least the number of channels of positive importance, each of them is kept with factor 1. Channels that
    never appear then fill up the coreset to m channels, also with factor 1.
    """
    channels = stream.order.cpu().numpy() % n
    _, first = np.unique(channels, return_index=True)  # position in the stream where each channel first appears
    arrivals = np.sort(first)
    if m >= arrivals.size:
        keep = torch.zeros(n, dtype=torch.bool, device=stream.order.device)
        keep[torch.as_tensor(channels, device=keep.device)] = True
        others = torch.nonzero(~keep).flatten()
        keep[others[: m - arrivals.size]] = True
        indices = torch.nonzero(keep).flatten()
        return Coreset(indices, torch.ones(indices.numel(), dtype=torch.float64, device=indices.device))
    t = int(arrivals[m - 1]) + 1
    counts, draws = stream.cut(t)
    seen = stream.order[:t]
    factors = torch.zeros_like(stream.probabilities)
    factors[seen] = counts.to(factors) / (draws * stream.probabilities[seen])
    return _coreset(factors, n, draws)


def _coreset(factors: Tensor, n: int, draws: int) -> Coreset:
    """The coreset of the channels that have a factor, from the factors of n or 2n items."""
    by_sign = factors.reshape(-1, n)
    indices = torch.nonzero((by_sign > 0).any(dim=0)).flatten()
    negative = by_sign[1, indices] if by_sign.shape[0] == 2 else None
    return Coreset(indices, by_sign[0, indices], negative, draws)


def _without_replacement(items: Tensor, m: int, generator: torch.Generator, n: int) -> Coreset:
    rng = _numpy_generator(generator)
    importance = items.cpu().numpy()
    positive = np.flatnonzero(importance)
    if positive.size <= m:
        pi = (importance > 0).astype(float)
    else:
        # π_i = min(1, t·importance_i), with t such that they sum to m. Found by capping, rescaling the rest, repeating.
        pi = np.zeros_like(importance)
        certain = np.zeros(importance.size, dtype=bool)
        while True:
            free = ~certain & (importance > 0)
            scaled = importance[free] * ((m - certain.sum()) / importance[free].sum())
            pi[free], pi[certain] = scaled, 1.0
            over = free & (pi >= 1.0)
            if not over.any():
                break
            certain |= over
    shuffled = rng.permutation(positive)
    # Walk along the cumulated π in unit steps from one uniform start. Item i is hit with probability exactly π_i, and
    # there are m hits in all.
    edges = np.r_[0.0, np.cumsum(pi[shuffled])]
    start = rng.uniform()
    hit = np.floor(edges[1:] - start) > np.floor(edges[:-1] - start)
    factors = np.zeros_like(importance)
    factors[shuffled[hit]] = 1.0 / pi[shuffled[hit]]
    return _coreset(torch.as_tensor(factors, device=items.device), n, 0)


def _as_importance(importance: Tensor) -> Tensor:
    importance = torch.as_tensor(importance).to(torch.float64)
    if not bool(torch.isfinite(importance).all()) or bool((importance < 0).any()):
        raise InputError("importances must be finite and ≥ 0.")
    if importance.numel() == 0 or float(importance.sum()) <= 0:
        raise InputError("every importance is zero, so there is nothing to sample by; use the 'uniform' selector.")
    return importance


def _numpy_generator(generator: torch.Generator) -> np.random.Generator:
    """A numpy generator seeded from a torch one. Only numpy has exact geometric and multinomial draws of any size."""
    seed = torch.randint(2**62, (1,), generator=generator, device=generator.device)
    return np.random.default_rng(int(seed))
