"""Make groups of channels from the settled ids. The channels of each group can be chosen on their own."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coreprune.graph.captured import Captured
from coreprune.graph.groups import Consumer, Group, ParamSlice
from coreprune.graph.resolve import Settled, settle
from coreprune.graph.tracer import Slot, Tracer
from coreprune.graph.unionfind import one_thread


def find_groups(captured: Captured, norm_statistics: bool = False) -> list[Group]:
    """Find every group of channels, free or locked, in the execution order of the first layers that make them.

    Args:
        captured: from `capture`.
        norm_statistics: do not lock channels because they enter the statistics of a LayerNorm or RMSNorm, or of
            a GroupNorm with one group.
            Removing such channels is *not* the same as setting them to zero, because the mean and variance are then
            taken over fewer channels. Their groups carry the flag "norm-statistics". By default they are locked.
    """
    with one_thread():
        tracer = captured.channel_ids
        columns: set[int] = set()
        while True:
            settled = settle(tracer, norm_statistics, columns)
            builder = _Builder(tracer, settled)
            groups = builder.build()
            if builder.unbalanced <= columns:
                break
            # These sections lie in different groups. So their k-th channels are tied, and can only be removed together.
            columns |= builder.unbalanced
        return groups


class _Builder:
    """Sorts the units into groups of equal profile: the same number of positions on the same parameter axes.

    Because of the equal profiles, the cost of a group is an exact function of the number of units that stay.
    """

    def __init__(self, tracer: Tracer, settled: Settled) -> None:
        self.tracer, self.settled = tracer, settled
        self.slots = [*tracer.slots.values(), *tracer.sectioned]
        self.roles = [tracer.roles.get((s.param, s.dim), set()) for s in self.slots]
        self.n_units, self.n_channels = int(settled.unit.max()) + 1, int(settled.channel.max()) + 1
        unit_of_channel = torch.zeros(self.n_channels, dtype=torch.int64)
        unit_of_channel[settled.channel] = settled.unit
        self.width = torch.bincount(unit_of_channel, minlength=self.n_units)
        self.unbalanced: set[int] = set()
        self.sections, conflicts = self._sections()
        for unit, reason in conflicts.items():
            settled.locked.setdefault(unit, reason)

    def build(self) -> list[Group]:
        """One group for every profile that a layer makes, in the order of these layers in the model."""
        maps = [s.ids for s in self.slots] + [x for w in self.tracer.work for x in w.maps]
        counted = [self.settled.unit[x[x >= 0]].unique(return_counts=True) for x in maps]
        which = torch.cat([torch.full_like(u, i) for i, (u, _) in enumerate(counted)])
        units, order = torch.cat([u for u, _ in counted]).sort(stable=True)
        entries = torch.stack([which, torch.cat([c for _, c in counted])], 1)[order].numpy()
        present, ends = units.unique_consecutive(return_counts=True)
        groups: dict[Any, list[int]] = defaultdict(list)
        start = 0
        for unit, n, width in zip(present.tolist(), ends.tolist(), self.width[present].tolist(), strict=True):
            mine, start = entries[start : start + n], start + n
            flags = tuple(sorted(self.settled.flags.get(unit, ())))
            groups[mine.tobytes(), self.settled.locked.get(unit), width, flags].append(unit)
        found = []
        for (profile, locked, width, flags), members in groups.items():
            used = np.frombuffer(profile, dtype=np.int64).reshape(-1, 2)[:, 0]
            slots = [int(i) for i in used if i < len(self.slots)]
            first = next((i for i in slots if "out" in self.roles[i]), None)
            if first is not None:
                found.append((first, slots, members, locked, width, flags))
        names: dict[str, int] = {}
        return [self._group(g[1], g[2], names, g[3:]) for g in sorted(found, key=lambda g: g[0])]

    def _group(
        self, used: list[int], units: list[int], names: dict[str, int], rest: tuple[str | None, int, tuple[str, ...]]
    ) -> Group:
        locked, width, flags = rest
        mine = torch.zeros(self.n_units, dtype=torch.bool)
        mine[units] = True
        slots = [self.slots[i] for i in used]
        number, order = self._number(slots, mine)
        producers, others, read = [], [], {}
        for slot, roles in zip(slots, (self.roles[i] for i in used), strict=True):
            piece = ParamSlice(slot.param, slot.dim, self._index(slot.ids, mine, number))
            if "out" in roles:
                producers.append(piece)
            if "in" in roles or slot.ids.dim() == 2:
                read[slot.param, slot.dim] = piece
            if not roles & {"in", "out"} and slot.ids.dim() == 1:
                others.append(piece)
        consumers = self._consumers(mine, number, read)
        sections, problem = self._group_sections(order)
        reasons = [
            locked,
            problem,
            None if len(units) > 1 else "all its channels only leave together",
            None if consumers else "nothing reads its channels through a weight or a sum",
        ]
        reached = {(s.param, s.dim) for c in consumers for s in c.slices}
        if any(k not in reached for k in read):
            reasons.append("a weight reads its channels in a way that is not followed")
        if any(not c.slices for c in consumers):
            flags = (*flags, "functional")
        experts = self._experts(slots) if sections is None else 0
        size = len(units) * width
        if experts:
            producers, others = ([_per_expert(s, experts, size) for s in x] for x in (producers, others))
            consumers = tuple(
                dataclasses.replace(
                    c,
                    slices=tuple(_per_expert(s, experts, size) for s in c.slices),
                    index=_spread(c.index, experts, size),
                )
                for c in consumers
            )
            sections = torch.arange(experts).repeat_interleave(len(units))
            size *= experts
        name = _layer_name(producers[0].param)
        names[name] = names.get(name, 0) + 1
        return Group(
            name=name if names[name] == 1 else f"{name}#{names[name]}",
            size=size,
            unit=width,
            producers=tuple(producers),
            others=tuple(others),
            consumers=consumers,
            sections=sections,
            locked_because=next((r for r in reasons if r), None),
            flags=frozenset(flags),
            ids=mine[self.settled.unit].nonzero()[:, 0],
        )

    def _experts(self, slots: list[Slot]) -> int:
        """The number of experts if every parameter is a stack of experts, otherwise 0.

        Every expert then has channels of its own to choose from.
        """
        counts = {self.tracer.experts.get(s.param, 0) if s.dim and s.ids.dim() == 1 else 0 for s in slots}
        return counts.pop() if len(counts) == 1 else 0

    def _number(self, slots: list[Slot], mine: Tensor) -> tuple[Tensor, Tensor]:
        """Number the channels unit by unit, in the order of their first position in the parameters.

        Returns:
            the number of every channel class (-1: not of this group), and the units in order.
        """
        seen = torch.cat([s.ids[s.ids >= 0].reshape(-1) for s in slots])
        seen = seen[mine[self.settled.unit[seen]]]
        channels, at = np.unique(self.settled.channel[seen].numpy(), return_index=True)
        units, unit_of = np.unique(self.settled.unit[seen].numpy()[at], return_inverse=True)
        first = np.full(len(units), len(seen))
        np.minimum.at(first, unit_of, at)
        order = np.lexsort((at, first[unit_of]))
        number = torch.full((self.n_channels,), -1)
        number[torch.from_numpy(channels[order])] = torch.arange(len(order))
        return number, torch.from_numpy(units[np.argsort(first)])

    def _index(self, ids: Tensor, mine: Tensor, number: Tensor) -> Tensor:
        safe = ids.clamp(min=0)
        belongs = (ids >= 0) & mine[self.settled.unit[safe]]
        return torch.where(belongs, number[self.settled.channel[safe]], -1)

    def _consumers(self, mine: Tensor, number: Tensor, read: dict[tuple[str, int], ParamSlice]) -> tuple[Consumer, ...]:
        found = []
        for r in self.tracer.reads:
            if bool((mine[self.settled.unit[r.ids.clamp(min=0)]] & (r.ids >= 0)).any()):
                slices = tuple(read[p] for p in r.params if p in read)
                index = self._index(r.ids, mine, number)
                weight = self.tracer.captured.aliases.get(f"{r.module}.weight")
                hookable = any(weight == s.param for s in slices)
                found.append(Consumer(slices, r.node, r.source, r.axis, index, r.module, hookable))
        return tuple(found)

    # --- the same number in every section ----------------------------------------------------------------------------
    def _sections(self) -> tuple[dict[int, list[tuple[int, int]]], dict[int, str]]:
        """For every unit, (constraint, section) for every balance constraint that concerns it; and the conflicts.

        A unit with equally many positions in every section is always balanced. A unit with positions in several
        sections, but not equally many in each, can never be removed: it is a conflict.
        """
        sections: dict[int, list[tuple[int, int]]] = defaultdict(list)
        conflicts: dict[int, str] = {}
        for c, (ids, reason) in enumerate(self.settled.sections):
            row = torch.arange(ids.shape[0])[:, None].expand_as(ids)[ids >= 0]
            units, where = self.settled.unit[ids[ids >= 0]].unique(return_inverse=True)
            counts = torch.zeros(len(units), ids.shape[0], dtype=torch.int64)
            counts.index_put_((where, row), torch.ones_like(row), accumulate=True)
            uneven = counts.min(1).values != counts.max(1).values
            single = (counts > 0).sum(1) == 1
            if bool((uneven & ~single).any()):
                self.unbalanced.add(c)
            for u in units[uneven & ~single].tolist():
                conflicts[u] = reason
            chosen = uneven & single
            for u, b in zip(units[chosen].tolist(), counts[chosen].argmax(1).tolist(), strict=True):
                sections[u].append((c, b))
        return sections, conflicts

    def _group_sections(self, units: Tensor) -> tuple[Tensor | None, str | None]:
        """The section of every unit of a group, or the reason why its channels cannot be balanced within the group."""
        labels = [tuple(self.sections.get(u, ())) for u in units.tolist()]
        constraints = {c for label in labels for c, _ in label}
        if not constraints:
            return None, None
        names = {label: i for i, label in enumerate(sorted(set(labels)))}
        section = torch.tensor([names[label] for label in labels])
        sizes = torch.bincount(section)
        ids, reason = max((self.settled.sections[c] for c in constraints), key=lambda b: b[0].shape[0])
        alike = len({tuple(c for c, _ in label) for label in labels}) == 1
        if not alike or int(sizes.min()) != int(sizes.max()) or len(names) % ids.shape[0]:
            self.unbalanced |= constraints
            return None, f"{reason}, but they belong to different groups"
        return section, None


def _layer_name(param: str) -> str:
    return param.rpartition(".")[0] or param


def _spread(index: Tensor, experts: int, size: int) -> Tensor:
    """[n] -> [experts, n]: expert e has the channels e * size + index."""
    return torch.where(index >= 0, index + size * torch.arange(experts)[:, None], -1)


def _per_expert(s: ParamSlice, experts: int, size: int) -> ParamSlice:
    return ParamSlice(s.param, s.dim, _spread(s.index, experts, size))
