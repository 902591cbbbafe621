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
from coreprune.coreset.regression import LeastSquares


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

    def errors_of(fits: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """(kinds, g, o), of two fits on the halves that they have not seen."""
        ways = [[kind[1].error(*fits[0]), kind[0].error(*fits[1])] for kind in kinds]
        return torch.stack([torch.stack(both).mean(dim=0) for both in ways])

    def unseen(ridge: float) -> Tensor:
        return errors_of([half.solve(start, ridge) for half in seen])

    before = errors_of([(start.double(), bias)] * 2)
    best, after, least, risen = math.inf, before, math.inf, 0
    for ridge in sorted(ridges, reverse=True):
        errors = unseen(ridge)
        size = float((worth * errors).sum())
        if size < least:
            best, after, least, risen = ridge, errors, size, 0
        else:
            risen += 1
            if risen == 2:
                break
    worst = (after - before).argmax(dim=0, keepdim=True)
    return Checked(best / 2, *(errors.gather(0, worst)[0] for errors in (before, after)))
