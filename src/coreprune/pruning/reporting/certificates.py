"""Certificates for the layers of a pruned model: T6, T7, T8, T10."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from coreprune.coreset import (
    Certificate,
    Coreset,
    function_space_ratio,
    merge_bound,
    relative_limit,
    sampling_bound,
)
from coreprune.graph import Captured, Removed, Traced
from coreprune.pruning.allocation.curves import widths_curve
from coreprune.pruning.layer.linear_maps import Operator
from coreprune.pruning.layer.read import plain_linear, read_layer, tensors_of
from coreprune.pruning.layer.weights import LayerWeights
from coreprune.pruning.plans.decide import Decision
from coreprune.pruning.reporting.report import GroupReport
from coreprune.pruning.selectors import Ranking

log = logging.getLogger(__name__)

_QUICK = 200_000_000  # multiplications of a singular value decomposition that a report may always have


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
    small = tensors_of(removed.model)
    after = _Embedded(traced.tensors, small, removed.masks)
    return Embedded(traced.tensors, after, removed.masks, operators)


class _Embedded(Mapping[str, Tensor]):
    """Tensors in the original's shapes, each made when it is asked for: all of them are as much as the model."""

    def __init__(
        self,
        before: Mapping[str, Tensor],
        small: Mapping[str, Tensor],
        masks: Mapping[tuple[str, int], Tensor],
    ) -> None:
        self._before, self._small, self._masks = before, small, masks

    def __getitem__(self, name: str) -> Tensor:
        """One tensor."""
        before, small = self._before[name], self._small[name]
        cuts = {dim: mask for (param, dim), mask in self._masks.items() if param == name}
        if any(mask.dim() > 1 for mask in cuts.values()):
            return before
        if not cuts:
            return small
        out = torch.zeros_like(before)
        axes = [cuts.get(d, torch.ones(n, dtype=torch.bool)).nonzero()[:, 0] for d, n in enumerate(before.shape)]
        out[torch.meshgrid(*axes, indexing="ij")] = small
        return out

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        return iter(self._small)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._small)


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
        if decision.ranking.stream is not None or _quick(layer.incoming):  # what T7 is about: coresets that are drawn
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


def _quick(points: Tensor) -> bool:
    n, d = points.shape
    return n * d * min(n, d) <= _QUICK


def memorised(seen: float, unseen: float, constant: float) -> bool:
    """Whether a refit is far better on the queries than on others: by a factor of 3, and 5 % of a constant's."""
    return unseen > 3 * seen and unseen - seen > 0.05 * constant


def _first(order: Tensor, coreset: Coreset, units: int) -> bool:
    """Whether the coreset keeps the first units of an order."""
    return order[:units].sort().values.tolist() == coreset.indices.sort().values.tolist()


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
