"""The ridge of a refit, and whether it is worth writing, from queries that the refit has not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch

from coreprune._shapes import Bool, Float, Tensor
from coreprune.coreset.held_out import RIDGES
from coreprune.coreset.regression import LeastSquares, ridge_of
from coreprune.errors import GeometryError


@dataclass(frozen=True)
class Checked:
    """What the held-out rows say about a refit.

    ridge: the λ that is best on them, for a refit on all rows. after: (g, o) the error of every output with that λ on
    rows that the refit has not seen. before: (g, o) the error of the start there. better: (g, o) whether the refit of
    the output is better than its start. With several kinds of rows, these are the errors on the kind on which the refit
    of the output does worst, compared with its start.
    """

    ridge: float
    before: Float[Tensor, "g o"]
    after: Float[Tensor, "g o"]

    @property
    def better(self) -> Bool[Tensor, "g o"]:
        """Whether the refit of each output is better than its start."""
        return self.after < self.before


def checked(
    halves: tuple[LeastSquares, LeastSquares],
    start: Float[Tensor, "g o f"],
    bias: Float[Tensor, "g o"],
    worth: Float[Tensor, "g o"],
    ridges: Sequence[float] = RIDGES,
    others: Sequence[tuple[LeastSquares, LeastSquares]] = (),
) -> Checked:
    """T13: choose the ridge of a refit by two-fold cross-validation.

    The refit on one half of the queries is tried on the other half, and the other way round. Both errors are unbiased
    for a refit on half of the queries, whatever their distribution. λ = ∞ changes the intercept only.

    A ridge that suits a refit on N/2 queries is about twice what suits one on all N, because the noise that it
    holds down falls as 1/N. So half of the best ridge is returned.

    halves: siblings, each with the rows of other queries. start, bias: the weights and the biases before the refit.
    worth: of a squared error of each output. ridges: ascending. They are tried from the largest on, until the error
    has risen twice. others: the same for other kinds of queries, siblings too. A refit sees one half of every kind, and
    every kind has the same say in the choice of the ridge.
    """
    kinds = (halves, *others)
    seen = [reduce(add, half) for half in zip(*kinds, strict=True)]
    paths = [_along(half, [kind[1 - i] for kind in kinds], start.double(), worth) for i, half in enumerate(seen)]
    best, least, risen = math.inf, math.inf, 0
    for ridge in sorted(ridges, reverse=True):
        size = sum(path.error(ridge) for path in paths)
        if size < least:
            best, least, risen = ridge, size, 0
        else:
            risen += 1
            if risen == 2:
                break

    def errors_of(fits: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """(kinds, g, o), of two fits on the halves that they have not seen."""
        ways = [[kind[1].error(*fits[0]), kind[0].error(*fits[1])] for kind in kinds]
        return torch.stack([torch.stack(both).mean(dim=0) for both in ways])

    before, after = errors_of([(start.double(), bias)] * 2), errors_of([path.fit(best) for path in paths])
    worst = (after - before).argmax(dim=0, keepdim=True)
    return Checked(best / 2, *(errors.gather(0, worst)[0] for errors in (before, after)))


@dataclass(frozen=True, eq=False)
class _Along:
    """The refits on one half for every ridge, along one eigendecomposition, and their weighted error on other rows.

    With XᵀX/n = QΛQᵀ on the half, the refit is W₀ + CDQᵀ for C = (YᵀX/n − W₀XᵀX/n)Q and D = (Λ + λ)⁻¹. Its error
    elsewhere is a quadratic form in the diagonal d of D, e₀ − 2·l·d + dᵀMd. So a ridge costs f² operations, whatever
    the number of outputs.

    start: (g, o, f) W₀. changes: (g, o, f) C. values, vectors: (g, f) Λ and (g, f, f) Q. scale: (g,) of the ridge.
    base, linear, square: e₀, l (g, f) and M (g, f, f).
    """

    half: LeastSquares
    start: Float[Tensor, "g o f"]
    changes: Float[Tensor, "g o f"]
    values: Float[Tensor, "g f"]
    vectors: Float[Tensor, "g f f"]
    scale: Float[Tensor, " g"]
    base: float
    linear: Float[Tensor, "g f"]
    square: Float[Tensor, "g f f"]

    def error(self, ridge: float) -> float:
        """The error on the other rows, weighted by what the outputs are worth, summed over outputs and kinds."""
        if math.isinf(ridge):
            return self.base
        d = self._inverse(ridge)
        return self.base + float((d * ((self.square @ d[..., None])[..., 0] - 2 * self.linear)).sum())

    def fit(self, ridge: float) -> tuple[Float[Tensor, "g o f"], Float[Tensor, "g o"]]:
        """The weights and the biases of the refit."""
        weight = self.start
        if not math.isinf(ridge):
            weight = weight + (self.changes * self._inverse(ridge)[:, None]) @ self.vectors.mT
        return weight, self.half.intercepts(weight)

    def _inverse(self, ridge: float) -> Tensor:
        return 1 / (self.values + ridge_of(self.scale, ridge)[:, None])


def _along(
    half: LeastSquares, unseen: Sequence[LeastSquares], start: Float[Tensor, "g o f"], worth: Float[Tensor, "g o"]
) -> _Along:
    """unseen: for every kind, the rows that the refits do not see.

    Around the means of the half, the error of (W, b(W)) on other rows is v − 2W·Y + W·WS, with their variance v and
    their moments Y and S: b puts the refit through these means, so that the distance to their own is an error, too.
    """
    mean_x, mean_y, seen_xx, seen_yx = half.moments()
    if not bool(torch.isfinite(seen_xx).all() and torch.isfinite(seen_yx).all()):
        raise GeometryError("the moments of the queries are not finite; check the queries and the activations.")
    base, xx, yx = 0.0, torch.zeros_like(seen_xx), torch.zeros_like(seen_yx)
    for other in unseen:
        x, y, its_xx, its_yx = other.moments()
        xx, yx, variance = xx + its_xx, yx + its_yx, other.variance()
        if half.intercept:
            x, y = x - mean_x, y - mean_y
            xx, yx = xx + x[..., None] * x[:, None], yx + y[..., None] * x[:, None]
            variance = variance + y.square()
        base += float((worth * variance).sum())
    left = yx - start @ xx
    base -= float((worth[..., None] * start * (yx + left)).sum())
    values, vectors = torch.linalg.eigh(seen_xx)
    changes = (seen_yx - start @ seen_xx) @ vectors
    weighted = worth[..., None] * changes
    return _Along(
        half,
        start,
        changes,
        values,
        vectors,
        seen_xx.diagonal(dim1=1, dim2=2).mean(1),
        base,
        (weighted * (left @ vectors)).sum(1),
        (weighted.mT @ changes).mul_(vectors.mT @ xx @ vectors),
    )
