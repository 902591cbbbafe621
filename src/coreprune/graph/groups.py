"""A group of channels: which parameters make it, which read it, and in which units it can shrink."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from coreprune.errors import InputError


@dataclass(frozen=True, eq=False)
class ParamSlice:
    """Which positions of one parameter axis belong to which channels of a group.

    Attributes:
        param: canonical dotted name of the parameter or buffer.
        dim: the axis.
        index: int64, the channel of the group at every position, or -1. Shape [n]; or [g, n] if axis 0 is divided into
            g equal sections whose positions along `dim` differ (the input axis of a grouped convolution's weight).
    """

    param: str
    dim: int
    index: Tensor


@dataclass(frozen=True, eq=False)
class Consumer:
    """A place where channels are read and summed over.

    Attributes:
        slices: the parameter axes that multiply the channels; empty if no parameter does (q·k, a sum).
        node, source: the node of the exported graph that reads, and the node whose output it reads.
        axis: the channel axis of that input: -1 for linear layers, 1 for convolutions.
        index: int64 [n], the channel of the group at every position along the axis, or -1. For stacked experts
            [experts, n]: row e is for the samples that are routed to expert e.
        module: the innermost module in whose forward the channels are read.
        hookable: whether the module's own `weight` reads the channels, as in linear and convolution layers. Then the
            module's input is what is read, and a forward pre-hook can collect features. Otherwise replay the graph up
            to `source`.
    """

    slices: tuple[ParamSlice, ...]
    node: str
    source: str
    axis: int
    index: Tensor
    module: str | None
    hookable: bool = False


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that several parameters share, in units that can be removed independently of each other.

    Attributes:
        name: dotted name of the first layer that makes the channels.
        size: number of channels; channel c belongs to unit c // unit.
        unit: channels per unit: 1, or more if several channels can only be removed together (heads).
        producers: parameter axes that make the channels (weights and biases).
        others: parameter axes with one entry per channel: norms, scales, class tokens, depthwise filters.
        consumers: the places where the channels are read.
        sections: int64 [units], the section of every unit, if the same number of units has to stay in every section.
        locked_because: why the group cannot be pruned, or None if it can.
        ids: the tracer's ids of all positions of the group, for the cost model.
        flags: "heads"; "norm-statistics" (removing channels changes the mean or variance in a norm); "functional" (the
            channels are read without a parameter); "rotated" (a residual stream on its principal axes).
    """

    name: str
    size: int
    unit: int
    producers: tuple[ParamSlice, ...]
    others: tuple[ParamSlice, ...]
    consumers: tuple[Consumer, ...]
    sections: Tensor | None = None
    locked_because: str | None = None
    flags: frozenset[str] = frozenset()
    ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64), repr=False)

    @property
    def activation_points(self) -> tuple[Consumer, ...]:
        """Where features can be collected: the inputs of the consumers."""
        return self.consumers

    @property
    def slices(self) -> tuple[ParamSlice, ...]:
        """Every parameter axis that shrinks with the group."""
        read = {(s.param, s.dim): s for c in self.consumers for s in c.slices}
        return (*self.producers, *self.others, *read.values())

    @cached_property
    def layouts(self) -> dict[tuple[str, int], Tensor | None]:
        """Where the units lie on every parameter axis: (name, axis) -> `layout` of its slice."""
        return {(s.param, s.dim): layout(s.index, self) for s in self.slices}

    @property
    def section_count(self) -> int:
        """How many sections the units lie in; 1 if the group is not divided."""
        return 1 if self.sections is None else int(self.sections.max()) + 1

    def units(self) -> Tensor:
        """The channels of every unit: int64 [size / unit, unit]."""
        return torch.arange(self.size).reshape(-1, self.unit)

    def legal(self, keep: Tensor) -> str | None:
        """None if exactly these channels may stay, otherwise the reason why not.

        Args:
            keep: sorted unique int64 channel ids.
        """
        if keep.dim() != 1 or keep.dtype != torch.int64:
            return "keep has to be a one-dimensional int64 tensor"
        if not len(keep):
            return "at least one unit has to stay"
        if bool((keep[1:] <= keep[:-1]).any()) or int(keep[0]) < 0 or int(keep[-1]) >= self.size:
            return f"keep has to be sorted, unique and within 0..{self.size - 1}"
        if len(keep) == self.size:
            return None
        if self.locked_because:
            return f"locked: {self.locked_because}"
        kept = torch.zeros(self.size, dtype=torch.bool)
        kept[keep] = True
        per_unit = kept.reshape(-1, self.unit)
        if bool((per_unit.any(1) != per_unit.all(1)).any()):
            return f"channels only leave in whole units of {self.unit}"
        if self.sections is not None:
            counts = torch.bincount(self.sections[per_unit[:, 0]], minlength=int(self.sections.max()) + 1)
            if int(counts.min()) != int(counts.max()) or not int(counts.min()):
                return f"the same number of units has to stay in each of {len(counts)} sections, not {counts.tolist()}"
        return None


def check_keep(groups: Sequence[Group], keep: dict[str, Tensor]) -> None:
    """Raise InputError for a name that is not a group, or for a choice that the group does not allow."""
    known = {g.name: g for g in groups}
    for name, ids in keep.items():
        if name not in known:
            raise InputError(f"no group is called {name!r}; there are {sorted(known)[:8]} …")
        reason = known[name].legal(ids)
        if reason:
            raise InputError(f"group {name!r}: {reason}")


def lock(group: Group, reason: str) -> Group:
    """The same group, locked."""
    return dataclasses.replace(group, locked_because=reason)


def describe(groups: list[Group], shares: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """One row per group for tables: name, channels, unit, sections, share of MACs, and why it is locked."""
    return [
        {
            "group": g.name,
            "channels": g.size,
            "unit": g.unit,
            "units": g.size // g.unit,
            "sections": g.section_count,
            "producers": len(g.producers),
            "consumers": len(g.consumers),
            "macs_share": (shares or {}).get(g.name),
            "flags": sorted(g.flags),
            "locked_because": g.locked_because,
        }
        for g in groups
    ]


def layout(index: Tensor, group: Group) -> Tensor | None:
    """Where the units of a group lie on one parameter axis, int64 (units, positions per unit), or None.

    Position q of one unit corresponds to position q of every other unit: all units have the same pattern on the axis,
    only shifted. The result is None if they do not, or if the axis differs between sections (`ParamSlice.index` of two
    dimensions). Then units cannot be merged.
    """
    units = group.size // group.unit
    if index.ndim != 1:
        return None
    live = (index >= 0).nonzero()[:, 0]
    owner = index[live] // group.unit
    if len(live) % units or bool((owner.bincount(minlength=units) != len(live) // units).any()):
        return None
    table = live[owner.argsort(stable=True)].reshape(units, -1)
    shifts, role = table - table[:, :1], index[table] % group.unit
    alike = bool((shifts == shifts[0]).all()) and bool((role == role[0]).all())
    return table if alike else None
