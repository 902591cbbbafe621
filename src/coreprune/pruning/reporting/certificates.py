"""Certificates of a pruned model: for its layers (T6, T7, T8, T10), and for its answers (T11, T18)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coreprune._batch import BatchAxes, usual
from coreprune._example import first_tensor, largest_batch, reals
from coreprune._seed import check_seed
from coreprune._twin import quiet
from coreprune.coreset import (
    Certificate,
    Coreset,
    agreement_bound,
    function_space_ratio,
    merge_bound,
    relative_limit,
    sampling_bound,
)
from coreprune.errors import InputError, first_line
from coreprune.graph import Captured, Removed, Traced
from coreprune.pruning.allocation.curves import widths_curve
from coreprune.pruning.layer.linear_maps import Operator
from coreprune.pruning.layer.read import plain_linear, read_layer, tensors_of
from coreprune.pruning.layer.weights import LayerWeights
from coreprune.pruning.plans.decide import Decision
from coreprune.pruning.reporting.answers import scores
from coreprune.pruning.reporting.report import GroupReport
from coreprune.pruning.selectors import Ranking
from coreprune.queries import Queries, make_queries
from coreprune.risk import interval, upper_bound

log = logging.getLogger(__name__)

_BATCH = 32  # samples that are run together


@dataclass(frozen=True, eq=False)
class Embedded:
    """The pruned model in the original's shapes, with zeros in place of the removed channels.

    before, after: tensors of the original and of the pruned model, by name. masks: which positions stay.
    operators: the linear maps of the graph, by the name of their weight.
    """

    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    masks: Mapping[tuple[str, int], Tensor]
    operators: Mapping[str, Operator]


def embedded(traced: Traced, removed: Removed, operators: Mapping[str, Operator]) -> Embedded:
    """The tensors of the pruned model after repair and distillation, in the original's shapes.

    Tensors of grouped convolutions whose sections are cut differently keep the original's values; no theorem uses them.
    """
    before, after = traced.tensors, {}
    for name, tensor in tensors_of(removed.model).items():
        cuts = {dim: mask for (param, dim), mask in removed.masks.items() if param == name}
        after[name] = before[name]
        if all(mask.dim() == 1 for mask in cuts.values()):
            axes = [
                cuts.get(d, torch.ones(n, dtype=torch.bool)).nonzero()[:, 0] for d, n in enumerate(before[name].shape)
            ]
            after[name] = torch.zeros_like(before[name])
            after[name][torch.meshgrid(*axes, indexing="ij") if axes else ...] = tensor
    return Embedded(before, after, removed.masks, operators)


def group_report(traced: Traced, decision: Decision, change: Embedded | None, delta: float) -> GroupReport:
    """The report on one free group: its size before and after, and what is known about the error at its consumers.

    change: the weights after repair and distillation, or None if there was neither.
    """
    group, entry, coreset = decision.group, decision.entry, decision.coreset
    assert entry is not None  # widths have been allocated
    assert coreset is not None
    found: tuple[Certificate, ...] = ()
    rank = None
    if plain_linear(traced.captured, group):
        layer = read_layer(traced.tensors, traced.captured, group)
        rank = relative_limit(layer.incoming).rank
        if change is not None:
            found = of_new_weights(traced.captured, layer, decision, change)
        else:
            found = of_coreset(layer, decision.ranking, coreset, delta)
    errors = held_out = None
    units = len(entry.kept) // group.unit
    # The curve belongs to the ranking's order. Clusters (folding) do not keep the first units of that order.
    if (curve := decision.curve) is not None and _first(curve.order, coreset, units):
        unseen = decision.held_out
        at = None if unseen is None else float(unseen[units])
        found += (function_space_ratio(curve.errors, curve.optimum, units, held_out=at, estimated=decision.estimated),)
        errors = tuple(widths_curve(curve.errors, group).tolist())
        held_out = None if unseen is None else tuple(widths_curve(unseen, group).tolist())
        if at is not None and memorised(float(curve.errors[units]), at, float(curve.errors[0])):
            log.warning(
                "%s: refitted on %d of %d units, the weighed error is %.2g of that of constant outputs on the queries, "
                "but %.2g on queries that the refit has not seen. More queries would help here.",
                *(group.name, units, group.size // group.unit),
                *(float(x / curve.errors[0]) for x in (curve.errors[units], unseen[units])),  # type: ignore[index]
            )
    return GroupReport(
        name=group.name,
        channels=group.size,
        kept=len(entry.kept),
        unit=group.unit,
        note=decision.ranking.note,
        certificates=found,
        rank=rank,
        errors=errors,
        held_out=held_out,
    )


def memorised(seen: float, unseen: float, constant: float) -> bool:
    """Whether a refit is far better on the queries than on others: by a factor of 3, and 5 % of a constant's."""
    return unseen > 3 * seen and unseen - seen > 0.05 * constant


def _first(order: Tensor, coreset: Coreset, units: int) -> bool:
    """Whether the coreset keeps the first units of an order."""
    return order[:units].sort().values.tolist() == coreset.indices.sort().values.tolist()


def certify(
    model: nn.Module,
    pruned: nn.Module,
    example_inputs: Any,
    samples: Any,
    *,
    n: int | None = None,
    delta: float = 0.01,
    seed: int = 0,
    batch_axis: Any = "auto",
    loss: Callable[[Any, Any], Tensor] | None = None,
    tokenizer: Any = None,
) -> Certificate:
    """T11: a lower bound on how often two models give the same answer, for the distribution of the samples.

    With `loss`, T18 instead: an upper bound on the expected loss, and an interval for it.

    samples: unlabelled samples that neither selection nor repair has seen (a tensor, a DataLoader, the path of an .npz
        file, `Queries`), or a source of queries. n: how many of them; all by default. seed: for a source. It makes
        other inputs here than in `prune`, whichever seed `prune` got. batch_axis, tokenizer: as for `prune`.
    loss: loss(output of the model, output of the pruned one) for a batch of samples: one number in [0, 1] for each, or
        a bool, with which the bound is exact. Examples are another answer among the top five, or (1 − cosine)/2 of two
        embeddings. It must be fixed before the samples are looked at.

    The answer is the class with the highest score (N, classes), or the next token of a causal language model. Raises
    InputError if the samples do not fit, if they are no independent draws (`batch-norm-inversion`), or if the models
    return no such scores; with `loss`, if that does not return losses.
    """
    # prune() seeds its generator with the seed itself. If this did too, a source would make the same inputs that
    # pruning used, but T11 needs inputs that nothing has seen. So the seed is hashed here. The hash equals a given seed
    # of prune() with probability 2⁻³² (torch's generator takes 32 bits). The key may be any number; 11 is for T11.
    (other,) = np.random.SeedSequence(check_seed(seed), spawn_key=(11,)).generate_state(1).tolist()
    fresh = make_queries(model, example_inputs, samples, n=n, seed=other, batch_axis=batch_axis, tokenizer=tokenizer)
    if reason := no_draws(fresh):
        raise InputError(f"{reason} Pass samples, or a source that draws each input alone, such as leaves.")
    if loss is not None and not callable(loss):
        raise InputError(f"loss must be a function of two outputs, not {loss!r}.")
    if loss is not None:
        return expected_loss(model, pruned, fresh, loss, delta)
    found = agreement(model, pruned, fresh, delta)
    if found is None:
        raise InputError(
            "agreement is about the class with the highest score, or about the next token, but the models return "
            "neither scores of shape (samples, classes) nor those of a causal language model. Compare their outputs in "
            "a way that fits the task."
        )
    return found


def no_draws(fresh: Queries) -> str:
    """Why T11 cannot be stated on some queries, in a sentence; empty if it can."""
    if not fresh.jointly:
        return ""
    return (
        f"The agreement is not certified (T11): queries from {fresh.source} are optimised together, so they are no "
        "independent draws."
    )


@torch.no_grad()
def agreement(
    model: nn.Module, small: nn.Module, fresh: Queries, delta: float, candidates: int = 1
) -> Certificate | None:
    """T11 on queries that nothing else has used, about the class, or about the next token of a causal language model.

    None unless the models return such scores and the queries are independent draws.

    candidates: among how many models the small one was chosen with the same queries.
    """
    if fresh.jointly:
        return None
    same = total = 0
    answers: list[Tensor] = []
    read = scores(model, fresh)
    with quiet(model) as full, quiet(small) as left:
        batch = largest_batch(next(fresh.batches(2)), _BATCH, full, left)
        for args, kwargs in fresh.batches(batch):
            axes = fresh.axes or usual((args, kwargs))
            size = axes.size((args, kwargs))
            outputs = (_outcome(m(*args, **kwargs), axes, size) for m in (full, left))
            before, after = (None if x is None else read((args, kwargs), x) for x in outputs)
            if before is None or after is None:
                return None
            chosen = before.argmax(dim=1)
            answers.append(chosen)
            same += int((chosen == after.argmax(dim=1)).sum())
            total += len(before)
    commonest = int(torch.cat(answers).bincount().max())
    source = "the user's data" if fresh.source == "samples" else fresh.source
    return agreement_bound(
        total - same, total, delta, trivial=1 - commonest / total, source=source, candidates=candidates
    )


@torch.no_grad()
def expected_loss(
    model: nn.Module, small: nn.Module, fresh: Queries, loss: Callable[[Any, Any], Tensor], delta: float
) -> Certificate:
    """T18 on queries that nothing else has used. loss: as for `certify`."""
    parts: list[Tensor] = []
    with quiet(model) as full, quiet(small) as left:
        batch = largest_batch(next(fresh.batches(2)), _BATCH, full, left)
        for args, kwargs in fresh.batches(batch):
            size = (fresh.axes or usual((args, kwargs))).size((args, kwargs))
            outputs = full(*args, **kwargs), left(*args, **kwargs)
            try:
                found = loss(*outputs)
            except Exception as error:  # the caller's own code
                raise InputError(f"loss fails on the outputs of a batch of {size} ({first_line(error)}).") from error
            if not isinstance(found, Tensor) or found.shape != (size,):
                what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise InputError(f"loss must return one number per sample, a tensor of shape ({size},), not {what}.")
            if not (found.dtype is torch.bool or found.is_floating_point()):
                raise InputError(f"loss must return bool or real numbers in [0, 1], not {found.dtype}.")
            parts.append(found.detach().cpu())
    losses = torch.cat(parts)
    bound, both = upper_bound(losses, delta), interval(losses, delta)
    source = "the user's data" if fresh.source == "samples" else fresh.source
    safe = math.ceil(bound * 1e6) / 1e6
    return Certificate(
        theorem="T18",
        kind="sampled",
        bound=bound,
        trivial=1.0,
        statement=(
            f"on queries from {source} the expected loss is at most {safe:.6f} (mean of {both.n}: {both.mean:.6f}); "
            f"as another statement of the same confidence, it lies between {both.low:.6f} and {both.high:.6f}"
        ),
        assumptions=(
            f"the {len(losses)} queries are independent draws from {source}",
            "none of them was used to make either network or to choose it, or to choose the loss",
        ),
        delta=delta,
        interval=(both.low, both.high),
    )


def _outcome(output: Any, axes: BatchAxes, size: int) -> Tensor | None:
    """The first real tensor of an output, with the samples along axis 0."""
    return first_tensor(output) if axes.first else next(iter(axes.rows(reals(output), size)), None)


def of_new_weights(
    captured: Captured, layer: LayerWeights, decision: Decision, change: Embedded
) -> tuple[Certificate, ...]:
    """T8 for refit weights, also of the layers that make the channels. Empty if the activation does not allow T8."""
    group, phi = decision.group, layer.activation
    if not (phi.zero and phi.homogeneous and phi.lipschitz <= 1) or decision.entry is None:
        return ()
    kept = torch.tensor(decision.entry.kept)
    now = read_layer(change.after, captured, group)
    biases, stays = [], []
    for piece in (s for c in group.consumers for s in c.slices):
        operator = change.operators.get(piece.param)
        if operator is None:
            return ()
        rows = change.after[piece.param].shape[operator.out_dim]
        name = operator.bias
        zero = torch.zeros(rows, dtype=torch.float64)
        biases.append(zero if name is None else (change.after[name] - change.before[name]).double().cpu())
        stays.append(change.masks.get((piece.param, operator.out_dim), torch.ones(rows, dtype=torch.bool)).cpu())
    alive = torch.cat(stays)
    return (
        merge_bound(
            layer.incoming,
            layer.outgoing[alive],
            kept,
            now.outgoing[alive][:, kept],
            new_points=now.incoming[kept],
            bias_change=torch.cat(biases)[alive],
        ),
    )


def of_coreset(layer: LayerWeights, ranking: Ranking, coreset: Coreset, delta: float) -> tuple[Certificate, ...]:
    """Bounds on F' − F of this layer's consumers, for every input.

    T6 is for sampled coresets (with probability 1−δ over the draws). T8 is for any coreset if the activation is
    positively homogeneous and 1-Lipschitz. Empty if the activation is not known to satisfy a theorem's assumptions.
    """
    phi = layer.activation
    found = []
    if not phi.zero or math.isinf(phi.lipschitz):
        return ()
    if ranking.stream is not None and coreset.draws:
        points, outgoing = layer.incoming, layer.outgoing
        if coreset.negative_weights is not None:  # two items per channel, one per sign of its outgoing weights
            points = torch.cat([points, points])
            outgoing = torch.cat([outgoing.clamp(min=0), outgoing.clamp(max=0)], dim=1)
        bound = sampling_bound(
            points,
            outgoing,
            coreset.draws,
            delta,
            metric="lewis" if ranking.method == "lewis" else "euclidean",
            probabilities=None if ranking.method == "lewis" else ranking.stream.probabilities,
            lipschitz=phi.lipschitz,
            homogeneous=phi.homogeneous,
            stopped=True,
        )
        found.append(bound)
    if phi.homogeneous and phi.lipschitz <= 1:
        found.append(merge_bound(layer.incoming, layer.outgoing, coreset))
    return tuple(found)
