"""Whether the user's samples look like what the model saw in training, as its batch norms remember it."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import nn

from coreprune._example import largest_batch
from coreprune._single import answering
from coreprune.queries import Queries
from coreprune.queries.sources.norm_statistics import mismatch_during, sigma

log = logging.getLogger(__name__)

_FEWEST, _MOST = 16, 32  # queries; with fewer, means and variances are too uncertain, and with more, memory is
# In standard deviations. On EfficientNet-Lite0 photographs are 0.14 off (32 of them), dead leaves 0.31, constant images
# and white noise 0.6 to 0.7, and photographs with the pixels 0 to 255, or with the mean not taken off, 0.65 and more.
_FOREIGN = 0.5
# A refit on noise or on constant images is still better than none. One on inputs a hundred times too large is not: the
# model then works where it never does.
_USELESS = 1.5


def familiar(model: nn.Module, queries: Queries) -> tuple[Queries, bool]:
    """The same queries, with a note on how well they meet the running statistics, and whether anything may be fitted.

    A warning is logged if they do not meet them. Nothing is said of a model without batch norms that ran, of one that
    takes one query at a time, and of fewer than 16 queries.
    """
    if len(queries) < _FEWEST or queries.whole:
        return queries, True
    with answering(model) as still:
        if largest_batch(next(queries.batches(2)), _MOST, still) < _FEWEST:
            return queries, True
        args, kwargs = next(queries.take(_MOST).batches(_MOST))
        found = mismatch_during(still, lambda: still(*args, **kwargs))
    if not found:
        return queries, True
    off = sigma(torch.stack(found))
    if not off <= _FOREIGN:  # also if it is not a number
        log.warning(
            "the queries do not look like what the model was trained on: the statistics in its batch norms are off by "
            "%.2g standard deviations (root mean square; photographs in a photo network: 0.1 to 0.2). Check their "
            "normalisation, the order of their axes, and whether they belong to this model.%s",
            off,
            "" if off <= _USELESS else " No layer is refitted on them, and nothing is compared.",
        )
    return replace(queries, note=f"{queries.note}; batch-norm statistics met to {off:.2g} σ"), off <= _USELESS
