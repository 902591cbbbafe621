"""Outputs that a model masks with an infinity, such as words that must not follow.

They are the same in the original and in the pruned model. So they are no error, and say nothing of how far outputs
vary; all other entries of the output count as ever.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BELOW = 100.0  # a logit that is so far below the least finite one has a probability of nearly zero


def finite(x: Tensor) -> bool:
    """Whether x has entries and all of them are finite, in one pass that makes no mask."""
    return x.numel() > 0 and bool(torch.isfinite(torch.stack(torch.aminmax(x.detach()))).all())


def infinite(x: Tensor) -> Tensor | None:
    """Which entries are infinities; None if none is."""
    if finite(x):
        return None
    masked = torch.isinf(x)
    return masked if bool(masked.any()) else None


def mean_square(found: Tensor, wanted: Tensor) -> Tensor:
    """The mean of (found − wanted)² over the entries that are not the same infinity in both, which get no gradient."""
    masked = torch.isinf(wanted) & (found == wanted)
    return torch.where(masked, 0.0, found - wanted).square().sum() / (~masked).sum().clamp_min(1)


def entries(x: Tensor) -> Tensor:
    """The entries that are no infinities, (n,). NaN stays."""
    masked = infinite(x)
    return x.reshape(-1) if masked is None else x[~masked]


def floored(logits: Tensor) -> Tensor:
    """The logits with every infinity replaced by a number far below the others; NaN stays."""
    masked = infinite(logits)
    if masked is None or bool(masked.all()):
        return logits
    return logits.masked_fill(masked, float(logits.detach()[~masked].min()) - _BELOW)
