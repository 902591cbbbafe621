"""The loss of a pruned model on every one of some queries: another answer than the dense model's, or the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from coreprune._batch import BatchAxes, usual
from coreprune._example import first_tensor, largest_batch, reals
from coreprune._shapes import Bool, Num
from coreprune._single import answering
from coreprune.errors import InputError, first_line
from coreprune.pruning.allocation.budget import Loss
from coreprune.pruning.reporting.answers import scores
from coreprune.queries import Queries

_BATCH = 32  # samples that are run together
NO_ANSWER = (
    "agreement is about the class with the highest score, or about the next token, but the models return neither "
    "scores of shape (samples, classes) nor those of a causal language model."
)


@torch.no_grad()
def answers(model: nn.Module, small: nn.Module, queries: Queries) -> tuple[Tensor, Tensor] | None:
    """The answers of both models to all queries, (n,) int64 each; None if the models give none."""
    found: list[tuple[Tensor, Tensor]] = []
    read = scores(model, queries)
    for inputs, axes, size, outputs in _both(model, small, queries):
        first = (_outcome(output, axes, size) for output in outputs)
        before, after = (None if x is None else read(inputs, x) for x in first)
        if before is None or after is None:
            return None
        found.append((before.argmax(dim=1).cpu(), after.argmax(dim=1).cpu()))
    before, after = zip(*found, strict=True)
    return torch.cat(before), torch.cat(after)


def other_answers(model: nn.Module, small: nn.Module, queries: Queries) -> Bool[Tensor, " n"]:
    """Which queries get another answer from the pruned model. Raises InputError if the models give no answers."""
    found = answers(model, small, queries)
    if found is None:
        raise InputError(f"{NO_ANSWER} Say what counts: Budget(metric=function, loss=0.01).")
    return found[0] != found[1]


@torch.no_grad()
def losses(model: nn.Module, small: nn.Module, queries: Queries, loss: Loss) -> Bool[Tensor, " n"] | Num[Tensor, " n"]:
    """The user's loss on every query, bool or real. Raises InputError if it fails or returns something else."""
    labelled = takes_labels(loss)
    if labelled and queries.labels is None:
        raise InputError(
            "the loss takes labels as its third argument, but the samples have none. Pass (inputs, labels), a loader "
            "of such pairs, or an .npz file with an array called labels."
        )
    parts: list[Tensor] = []
    at = 0
    for _, _, size, outputs in _both(model, small, queries):
        labels = () if queries.labels is None or not labelled else (queries.labels[at : at + size],)
        at += size
        try:
            found = loss(*outputs, *labels)
        except Exception as error:  # the caller's own code
            raise InputError(f"the loss fails on the outputs of a batch of {size} ({first_line(error)}).") from error
        if not isinstance(found, Tensor) or found.shape != (size,):
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"the loss must return one number per sample, a tensor of shape ({size},), not {what}.")
        if not (found.dtype is torch.bool or found.is_floating_point()):
            raise InputError(f"the loss must return bool or real numbers in [0, 1], not {found.dtype}.")
        parts.append(found.detach().cpu())
    return torch.cat(parts)


def takes_labels(loss: Loss, arguments: int = 3) -> bool:
    """Whether a loss needs as many arguments as there are with the labels."""
    try:
        wanted = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError):  # some functions written in C do not say
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in wanted) == arguments


def _both(
    model: nn.Module, small: nn.Module, queries: Queries
) -> Iterator[tuple[Any, BatchAxes, int, tuple[Any, Any]]]:
    """Run both models on the queries in batches: (inputs, their axes, samples, outputs)."""
    with answering(model) as full, answering(small) as left:
        batch = largest_batch(next(queries.batches(2)), _BATCH, full, left)
        for args, kwargs in queries.batches(batch):
            axes = queries.axes or usual((args, kwargs))
            outputs = full(*args, **kwargs), left(*args, **kwargs)
            yield (args, kwargs), axes, axes.size((args, kwargs)), outputs


def _outcome(output: Any, axes: BatchAxes, size: int) -> Tensor | None:
    """The first real tensor of an output, with the samples along axis 0."""
    return first_tensor(output) if axes.first else next(iter(axes.rows(reals(output), size)), None)
