"""Whether the user's samples look like what the model saw in training, as its batch norms remember it."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import nn

from coreprune._example import largest_batch, quiet
from coreprune.queries import Queries
from coreprune.queries.sources.norm_statistics import mismatch_during

log = logging.getLogger(__name__)

_FEWEST, _MOST = 16, 32  # queries; with fewer, means and variances are too uncertain, and with more, memory is
# In standard deviations. On EfficientNet-Lite0 photographs are 0.2 off (32 of them), dead leaves 0.45, a constant or
# white noise 0.85 to 1.0, and photographs with the pixels 0 to 255, or with the mean not taken off, 0.9 and more.
_FOREIGN = 0.75
# A refit on noise or on constant images is still better than none. One on inputs a hundred times too large is not: the
# model then works where it never does.
_USELESS = 2.0


def familiar(model: nn.Module, queries: Queries) -> tuple[Queries, bool]:
    """The same queries, with a note on how well they meet the running statistics, and whether anything may be fitted.

    A warning is logged if they do not meet them. Nothing is said of a model without batch norms that ran, and of fewer
    than 16 queries.
    """
    if len(queries) < _FEWEST:
        return queries, True
    with quiet(model), torch.no_grad():
        if largest_batch(next(queries.batches(2)), _MOST, model) < _FEWEST:
            return queries, True
        args, kwargs = next(queries.take(_MOST).batches(_MOST))
        found = mismatch_during(model, lambda: model(*args, **kwargs))
    if not found:
        return queries, True
    off = float(torch.stack(found).mean().sqrt())
    if not off <= _FOREIGN:  # also if it is not a number
        log.warning(
            "the queries do not look like what the model was trained on: the statistics in its batch norms are off by "
            "%.2g standard deviations (root mean square; photographs in a photo network: 0.2). Check their "
            "normalisation, the order of their axes, and whether they belong to this model.%s",
            off,
            "" if off <= _USELESS else " No layer is refitted on them, and nothing is compared.",
        )
    return replace(queries, note=f"{queries.note}; batch-norm statistics met to {off:.2g} σ"), off <= _USELESS
