"""Outputs that a model masks with an infinity, such as words that must not follow.

They are the same in the original and in the pruned model. So they are no error, and say nothing of how far outputs
vary; all other entries of the output count as ever.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BELOW = 100.0  # a logit that is so far below the least finite one has a probability of nearly zero


def mean_square(found: Tensor, wanted: Tensor) -> Tensor:
    """The mean of (found − wanted)² over the entries that are not the same infinity in both, which get no gradient."""
    masked = torch.isinf(wanted) & (found == wanted)
    return torch.where(masked, 0.0, found - wanted).square().sum() / (~masked).sum().clamp_min(1)


def entries(x: Tensor) -> Tensor:
    """The entries that are no infinities, (n,). NaN stays."""
    masked = torch.isinf(x)
    return x[~masked] if bool(masked.any()) else x.reshape(-1)


def floored(logits: Tensor) -> Tensor:
    """The logits with every infinity replaced by a number far below the others; NaN stays."""
    masked = torch.isinf(logits)
    if not bool(masked.any()) or bool(masked.all()):
        return logits
    return logits.masked_fill(masked, float(logits.detach()[~masked].min()) - _BELOW)
