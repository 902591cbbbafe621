"""Confidence bounds on a mean loss (T18): exact for losses of 0 and 1, by betting for losses between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from coreprune._shapes import Num, Tensor
from coreprune.errors import InputError

# Shares of the largest bet. Twice the bet is right for half the variance, and little is lost in between. With 1, a
# sample without losses gives nearly the exact bound of losses of 0 and 1.
_BETS = (1.0, 0.9, 0.75, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625)


@dataclass(frozen=True)
class Interval:
    """The mean loss of n samples, and an interval that holds the expected loss with probability at least 1 − δ."""

    mean: float
    low: float
    high: float
    n: int
    delta: float


def upper_bound(losses: Num[Tensor, " n"], delta: float = 0.01) -> float:
    """T18: an upper bound on the expected loss, true with probability at least 1 − δ over n independent samples.

    Losses of 0 and 1 (a bool tensor): the exact bound of Clopper & Pearson 1934, the p with P(Bin(n, p) ≤ k) = δ.

    Losses in [0, 1] (a float tensor): the least m with W(m) ≥ 1/δ, where
        W(m) = mean over c of Π_i (1 + c (m − X_i)/(1 − m)),   c from a fixed list in (0, 1].
    Each product is what a gambler has who bets the share c of the largest possible amount on every loss being below m.
    At the true mean μ its expectation is 1, so W(μ) ≥ 1/δ has at most probability δ (Markov); W grows with m, so the
    bound is below μ only then. After Waudby-Smith & Ramdas, JRSSB 2024; a mixture of constant bets, so that the order
    of the samples does not matter.

    The kind goes by the dtype and not by the values: a loss that is 0 or 1 on these samples may be ½ on others.
    Raises InputError for no losses, for losses outside [0, 1] or not finite, and for a δ outside (0, 1).
    """
    x = _checked(losses, delta)
    n = len(x)
    if losses.dtype is torch.bool:
        k = int(x.sum())
        return 1.0 if k == n else upper_quantile(k + 1, n - k, delta)
    goal = math.log(1 / delta)
    low, high = float(x.mean()), 1.0
    if _log_wealth(x, low) >= goal:  # only rounding can make this so: no bet wins at the mean of the sample
        return low
    for _ in range(28):  # to 4·10⁻⁹, from above: W grows with m, and at `high` it is large enough
        middle = (low + high) / 2
        low, high = (low, middle) if _log_wealth(x, middle) >= goal else (middle, high)
    return high


def lower_bound(losses: Num[Tensor, " n"], delta: float = 0.01) -> float:
    """T18 for 1 − X: a lower bound on the expected loss."""
    return 1.0 - upper_bound(~losses if losses.dtype is torch.bool else 1 - losses, delta)


def interval(losses: Num[Tensor, " n"], delta: float = 0.01) -> Interval:
    """Both bounds, each with δ/2.

    For a paired difference D in [−1, 1] of two losses on the same samples, take the interval of (1 + D)/2 and map its
    ends back.
    """
    mean = float(losses.double().mean()) if losses.numel() else math.nan
    return Interval(mean, lower_bound(losses, delta / 2), upper_bound(losses, delta / 2), losses.numel(), delta)


def needed(level: float, delta: float = 0.01) -> int:
    """How many samples without a loss show that a loss of 0 or 1 is at most `level`: ln δ / ln(1 − level)."""
    if not 0 < level < 1 or not 0 < delta < 1:
        raise InputError(f"level and delta must lie between 0 and 1, but they are {level} and {delta}.")
    return math.ceil(math.log(delta) / math.log1p(-level) - 1e-9)


def shown_by(n: int, delta: float = 0.01) -> float:
    """The least level that n samples can show for a loss of 0 or 1: 1 − δ^{1/n}."""
    if n < 1 or not 0 < delta < 1:
        raise InputError(f"n must be at least 1 and delta between 0 and 1, but they are {n} and {delta}.")
    return -math.expm1(math.log(delta) / n)


def upper_quantile(a: int, b: int, delta: float) -> float:
    """The upper δ-quantile of Beta(a, b)."""
    from scipy.special import betainccinv  # imported only here, because it takes a third of a second

    return float(betainccinv(a, b, delta))


def _log_wealth(x: Tensor, m: float) -> float:
    """ln W(m)."""
    if m >= 1:
        return math.inf if bool((x < 1).any()) else 0.0
    shares = torch.tensor(_BETS, dtype=x.dtype, device=x.device)
    logs = torch.log1p((shares[:, None] * (m - x) / (1 - m)).clamp(min=-1.0)).sum(dim=1)
    return float(torch.logsumexp(logs, dim=0)) - math.log(len(_BETS))


def _checked(losses: Tensor, delta: float) -> Tensor:
    if losses.dim() != 1 or not losses.numel():
        raise InputError(f"losses must be (n,) with n ≥ 1, one per sample, but the shape is {tuple(losses.shape)}.")
    if not 0 < delta < 1:
        raise InputError(f"delta must lie between 0 and 1, but it is {delta}.")
    x = losses.double()
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise InputError("losses must lie in [0, 1]: divide them by the largest that is possible.")
    return x
