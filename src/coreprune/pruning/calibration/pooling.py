"""Add up what several processes have found on their shares of the queries. In a single process nothing is done."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coreprune import _ranks
from coreprune.coreset.regression import LeastSquares


def pool_(what: str, parts: Sequence[LeastSquares], counts: bool, to: int | None = None) -> None:
    """Add the rows of all processes to every part.

    parts: of the same problem, such as its two halves; at least one of them has rows here. counts: whether the rows of
    this process count. to: the process that needs the result; None for all of them. The others must not use theirs.
    """
    if _ranks.world() == 1:
        return
    points = _ranks.from_first(what, lambda: next(part for part in parts if part.rows).points)
    for part in parts:
        part.around_(*points)
    rows = torch.tensor([part.rows * counts for part in parts])
    sums = [x for part in parts for x in part.sums()]
    if not counts:
        for x in sums:
            x.zero_()
    _ranks.total_(what, [rows])
    _ranks.total_(what, sums, to)
    for part, total in zip(parts, rows.tolist(), strict=True):
        part.rows = total


def pool_targets_(what: str, problem: LeastSquares, counts: bool) -> None:
    """Add what all processes have found about the targets, where the sums over the features are common already."""
    sums = problem.sums(targets_only=True)
    if not counts:
        for x in sums:
            x.zero_()
    _ranks.total_(what, sums)
