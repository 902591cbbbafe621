"""What counts as a model's answer to one input: the class with the highest score, or the next token of a text."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune._batch import usual
from coreprune._twin import quiet
from coreprune.pruning.calibration.padding import Ends, ends_on
from coreprune.queries import Queries, Target
from coreprune.queries.leaves import drawable
from coreprune.queries.sources.tokens import is_causal

Scores = Callable[[Any, Tensor], Tensor | None]  # from the inputs (args, kwargs) and a model's first output to scores


def scores(model: nn.Module, queries: Queries) -> Scores:
    """How to read scores (N, classes) from what a model returns for some of the queries; None if it gives none.

    A causal language model gives logits (N, T, V). Its scores are those of the token that follows a whole input, behind
    the last token that the attention mask leaves, or that is not padding, so that every query has one answer. Where
    (N, T) is a score for every token, such as where an answer starts, padding is no answer.
    """
    padded, written = cache(lambda: _padded(model, queries)), cache(lambda: _written(model, queries))

    def read(inputs: Any, output: Tensor) -> Tensor | None:
        if output.dim() == 2 and output.shape[1] > 1:
            pads = padded().of(inputs).places(output)
            return output if pads is None else output.masked_fill(pads.to(output.device), -torch.inf)
        if output.dim() != 3 or queries.whole or (target := written()) is None:
            return None
        rows = torch.arange(len(output), device=output.device)
        padding = padded().of(inputs).tokens
        if target.mask is not None:
            left = pytree.tree_leaves(inputs)[target.mask] != 0
        elif padding is not None:
            left = ~padding
        else:
            return output[rows, -1]
        places = torch.arange(left.shape[1], device=left.device)
        return output[rows, (left * places).argmax(dim=1)]

    return read


def _padded(model: nn.Module, queries: Queries) -> Ends:
    """Where the queries have padding."""
    with quiet(model) as still:
        return ends_on(still, queries)


def _written(model: nn.Module, queries: Queries) -> Target | None:
    """The tokens of which the model predicts the next one, or None if it is no causal language model."""
    args, kwargs = next(queries.batches(1))
    axes = queries.axes or usual((args, kwargs))
    if not axes.first:
        return None
    with quiet(model) as still:
        targets = (Target(still, args, kwargs, place, axes) for place in drawable(args, kwargs, axes))
        return next((target for target in targets if target.kind == "tokens" and is_causal(target)), None)
