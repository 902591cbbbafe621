"""What counts as a model's answer to one input: the class with the highest score, or the next token of a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune._batch import usual
from coreprune._twin import quiet
from coreprune.queries import Queries, Target
from coreprune.queries.leaves import drawable
from coreprune.queries.sources.tokens import is_causal

Scores = Callable[[Any, Tensor], Tensor | None]  # from the inputs (args, kwargs) and a model's first output to scores


def scores(model: nn.Module, queries: Queries) -> Scores:
    """How to read scores (N, classes) from what a model returns for some of the queries; None if it gives none.

    A causal language model gives logits (N, T, V). Its scores are those of the token that follows a whole input, behind
    the last token that the attention mask leaves, so that every query has one answer.
    """
    found: list[Target | None] = []

    def read(inputs: Any, output: Tensor) -> Tensor | None:
        if output.dim() == 2 and output.shape[1] > 1:
            return output
        if output.dim() != 3 or queries.whole:
            return None
        if not found:
            found.append(_written(model, queries))
        target = found[0]
        if target is None:
            return None
        rows = torch.arange(len(output), device=output.device)
        if target.mask is None:
            return output[rows, -1]
        mask = pytree.tree_leaves(inputs)[target.mask] != 0
        places = torch.arange(mask.shape[1], device=mask.device)
        return output[rows, (mask * places).argmax(dim=1)]

    return read


def _written(model: nn.Module, queries: Queries) -> Target | None:
    """The tokens of which the model predicts the next one, or None if it is no causal language model."""
    args, kwargs = next(queries.batches(1))
    axes = queries.axes or usual((args, kwargs))
    if not axes.first:
        return None
    with quiet(model) as still:
        targets = (Target(still, args, kwargs, place, axes) for place in drawable(args, kwargs, axes))
        return next((target for target in targets if target.kind == "tokens" and is_causal(target)), None)
