"""Does a model have trained weights, or those that its initialisation drew?"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor, nn

from coreprune._shapes import Float

_LEAST = 16  # rows, and entries of a row, that say something about a distribution
_SHARE = 0.9  # of the weights look drawn


def untrained(model: nn.Module) -> bool:
    """Whether the weights look as initialisation leaves them, whatever distribution it draws from.

    Training leaves two traces. Batch norms have seen batches. And the rows of a weight get different scales: entries
    drawn independently from one distribution have row variances that differ by sampling alone, so that for n entries
    with variance σ² and kurtosis κ the variance of a row's variance is σ⁴(κ − (n − 3)/(n − 1))/n.

    False for models without a weight that is large enough to tell.
    """
    if any(_has_seen_batches(module) for module in model.modules()):
        return False
    drawn = [all(_one_scale(rows) for rows in both) for both in _matrices(model)]
    return bool(drawn) and sum(drawn) >= _SHARE * len(drawn)


def _has_seen_batches(module: nn.Module) -> bool:
    mean = getattr(module, "running_mean", None)
    return isinstance(module, nn.modules.batchnorm._NormBase) and mean is not None and bool(mean.any())


def _matrices(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """The weights as matrices whose rows are outputs, and whose rows are inputs."""
    for weight in model.parameters():
        if weight.dim() < 2 or not weight.is_floating_point() or weight.is_meta:
            continue
        w = weight.detach().double()
        both = w.flatten(1), w.transpose(0, 1).flatten(1)
        if min(n for rows in both for n in rows.shape) >= _LEAST and bool(w.var() > 0):
            yield both


def _one_scale(rows: Float[Tensor, "rows entries"]) -> bool:
    """Whether the rows' variances differ by no more than sampling explains: by six of its standard errors."""
    count, n = rows.shape
    centred = rows - rows.mean()
    variance = centred.square().mean()
    kurtosis = centred.pow(4).mean() / variance.square()
    expected = variance.square() * (kurtosis - (n - 3) / (n - 1)) / n
    return bool(rows.var(1).var() <= expected * (1 + 6 * math.sqrt(2 / (count - 1))))
