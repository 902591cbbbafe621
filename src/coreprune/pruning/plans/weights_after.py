"""The weights after pruning: outgoing weights of kept channels are scaled, removed channels merged into kept ones.

Everything is computed in the shapes of the original model, where the removed channels still exist, and then cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from coreprune._mapped import is_mapped, stored_as, write_
from coreprune.errors import InputError
from coreprune.graph import Group, ParamSlice, Traced, cut
from coreprune.pruning.plans.plan import GroupPlan

_Step = Callable[[Tensor], Tensor]


def weights_after(traced: Traced, plans: Mapping[str, GroupPlan]) -> dict[str, Tensor]:
    """Every parameter and buffer with its values after pruning, but still in the original's shapes.

    On every parameter axis that reads channels of a plan, V'_jk = factor_k V_jk + Σ_{i→k} scale_i V_ji, and 0 for
    removed channels. So a copy of the original with these tensors computes what the pruned model computes. If the plan
    takes means, the rows that make a kept channel, and its entries in norms, are means over what goes into it.

    traced: the original, which is not changed; only the groups that `plans` names matter. Returns the tensors by
    canonical name; those that no plan changes are the model's own.

    Raises InputError if a plan merges channels of a group that cannot be merged (`layout`).
    """
    steps: dict[str, list[_Step]] = {}
    for group in traced.groups:
        if (plan := plans.get(group.name)) is None:
            continue
        for piece in {(s.param, s.dim): s for c in group.consumers for s in c.slices}.values():
            steps.setdefault(piece.param, []).append(partial(_read, piece=piece, group=group, plan=plan))
        for piece in (*group.producers, *group.others) if plan.mean else ():
            steps.setdefault(piece.param, []).append(partial(_averaged, piece=piece, group=group, plan=plan))
    tensors = dict(traced.tensors)
    for name, work in steps.items():
        value = tensors[name].to(torch.float64)
        for step in work:
            value = step(value)
        tensors[name] = stored_as(tensors[name], value.to(tensors[name].dtype))
    return tensors


def pour_(small: nn.Module, tensors: Mapping[str, Tensor], masks: Mapping[tuple[str, int], Tensor]) -> None:
    """Write the kept part of full-shaped tensors into the model after surgery, in place.

    small: the model after surgery. tensors: by canonical name, in the original's shapes. masks: which positions of
    every axis stayed (`Removed.masks`); on an axis that is absent, all stayed. Tensors of elements that have left are
    passed over.
    """
    mine = dict([*small.named_parameters(), *small.named_buffers()])
    for name, tensor in tensors.items():
        if name not in mine:
            continue
        new = cut(tensor, {dim: mask for (param, dim), mask in masks.items() if param == name})
        if not is_mapped(mine[name]) or not torch.equal(mine[name], new):
            write_(mine[name], new)


def _read(weight: Tensor, *, piece: ParamSlice, group: Group, plan: GroupPlan) -> Tensor:
    """Scale the weights that read kept channels, and add those of the channels that are merged into them."""
    if piece.index.ndim == 2:  # a grouped convolution: each section of axis 0 reads its own positions
        sections = weight.chunk(piece.index.shape[0], dim=0)
        scaled = [_scaled(b, row, piece.dim, plan) for b, row in zip(sections, piece.index, strict=True)]
        new = torch.cat(scaled)
    else:
        new = _scaled(weight, piece.index, piece.dim, plan)
    if plan.targets is None:
        return new
    gone, onto = _moves(piece, group, plan)
    scales = torch.tensor(plan.scales or (1.0,) * plan.size, dtype=torch.float64)[piece.index[gone]]
    moved = _along(scales, weight, piece.dim) * weight.index_select(piece.dim, gone.to(weight.device))
    return new.index_add(piece.dim, onto.to(weight.device), moved)


def _scaled(weight: Tensor, index: Tensor, dim: int, plan: GroupPlan) -> Tensor:
    """Multiply by the factors: one for weights ≥ 0, one for weights < 0; 0 for removed channels, 1 for other groups."""
    kept = list(plan.kept)
    ones = (1.0,) * len(kept)
    table = torch.zeros(2, plan.size + 1, dtype=torch.float64)
    table[0, kept] = torch.tensor(plan.factors or ones, dtype=torch.float64)
    table[1, kept] = torch.tensor(plan.negative_factors or plan.factors or ones, dtype=torch.float64)
    table[:, -1] = 1.0  # for index −1: not a channel of this group
    up, down = (_along(row[index], weight, dim) for row in table)
    return torch.where(weight >= 0, weight * up, weight * down)


def _averaged(weight: Tensor, *, piece: ParamSlice, group: Group, plan: GroupPlan) -> Tensor:
    """Replace the entries of kept channels by the means over the channels that go into them, after their gains."""
    gone, onto = _moves(piece, group, plan)
    if plan.gains and piece.param in plan.gains:
        gains = torch.tensor((*plan.gains[piece.param], 1.0), dtype=torch.float64)
        weight = weight * _along(gains[piece.index], weight, piece.dim)
    count = torch.ones(weight.shape[piece.dim], dtype=torch.float64)
    count = count.index_add(0, onto, torch.ones(len(onto), dtype=torch.float64))
    moved = weight.index_select(piece.dim, gone.to(weight.device))
    return weight.index_add(piece.dim, onto.to(weight.device), moved) / _along(count, weight, piece.dim)


def _moves(piece: ParamSlice, group: Group, plan: GroupPlan) -> tuple[Tensor, Tensor]:
    """The positions of removed channels that are merged, and the positions that they are merged into."""
    targets = torch.tensor(plan.targets, dtype=torch.int64)
    mine = torch.arange(plan.size)
    moves = (targets >= 0) & (targets != mine)
    table = group.layouts[piece.param, piece.dim]
    if table is None or bool((targets[moves] % group.unit != mine[moves] % group.unit).any()):
        raise InputError(
            f"the channels of {group.name} cannot be merged: they do not lie alike in {piece.param}, axis {piece.dim}. "
            "Use a selector that removes channels without merging them."
        )
    live = table.reshape(-1)
    stays = moves[piece.index[live]]
    onto = table[targets[piece.index[live]].clamp(min=0) // group.unit, torch.arange(len(live)) % table.shape[1]]
    return live[stays], onto[stays]


def _along(values: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Values of shape (n,), reshaped to broadcast along one axis of a weight."""
    shape = [1] * weight.ndim
    shape[dim] = -1
    return values.reshape(shape).to(weight)
