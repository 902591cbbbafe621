"""Certificates for the answers of a pruned model, from samples that nothing else has used: T11 and T18."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from coreprune._seed import seed_apart
from coreprune._telling import Wanted
from coreprune.coreset import Certificate, agreement_bound
from coreprune.errors import InputError
from coreprune.pruning.allocation.budget import Loss
from coreprune.pruning.reporting.losses import NO_ANSWER, answers, losses, takes_labels
from coreprune.queries import Queries, make_queries
from coreprune.risk import interval, upper_bound


def certify(
    model: nn.Module,
    pruned: nn.Module,
    example_inputs: Any,
    samples: Any,
    *,
    n: int | None = None,
    delta: float = 0.01,
    seed: int = 0,
    progress: Wanted = None,
    batch_axis: Any = "auto",
    loss: Loss | None = None,
    paired: bool = False,
    tokenizer: Any = None,
) -> Certificate:
    """T11: a lower bound on how often two models give the same answer, for the distribution of the samples.

    With `loss`, T18 instead: an upper bound on the expected loss, and an interval for it.

    samples: samples that neither selection nor repair has seen (a tensor, a DataLoader, the path of an .npz file,
        `Queries`), or a source of queries. n: how many of them; all by default. seed: for a source. It makes other
        inputs here than in `prune`, whichever seed `prune` got. progress, batch_axis, tokenizer: as for `prune`.
    loss: loss(output of the model, output of the pruned one) for a batch of samples: one number in [0, 1] for each, or
        a bool, with which the bound is exact. Examples are another answer among the top five, or (1 − cosine)/2 of two
        embeddings. A function of three arguments gets the samples' labels as the third: with
        `lambda dense, small, labels: small.argmax(1) != labels` the statement is about the pruned model's errors. It
        must be fixed before the samples are looked at.
    paired: the loss is one of a single model, loss(output) or loss(output, labels), and the statement is about the
        difference that pruning makes to it, in [−1, 1], sample by sample: how many more errors, at most and at least.

    The answer is the class with the highest score (N, classes), or the next token of a causal language model. Raises
    InputError if the samples do not fit, if they are no independent draws (`batch-norm-inversion`), or if the models
    return no such scores; with `loss`, if that does not return losses or wants labels that the samples do not have.
    """
    other = seed_apart(seed, 11)
    if loss is not None and not callable(loss):
        raise InputError(f"loss must be a function of two outputs, not {loss!r}.")
    if paired and loss is None:
        raise InputError("paired=True needs a loss of one model: loss(output) or loss(output, labels).")
    more: dict[str, Any] = {"progress": progress, "batch_axis": batch_axis, "tokenizer": tokenizer}
    fresh = make_queries(model, example_inputs, samples, n=n, seed=other, **more)
    if reason := no_draws(fresh):
        raise InputError(f"{reason} Pass samples, or a source that draws each input alone, such as leaves.")
    if loss is not None:
        return _expected(model, pruned, fresh, loss, delta, paired)
    found = agreement(model, pruned, fresh, delta)
    if found is None:
        raise InputError(f"{NO_ANSWER} Compare their outputs in a way that fits the task: certify(loss=function).")
    return found


def no_draws(fresh: Queries) -> str:
    """Why T11 cannot be stated on some queries, in a sentence; empty if it can."""
    if not fresh.jointly:
        return ""
    return (
        f"The agreement is not certified (T11): queries from {fresh.source} are optimised together, so they are no "
        "independent draws."
    )


def source_of(fresh: Queries) -> str:
    """What a statement on some queries is about, in words."""
    return "the user's data" if fresh.source == "samples" else fresh.source


def agreement(
    model: nn.Module, small: nn.Module, fresh: Queries, delta: float, candidates: int = 1
) -> Certificate | None:
    """T11 on queries that nothing else has used, about the class, or about the next token of a causal language model.

    None unless the models return such scores and the queries are independent draws.

    candidates: among how many models the small one was chosen with the same queries.
    """
    found = None if fresh.jointly else answers(model, small, fresh)
    if found is None:
        return None
    before, after = found
    total, commonest = len(before), int(before.bincount().max())
    return agreement_bound(
        int((before != after).sum()),
        total,
        delta,
        trivial=1 - commonest / total,
        source=source_of(fresh),
        candidates=candidates,
    )


def _expected(
    model: nn.Module, small: nn.Module, fresh: Queries, loss: Loss, delta: float, paired: bool
) -> Certificate:
    """T18 on queries that nothing else has used. loss, paired: as for `certify`."""
    if paired:
        alone = loss
        # As a loss in [0, 1], which the bounds are for: D ↦ (1 + D)/2.
        if takes_labels(alone, 2):
            loss = lambda x, y, labels: (1 + alone(y, labels).double() - alone(x, labels).double()) / 2  # noqa: E731
        else:
            loss = lambda x, y: (1 + alone(y).double() - alone(x).double()) / 2  # noqa: E731
    found = losses(model, small, fresh, loss)
    bound, both = upper_bound(found, delta), interval(found, delta)
    mean, low, high = both.mean, both.low, both.high
    if paired:
        bound, mean, low, high = (2 * x - 1 for x in (bound, mean, low, high))
    source = source_of(fresh)
    safe = math.ceil(bound * 1e6) / 1e6
    what = "pruning raises the expected loss by" if paired else "the expected loss is"
    return Certificate(
        theorem="T18",
        kind="sampled",
        bound=bound,
        trivial=1.0,
        statement=(
            f"on queries from {source} {what} at most {safe:.6f} (mean of {both.n}: {mean:.6f}); "
            f"as another statement of the same confidence, it lies between {low:.6f} and {high:.6f}"
        ),
        assumptions=(
            f"the {len(found)} queries are independent draws from {source}",
            "none of them was used to make either network or to choose it, or to choose the loss",
        ),
        delta=delta,
        interval=(low, high),
    )
