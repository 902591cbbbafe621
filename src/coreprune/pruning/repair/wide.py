"""The repair of a convolution with too many features for least squares: replace its inputs, tap by tap.

The weights (g, o, c·taps) are W = V·M with the original's weights V of every tap, and one map M (c, left) from the
channels that are left to all channels of the original. M is fitted, (c, left) numbers in place of (o, left·taps), so
that the moments have one row and column per channel. What the layer computes with W is then what the original computes
on the channels as M predicts them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coreprune._ranks import Share
from coreprune._shapes import Float, Int, Tensor
from coreprune.pruning.layer.linear_maps import Operator, even_rows
from coreprune.pruning.repair.fit import Fit, Rows, fitted

WIDEST = 4608  # features: 512 channels of a 3×3 convolution. Factorising their moments once takes seconds.


def channels(
    operator: Operator, original: Tensor, small: Tensor, positions: Tensor | None, alive: Int[Tensor, "g left"] | None
) -> Rows:
    """What the layer reads in the pruned model, and in the original, at some of its positions; each tap is a row.

    Returns (g, rows, left), (g, c, rows), and zeros of that shape, which stand for thresholds that nobody uses.
    """
    x = _by_tap(operator.features(small, positions, alive), operator.taps)
    y = _by_tap(operator.features(original, positions), operator.taps).mT.double()
    return x, y, torch.zeros_like(y[..., :1])


def positions_of(operator: Operator, output: Tensor, rows: int, batches: int) -> Tensor | None:
    """Positions of one batch, so that all taps at the positions of all batches make about `rows` rows."""
    return even_rows(operator.count(output), rows // (operator.taps * batches) + 1, output.device)


def mixed(
    batches: Sequence[Rows],
    weight: Float[Tensor, "g o f"],
    scale: Float[Tensor, "g o"],
    alive: Int[Tensor, "g left"] | None,
    *,
    intercept: bool,
    ridge: float | None,
    share: Share | None = None,
) -> Fit | None:
    """Fit M, and return the weights (g, o, left·taps) and the change of the biases (g, o).

    batches: from `channels`. weight: of the original. scale: what an output counts. The errors are those of the
    channels, each as much as its weights count. Other arguments as in `fitted`, which returns None for the same
    reasons.
    """
    g, count = weight.shape[0], batches[0][1].shape[1]
    by_tap = weight.reshape(g, weight.shape[1], count, -1)  # (g, o, c, taps)
    start = torch.eye(count, dtype=torch.float64, device=weight.device).expand(g, -1, -1)
    if alive is not None:
        start = start.gather(2, alive[:, None, :].expand(-1, count, -1))
    worth = (by_tap.square() * scale.square()[:, :, None, None]).sum(dim=(1, 3))
    bias = torch.zeros(g, count, dtype=torch.float64, device=weight.device)
    fit = fitted(batches, start, bias, worth, intercept=intercept, ridge=ridge, rounds=None, share=share)
    if fit is None:
        return None
    return Fit(
        torch.einsum("goct,gck->gokt", by_tap, fit.weight).flatten(2),
        torch.einsum("goct,gc->go", by_tap, fit.bias),
        fit.before,
        fit.after,
        fit.variance,
    )


def _by_tap(features: Float[Tensor, "g rows f"], taps: int) -> Float[Tensor, "g many c"]:
    """Every kernel tap as a row of its own."""
    g, rows, f = features.shape
    return features.reshape(g, rows, f // taps, taps).transpose(2, 3).reshape(g, rows * taps, f // taps)
