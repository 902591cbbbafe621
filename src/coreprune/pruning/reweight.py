"""Scale the outgoing weights of kept channels, after surgery."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from coreprune.graph import Group, ParamSlice
from coreprune.pruning.plan import GroupPlan


def reweight_(model: nn.Module, groups: Iterable[Group], plans: Mapping[str, GroupPlan]) -> None:
    """V'_jk = factor_k · V_jk for every parameter axis that reads planned channels, in place.

    model: after surgery; its axes hold the kept positions in their old order. groups: of the model before. plans: what
    was really cut, by group name. One axis may read several groups (after a concatenation), so they are seen together.
    """
    axes: dict[tuple[str, int], list[tuple[ParamSlice, GroupPlan]]] = {}
    for group in groups:
        if group.name in plans:
            for piece in {(s.param, s.dim): s for c in group.consumers for s in c.slices}.values():
                axes.setdefault((piece.param, piece.dim), []).append((piece, plans[group.name]))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for (name, dim), readers in axes.items():
            if any(plan.factors or plan.negative_factors for _, plan in readers):
                weight = parameters[name]
                up, down = _factors(readers, weight, dim)
                weight.copy_(torch.where(weight >= 0, weight * up, weight * down))


def _factors(readers: list[tuple[ParamSlice, GroupPlan]], weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Factors of weights ≥ 0 and of those < 0 at every remaining position, shaped to broadcast over `weight`."""
    shape = readers[0][0].index.shape
    stays = torch.ones(shape, dtype=torch.bool)
    up, down = torch.ones(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
    for piece, plan in readers:
        kept = list(plan.kept)
        ones = (1.0,) * len(kept)
        table = torch.zeros(2, plan.size, dtype=torch.float64)
        table[0, kept] = torch.tensor(plan.factors or ones, dtype=torch.float64)
        table[1, kept] = torch.tensor(plan.negative_factors or plan.factors or ones, dtype=torch.float64)
        alive = torch.zeros(plan.size, dtype=torch.bool)
        alive[kept] = True
        mine, channel = piece.index >= 0, piece.index.clamp(min=0)
        stays &= ~mine | alive[channel]
        up = torch.where(mine, table[0, channel], up)
        down = torch.where(mine, table[1, channel], down)
    return _shaped(up, stays, weight, dim), _shaped(down, stays, weight, dim)


def _shaped(values: Tensor, stays: Tensor, weight: Tensor, dim: int) -> Tensor:
    shape = [1] * weight.ndim
    if values.ndim == 1:
        shape[dim] = -1
        return values[stays].reshape(shape).to(weight)
    # A grouped convolution: each block of axis 0 reads its own positions, the same number in every block.
    rows = torch.stack([v[s] for v, s in zip(values, stays, strict=True)])
    rows = rows.repeat_interleave(weight.shape[0] // rows.shape[0], dim=0)
    shape[0], shape[dim] = rows.shape
    return rows.reshape(shape).to(weight)
