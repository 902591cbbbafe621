"""Which positions of an activation stay when channels are removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from coreprune.graph.captured import Captured
from coreprune.graph.interpret import values_of
from coreprune.graph.tracer import Tracer
from coreprune.graph.values import Value

Positions = tuple[tuple[int, Tensor], ...]


def positions(
    captured: Captured, nodes: Sequence[fx.Node], masks: Mapping[tuple[str, int], Tensor]
) -> dict[fx.Node, Positions | None]:
    """For every node, which positions of its value stay: (axis, int64 positions) for every axis that gets shorter.

    masks: (parameter, axis) -> which positions stay (`Removed.masks`).

    The result is None for a node if its value is not one tensor, or if the positions that stay are no box, or differ
    from expert to expert.
    """
    tracer, values = values_of(captured, nodes)
    stays, all_stay = staying(tracer, masks), staying(tracer, masks, torch.all)
    return {node: _box(value, stays) if _alike(value, stays, all_stay) else None for node, value in values.items()}


def staying(
    tracer: Tracer, masks: Mapping[tuple[str, int], Tensor], experts: Callable[[Tensor, int], Tensor] = torch.any
) -> Tensor:
    """Which ids stay, bool [count + 1]; the last entry is for -1, a position that always stays.

    experts: for positions that experts share, and of which each expert keeps others, (mask [e, n], 0) -> mask [n].
    """
    stays = torch.ones(tracer.count + 1, dtype=torch.bool)
    slots = {(s.param, s.dim): s for s in [*tracer.slots.values(), *tracer.sectioned]}
    for name, slot in slots.items():
        if name in masks:
            mask = masks[name]
            stays[slot.ids] = (experts(mask, 0) if mask.dim() > slot.ids.dim() else mask).expand_as(slot.ids)
    channel = tracer.same.labels(tracer.count)  # ids of no parameter follow those that they met
    gone = torch.zeros_like(stays[:-1])
    gone[channel[~stays[:-1]]] = True
    stays[:-1] = ~gone[channel]
    return stays


def _alike(value: object, stays: Tensor, all_stay: Tensor) -> bool:
    return not isinstance(value, Value) or all(torch.equal(stays[ids], all_stay[ids]) for ids in value.maps)


def _box(value: object, stays: Tensor) -> Positions | None:
    if not isinstance(value, Value):
        return None
    box: dict[int, Tensor] = {}
    for ids in value.maps:
        kept = stays[ids]
        if bool(kept.all()):
            continue
        axes = [a for a, n in enumerate(kept.shape) if n > 1 and not bool((kept == kept.narrow(a, 0, 1)).all())]
        if len(axes) != 1 or axes[0] in box:
            return None
        box[axes[0]] = kept.movedim(axes[0], 0).reshape(kept.shape[axes[0]], -1)[:, 0].nonzero()[:, 0]
    return tuple(sorted(box.items()))
