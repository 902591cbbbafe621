"""Scale the outgoing weights of kept channels, after surgery."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coreprune.graph import Group, ParamSlice
from coreprune.pruning.plan import GroupPlan


def reweight_(model: nn.Module, group: Group, plan: GroupPlan) -> None:
    """V'_jk = factor_k · V_jk for every parameter that reads the group's channels, in place.

    model: after surgery; its axes hold the kept positions in their old order.
    """
    if plan.factors is None and plan.negative_factors is None:
        return
    ones = (1.0,) * len(plan.kept)
    positive = torch.ones(group.size, dtype=torch.float64)
    negative = positive.clone()
    positive[list(plan.kept)] = torch.tensor(plan.factors or ones, dtype=torch.float64)
    negative[list(plan.kept)] = torch.tensor(plan.negative_factors or plan.factors or ones, dtype=torch.float64)
    kept = torch.zeros(group.size, dtype=torch.bool)
    kept[list(plan.kept)] = True
    parameters = dict(model.named_parameters(remove_duplicate=False))
    slices = {(s.param, s.dim): s for consumer in group.consumers for s in consumer.slices}
    with torch.no_grad():
        for piece in slices.values():
            weight = parameters[piece.param]
            up, down = (_along(piece, factors, kept, weight) for factors in (positive, negative))
            weight.copy_(torch.where(weight >= 0, weight * up, weight * down))


def _along(piece: ParamSlice, factors: Tensor, kept: Tensor, weight: Tensor) -> Tensor:
    """The factor at every remaining position of the axis, shaped to broadcast over the weight."""
    index = piece.index
    stays = torch.where(index >= 0, kept[index.clamp(min=0)], torch.tensor(True))
    values = torch.where(index >= 0, factors[index.clamp(min=0)], 1.0)
    if index.ndim == 2:  # a grouped convolution: each block of axis 0 has its own positions
        rows = torch.stack([v[s] for v, s in zip(values, stays, strict=True)])
        rows = rows.repeat_interleave(weight.shape[0] // rows.shape[0], dim=0)
        shape = [rows.shape[0]] + [1] * (weight.ndim - 1)
        shape[piece.dim] = rows.shape[1]
        return rows.reshape(shape).to(weight)
    shape = [1] * weight.ndim
    shape[piece.dim] = -1
    return values[stays].reshape(shape).to(weight)
