"""The refit of one layer: its ridge, its one-sided rounds, and whether its outputs are worth writing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from typing import Any

import torch

from coreprune import _ranks
from coreprune._ranks import Share
from coreprune._shapes import Float, Tensor
from coreprune.coreset.cross_validation import checked
from coreprune.coreset.held_out import RIDGES
from coreprune.coreset.regression import LeastSquares
from coreprune.pruning.calibration.pooling import pool_, pool_targets_

Rows = tuple[Tensor, Tensor, Tensor]  # features (g, rows, f), targets and zeros (g, o, rows)

_MANY = 512  # features; with fewer, the moments cost nothing
_HELD = 1 << 25  # entries; batches with at most this many in all are held in float64: 256 MiB. Others are made anew.
_TOGETHER = 1 << 20  # entries of one joined batch: 8 MiB
_SETTLED = 0.99
_BEYOND = 1.8  # step of a round, 1 being its least squares solution; up to 2 the one-sided error does not rise


class Made(Sequence[Rows]):
    """Batches that are made when they are asked for, every time anew, so that one is in memory at a time."""

    def __init__(self, count: int, make: Callable[[int], Rows]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, b: Any) -> Any:
        """One batch."""
        if not 0 <= b < self._count:
            raise IndexError(b)
        return self._make(b)


@dataclass(frozen=True, eq=False)
class Fit:
    """New weights (g, o, f) and biases (g, o), and the mean squared error before and after, as shares of the variance.

    The errors are one-sided if the rounds were. variance: the mean over the outputs.
    """

    weight: Float[Tensor, "g o f"]
    bias: Float[Tensor, "g o"]
    before: float
    after: float
    variance: float


def joined(fits: Sequence[Fit]) -> Fit:
    """The fit of all outputs from those of blocks of them. Errors are of the blocks with a variance."""
    if len(fits) == 1:
        return fits[0]
    sizes = [fit.variance * fit.bias.numel() for fit in fits]
    before, after = (
        sum(size * error for size, error in zip(sizes, errors, strict=True)) / sum(sizes)
        for errors in ([fit.before for fit in fits], [fit.after for fit in fits])
    )
    weight, bias = torch.cat([fit.weight for fit in fits], dim=1), torch.cat([fit.bias for fit in fits], dim=1)
    outputs = sum(fit.bias.numel() for fit in fits if fit.variance)
    return Fit(weight, bias, before, after, sum(sizes) / outputs)


def fitted(
    batches: Sequence[Rows],
    start: Float[Tensor, "g o f"],
    bias: Float[Tensor, "g o"],
    worth: Float[Tensor, "g o"],
    *,
    intercept: bool,
    ridge: float | None,
    rounds: int | None,
    unit: float = 1.0,
    kinds: Sequence[int] = (),
    share: Share | None = None,
) -> Fit | None:
    """Fit the targets by ridge least squares, from the start.

    batches: of whole queries. Each holds the features, the targets, and the outputs at which the value behind the path
    is zero. worth: of a squared error of each output. ridge: λ as a multiple of the mean second moment of the features;
    None chooses it on queries that the fit has not seen (T13), and leaves outputs as they are that get worse there.
    rounds: at most this many rounds of one-sided targets; None if more than a ReLU reads the outputs.
    unit: what every ridge is multiplied by, for a problem with fewer features than the layer has.
    kinds: the kind of the queries of every batch, from 0 on; one kind by default. An output must get better on each.
    share: which of all batches these are, if several processes have some of them each. All get the same fit. `kinds` is
    about all batches.

    Returns None if nothing is to be written: no output gets better, or there is only one batch to check on.
    """
    features, share = start.shape[2], share or Share(range(len(batches)))
    if len(batches) * sum(x.numel() for x in batches[0]) <= _HELD:
        batches = list(batches)
    if features > _MANY and 4 * _sum(float(sum(x.shape[1] for x, _, _ in batches)), share) < 3 * features:
        # The refit changes the weights in the span of the rows alone, which is small here, so it is found there.
        basis = _basis([x for x, _, _ in batches], share)
        inside = Made(len(batches), partial(_in_basis, batches, basis))
        fewer = basis.shape[2] / features  # the same sum of moments has a larger mean
        near = start @ basis
        found = fitted(
            inside, near, bias, worth, intercept=intercept, ridge=ridge, rounds=rounds, unit=fewer, kinds=kinds,
            share=share,
        )  # fmt: skip
        return found and replace(found, weight=start + (found.weight - near) @ basis.mT)
    by_kind = _halves(batches, intercept, kinds, share)
    fits, better = reduce(add, [half for halves in by_kind for half in halves]), None
    if ridge is not None:
        ridge = unit * ridge
    elif not all(half.rows for halves in by_kind for half in halves):
        return None
    else:
        ridges = [unit * each for each in RIDGES]
        found = _ranks.from_first("the ridge", lambda: checked(by_kind[0], start, bias, worth, ridges, by_kind[1:]))
        ridge, better = found.ridge, found.better
        if not bool(better.any()):
            return None
    batches = _together(batches)
    weight, shift = fits.solve(start, ridge)
    last = math.inf
    for _ in range(rounds or 0):
        again, off = fits.retarget(), 0.0
        for x, y, zero in batches:
            said = torch.baddbmm(shift[:, :, None], weight, x.double().mT)
            wanted = one_sided(said, y, zero)
            again.add_targets(x, wanted.mT)
            off += float(torch.linalg.vector_norm(said.sub_(wanted)).square())
        pool_targets_("one-sided targets", again, share.counts)
        off = _sum(off, share)
        solution = again.solve(start, ridge)
        weight, shift = (now.lerp(new, _BEYOND) for now, new in zip((weight, shift), solution, strict=True))
        if off > _SETTLED * last:
            break
        last = off
    if better is not None:
        weight, shift = torch.where(better[..., None], weight, start), torch.where(better, shift, bias)
    size = float(fits.variance().clamp_min(0).mean()) or 1.0
    before, after = (
        (float(fits.error(w, b).mean()) if rounds is None else _off(batches, w, b, share)) / size
        for w, b in ((start, bias), (weight, shift))
    )
    return Fit(weight, shift, before, after, size)


def _in_basis(batches: Sequence[Rows], basis: Tensor, b: int) -> Rows:
    x, y, zero = batches[b]
    return x.double() @ basis, y, zero


def one_sided(said: Tensor, y: Tensor, zero: Tensor) -> Tensor:
    """Targets for a ReLU: where it cuts the original off (y < zero), any output that is cut off too is a match."""
    return torch.where(y < zero, torch.minimum(said, zero), y)


def _basis(features: Sequence[Tensor], share: Share) -> Tensor:
    """An orthonormal basis of the rows of all batches, (g, f, rows), the same in all processes."""
    mine = torch.cat(list(features), dim=1) if share.counts else features[0][:, :0]
    rows = torch.cat(_ranks.gathered("the rows of a wide layer", mine), dim=1)
    return _ranks.from_first("their basis", lambda: torch.linalg.qr(rows.double().mT).Q)


def _sum(number: float, share: Share) -> float:
    """The sum over all processes."""
    if _ranks.world() == 1:
        return number
    total = torch.tensor(number if share.counts else 0.0, dtype=torch.float64)
    _ranks.total_("a sum", [total])
    return float(total)


def _off(batches: Sequence[Rows], weight: Tensor, bias: Tensor, share: Share) -> float:
    """The mean one-sided squared error."""
    total = count = 0.0
    for x, y, zero in batches:
        said = torch.baddbmm(bias[:, :, None], weight, x.double().mT)
        total += float((said - one_sided(said, y, zero)).square().sum())
        count += said.numel()
    return _sum(total, share) / _sum(count, share)


def _halves(
    batches: Sequence[Rows], intercept: bool, kinds: Sequence[int], share: Share
) -> list[tuple[LeastSquares, LeastSquares]]:
    """For every kind, the moments of its batches with an even number, and of those with an odd number."""
    first, found = LeastSquares(intercept), list[list[LeastSquares]]()
    for b, (x, y, _) in zip(share.numbers, batches, strict=True):
        kind = kinds[b] if kinds else 0
        if not found:
            first.add(x, y.mT)
            found = [[first.sibling(), first.sibling()] for _ in range(max(kinds, default=0) + 1)]
            found[kind][b % 2] = first
        else:
            found[kind][b % 2].add(x, y.mT)
    pool_("the moments of a layer", [half for halves in found for half in halves], share.counts)
    return [(even, odd) for even, odd in found]


def _together(batches: Sequence[Rows]) -> Sequence[Rows]:
    """Join batches into larger float64 ones: each costs calls in every round, but very large ones cost page faults."""
    if not isinstance(batches, list):
        return batches
    each = max(1, round(_TOGETHER / batches[0][0].numel()))
    out = []
    for start in range(0, len(batches), each):
        x, y, zero = zip(*batches[start : start + each], strict=True)
        out.append((torch.cat(x, dim=1).double(), torch.cat(y, dim=2), torch.cat(zero, dim=2)))
    return out
