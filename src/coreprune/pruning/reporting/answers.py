"""What counts as a model's answer to one input: the class with the highest score, or the next token of a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune._batch import usual
from coreprune._twin import quiet
from coreprune.pruning.calibration.padding import Ends, ends_in
from coreprune.queries import Queries, Target
from coreprune.queries.leaves import drawable
from coreprune.queries.sources.tokens import is_causal

_FEW = 8  # queries that run together to see where there is padding
Scores = Callable[[Any, Tensor], Tensor | None]  # from the inputs (args, kwargs) and a model's first output to scores


def scores(model: nn.Module, queries: Queries) -> Scores:
    """How to read scores (N, classes) from what a model returns for some of the queries; None if it gives none.

    A causal language model gives logits (N, T, V). Its scores are those of the token that follows a whole input, behind
    the last token that the attention mask leaves, or that is not padding, so that every query has one answer.
    """
    found: list[tuple[Target, Ends] | None] = []

    def read(inputs: Any, output: Tensor) -> Tensor | None:
        if output.dim() == 2 and output.shape[1] > 1:
            return output
        if output.dim() != 3 or queries.whole:
            return None
        if not found:
            found.append(_written(model, queries))
        if found[0] is None:
            return None
        target, ends = found[0]
        rows = torch.arange(len(output), device=output.device)
        padding = ends.of(inputs).tokens
        if target.mask is not None:
            left = pytree.tree_leaves(inputs)[target.mask] != 0
        elif padding is not None:
            left = ~padding
        else:
            return output[rows, -1]
        places = torch.arange(left.shape[1], device=left.device)
        return output[rows, (left * places).argmax(dim=1)]

    return read


def _written(model: nn.Module, queries: Queries) -> tuple[Target, Ends] | None:
    """The tokens of which the model predicts the next one, and where there is padding; None if it is no causal language
    model."""
    args, kwargs = next(queries.batches(1))
    axes = queries.axes or usual((args, kwargs))
    if not axes.first:
        return None
    with quiet(model) as still:
        targets = (Target(still, args, kwargs, place, axes) for place in drawable(args, kwargs, axes))
        target = next((target for target in targets if target.kind == "tokens" and is_causal(target)), None)
        if target is None:
            return None
        return target, ends_in(still, queries.batches(_FEW), axes)
