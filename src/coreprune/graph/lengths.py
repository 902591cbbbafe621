"""How long the axes of activations and weights are, as linear functions of the widths of the groups."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from coreprune.graph.captured import Captured
from coreprune.graph.groups import Group
from coreprune.graph.interpret import values_of
from coreprune.graph.tracer import Tracer
from coreprune.graph.values import Value


@dataclass(frozen=True)
class Extent:
    """The length of an axis: `fixed` positions that stay, and for every group positions per channel that stays.

    slopes: by name of a free group, sorted; empty if the length never changes.
    """

    fixed: int
    slopes: tuple[tuple[str, float], ...] = ()

    def at(self, widths: Mapping[str, int]) -> int:
        """The length when so many channels stay. widths: by name, channels of at least the groups in `slopes`."""
        return self.fixed + round(sum(slope * widths[name] for name, slope in self.slopes))


def extents(
    captured: Captured, groups: Sequence[Group], nodes: Collection[fx.Node]
) -> dict[fx.Node, tuple[Extent, ...] | None]:
    """The extents of all axes of the tensors that some nodes make.

    The groups may come from another trace of the same model, such as one with another number of samples. None where
    the value is not one tensor, or where what stays is no box.
    """
    tracer, values = values_of(captured, nodes)
    free = [g for g in groups if g.locked_because is None]
    unit, owner = _units(tracer, free)
    sectioned = {(s.param, s.dim): unit[s.ids] for s in tracer.sectioned}
    found = {}
    for node, value in values.items():
        found[node] = said = _extents(value, unit, owner, free)
        kind, name = captured.sources.get(node.name, ("", "")) if node.op == "placeholder" else ("", "")
        if said is not None and kind in ("parameter", "buffer"):
            own = (
                _extent(sectioned[name, dim], owner, free) if (name, dim) in sectioned else e
                for dim, e in enumerate(said)
            )
            found[node] = tuple(own)
    return found


def _units(tracer: Tracer, free: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """For every id, its unit among those of all free groups, int64 [ids + 1], and for every unit its group.

    The unit is -1 for ids of no free group; so is the last entry, which is for the id -1.
    """
    unit = torch.full((tracer.count + 1,), -1)
    owner: list[int] = []
    slots = {(s.param, s.dim): s.ids for s in [*tracer.slots.values(), *tracer.sectioned]}
    for i, group in enumerate(free):
        for piece in group.slices:
            ids = slots.get((piece.param, piece.dim))
            if ids is None:
                continue
            index = piece.index if piece.index.dim() <= ids.dim() else piece.index[0]  # of the first expert
            mine = (index >= 0).expand_as(ids)
            unit[ids[mine]] = len(owner) + index.expand_as(ids)[mine] // group.unit
        owner += [i] * (group.size // group.unit)
    channel = tracer.same.labels(tracer.count)  # ids of no parameter follow those that they met
    known = unit[:-1] >= 0
    by_channel = torch.full((int(channel.max()) + 1 if len(channel) else 0,), -1)
    by_channel[channel[known]] = unit[:-1][known]
    unit[:-1] = by_channel[channel]
    return unit, torch.tensor(owner, dtype=torch.int64)


def _extents(value: object, unit: Tensor, owner: Tensor, free: Sequence[Group]) -> tuple[Extent, ...] | None:
    if not isinstance(value, Value):
        return None
    found = [Extent(int(n)) for n in value.shape]
    for ids in value.maps:
        units = unit[ids]
        axes = [a for a, n in enumerate(units.shape) if n > 1 and not bool((units == units.narrow(a, 0, 1)).all())]
        if not axes:
            continue
        if len(axes) > 1:
            return None
        (a,) = axes
        line = units.movedim(a, 0).reshape(units.shape[a], -1)[:, 0]
        if len(line) != value.shape[a]:
            return None
        new = _extent(line[None], owner, free)
        if found[a].slopes and found[a] != new:
            return None
        found[a] = new
    return tuple(found)


def _extent(units: Tensor, owner: Tensor, free: Sequence[Group]) -> Extent:
    """The length of an axis, from the unit at every position. units: (sections, n), which keep the same number."""
    counts = torch.bincount(owner[units[units >= 0]], minlength=len(free)).tolist()
    sections = len(units)
    slopes = tuple(sorted((free[i].name, n / free[i].size / sections) for i, n in enumerate(counts) if n))
    return Extent(int((units < 0).sum()) // sections, slopes)
