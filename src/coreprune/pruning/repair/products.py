"""The repair of products of two activations (q·k): one operand makes up for the channels that both have lost (T16)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from coreprune._mapped import stored_as
from coreprune._shapes import Float, Int, Tensor
from coreprune.coreset import bilinear_map, held_out_curve
from coreprune.coreset.held_out import RIDGES
from coreprune.graph import Group
from coreprune.pruning.layer.linear_maps import Operator
from coreprune.pruning.layer.products import mixing, rows_of
from coreprune.pruning.layer.weights import Reader


@dataclass(frozen=True, eq=False)
class Mix:
    """What a layer is to compute in place of its outputs y: y mapᵀ, (o, o). error: before and after, as in `Refit`."""

    map: Float[Tensor, "o o"]
    before: float
    after: float

    def weight(self, matrix: Float[Tensor, "o f"]) -> Float[Tensor, "o f"]:
        """The layer's new weight, or its bias as one column."""
        return self.map.to(matrix.device) @ matrix


def mix_of(
    group: Group, readers: tuple[Reader, ...], kept: Int[Tensor, " k"], operators: Mapping[str, Operator]
) -> dict[str, Mix]:
    """By name of its weight, what the layer in front of a product is to compute; empty if that is not to change.

    kept: the units of the group that stay. The ridge is the best on queries that the map has not seen (T12, T13).
    """
    units = group.size // group.unit
    if group.unit != 1 or len(readers) != 1 or len(kept) == units or not readers[0].folds:
        return {}
    (reader,) = readers
    operator = operators.get(reader.partner)
    if operator is None:
        return {}
    rest = torch.ones(units, dtype=torch.bool)
    rest[kept] = False
    order = torch.cat([kept, rest.nonzero()[:, 0]])
    errors = torch.stack([held_out_curve(fold, units, order) for fold in reader.folds]).mean(dim=0)[:, len(kept)]
    best, whole = int(errors.argmin()), float((reader.covariance * reader.gram).sum()) or 1.0
    if best == len(RIDGES) - 1:
        return {}
    into = bilinear_map(reader.covariance, kept, RIDGES[best] / 2)
    found = Mix(
        mixing(rows_of(operator, group), units, into, kept), float(errors[-1]) / whole, float(errors[best]) / whole
    )
    return {reader.partner: found}


def mixed_start(
    start: Mapping[str, Tensor], mixes: Mapping[str, Mix], operators: Mapping[str, Operator]
) -> dict[str, Tensor]:
    """The tensors of the pruned model, in the original's shapes, with the new weights and biases of these layers."""
    out = dict(start)
    for name, mix in mixes.items():
        operator, weight = operators[name], start[name]
        new = operator.from_matrix(mix.weight(operator.matrix(weight)[0].double())[None], weight)
        out[name] = stored_as(weight, new)
        if operator.bias is not None:
            bias = start[operator.bias]
            out[operator.bias] = mix.weight(bias.double()[:, None])[:, 0].to(bias)
    return out
