"""Groups of channels that can be chosen freely, from the settled ids."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from coreprune.errors import InputError
from coreprune.graph import rules_compute, rules_movement, rules_norm  # noqa: F401 - they register the rules
from coreprune.graph.capture import Captured
from coreprune.graph.channels import Read, Slot, Tracer
from coreprune.graph.resolve import Settled, settle


@dataclass(frozen=True, eq=False)
class ParamSlice:
    """Which positions of one parameter axis belong to which channels of a group.

    Attributes:
        param: canonical dotted name of the parameter or buffer.
        dim: the axis.
        index: int64, the channel of the group at every position, or -1. Shape [n]; or [g, n] when axis 0 falls into g
            equal blocks whose positions along `dim` differ (the input axis of a grouped convolution's weight).
    """

    param: str
    dim: int
    index: Tensor


@dataclass(frozen=True, eq=False)
class Consumer:
    """A place where channels are read and summed over.

    Attributes:
        slices: the parameter axes that multiply the channels; empty when no parameter does (q·k, a sum).
        node, source: the node of the exported graph that reads, and the node whose output it reads.
        axis: the channel axis of that input.
        index: int64 [n], the channel of the group at every position along the axis, or -1. For stacked experts
            [experts, n]: row e holds for the samples that are routed to expert e.
        module: the innermost module in whose forward this happens; for linear and convolution modules its input is
            exactly what is read.
    """

    slices: tuple[ParamSlice, ...]
    node: str
    source: str
    axis: int
    index: Tensor
    module: str | None


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that parameters share, in units that can leave independently of each other.

    Attributes:
        name: dotted name of the first layer that makes the channels.
        size: number of channels; channel c belongs to unit c // unit.
        unit: channels per unit: 1, or more where channels only leave as a whole (heads).
        producers: parameter axes that make the channels (weights and biases).
        others: norms, scales, class tokens, depthwise filters: one entry per channel.
        consumers: where the channels are read: the group's activation points.
        blocks: int64 [units], the block of every unit, when the same number has to stay in every block.
        locked_because: None, or why the group cannot be pruned.
        flags: "heads"; "norm-statistics" (removal changes the mean or variance in a norm); "functional" (read without a
            parameter).
    """

    name: str
    size: int
    unit: int
    producers: tuple[ParamSlice, ...]
    others: tuple[ParamSlice, ...]
    consumers: tuple[Consumer, ...]
    blocks: Tensor | None = None
    locked_because: str | None = None
    flags: frozenset[str] = frozenset()
    key: tuple[Any, ...] = field(default=(), repr=False)

    @property
    def activation_points(self) -> tuple[Consumer, ...]:
        """Where features can be collected: the inputs of the consumers."""
        return self.consumers

    @property
    def slices(self) -> tuple[ParamSlice, ...]:
        """Every parameter axis that shrinks with the group."""
        read = {(s.param, s.dim): s for c in self.consumers for s in c.slices}
        return (*self.producers, *self.others, *read.values())

    def units(self) -> Tensor:
        """The channels of every unit: int64 [size / unit, unit]."""
        return torch.arange(self.size).reshape(-1, self.unit)

    def legal(self, keep: Tensor) -> str | None:
        """None if exactly these channels may stay, otherwise why not.

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
        if self.blocks is not None:
            counts = torch.bincount(self.blocks[per_unit[:, 0]], minlength=int(self.blocks.max()) + 1)
            if int(counts.min()) != int(counts.max()) or not int(counts.min()):
                return f"the same number of units has to stay in each of {len(counts)} blocks, not {counts.tolist()}"
        return None


def check_keep(groups: list[Group], keep: dict[str, Tensor]) -> None:
    """Raise InputError for a name that is not a group, or a choice that the group does not allow."""
    known = {g.name: g for g in groups}
    for name, ids in keep.items():
        if name not in known:
            raise InputError(f"no group is called {name!r}; there are {sorted(known)[:8]} …")
        reason = known[name].legal(ids)
        if reason:
            raise InputError(f"group {name!r}: {reason}")


def find_groups(captured: Captured, norm_statistics: bool = False) -> list[Group]:
    """Find every group of channels, free or locked, in execution order of the first layer that makes them.

    Args:
        captured: from `capture`.
        norm_statistics: free the channels that only enter the statistics of a LayerNorm, RMSNorm or GroupNorm. Their
            removal is then *not* the same as setting them to zero, because the mean and variance are over fewer
            channels; such groups carry the flag "norm-statistics". By default they are locked.
    """
    tracer = trace(captured)
    settled = settle(tracer, norm_statistics)
    captured.cache["unit"] = settled.unit
    return _Builder(tracer, settled).build()


def trace(captured: Captured) -> Tracer:
    """Run the graph on ids, once per capture."""
    if "tracer" not in captured.cache:
        captured.cache["tracer"] = Tracer(captured).run()
    return captured.cache["tracer"]


class _Builder:
    """Cuts the units into groups of equal profile: the same number of positions on the same parameter axes.

    Equal profiles make the cost of a group an exact function of the number of units that stay.
    """

    def __init__(self, tracer: Tracer, settled: Settled) -> None:
        self.tracer, self.settled = tracer, settled
        self.slots = [*tracer.slots.values(), *tracer.blocked]
        self.blocks, conflicts = self._blocks()
        for unit, reason in conflicts.items():
            settled.locked.setdefault(unit, reason)

    def build(self) -> list[Group]:
        profile: dict[int, list[tuple[str, int]]] = defaultdict(list)
        for i, slot in enumerate(self.slots):
            self._count(profile, slot.ids, ("slot", i))
        for i, work in enumerate(self.tracer.work):
            for j, layer in enumerate(work.layers):
                self._count(profile, layer, ("work", i * 8 + j))
        made = {i for i, s in enumerate(self.slots) if "out" in self.tracer.roles.get((s.param, s.dim), ())}
        width = torch.zeros(int(self.settled.unit.max()) + 1, dtype=torch.int64)
        pairs = torch.stack([self.settled.unit, self.settled.channel]).unique(dim=1)
        width.index_add_(0, pairs[0], torch.ones_like(pairs[0]))
        groups: dict[Any, list[int]] = defaultdict(list)
        for unit, entries in profile.items():
            if any(kind[0] == "slot" and kind[1] in made for kind, _ in entries):
                flags = tuple(sorted(self.settled.flags.get(unit, ())))
                key = (tuple(entries), self.settled.locked.get(unit), int(width[unit]), flags)
                groups[key].append(unit)
        order = sorted(groups.items(), key=lambda item: self._first(item[0]))
        names: dict[str, int] = {}
        return [self._group(key, units, names) for key, units in order]

    def _count(self, profile: dict[int, list[Any]], ids: Tensor, kind: tuple[str, int]) -> None:
        units, counts = self.settled.unit[ids[ids >= 0]].unique(return_counts=True)
        for u, c in zip(units.tolist(), counts.tolist(), strict=True):
            profile[u].append((kind, c))

    def _first(self, key: Any) -> int:
        """Position of the first producer in the graph, as far as ids tell: they are handed out in order of the model."""
        for (kind, i), _ in key[0]:
            if kind == "slot" and "out" in self.tracer.roles.get((self.slots[i].param, self.slots[i].dim), ()):
                return i
        return 0

    def _group(self, key: Any, units: list[int], names: dict[str, int]) -> Group:
        entries, locked, width, flags = key
        mine = torch.zeros(int(self.settled.unit.max()) + 1, dtype=torch.bool)
        mine[units] = True
        slots = [self.slots[i] for (kind, i), _ in entries if kind == "slot"]
        number, order = self._number(slots, mine, width)
        producers, others, read = [], [], {}
        for slot in slots:
            roles = self.tracer.roles.get((slot.param, slot.dim), set())
            piece = ParamSlice(slot.param, slot.dim, self._index(slot.ids, mine, number))
            if "out" in roles:
                producers.append(piece)
            if "in" in roles or slot.ids.dim() == 2:
                read[slot.param, slot.dim] = piece
            if not roles & {"in", "out"} and slot.ids.dim() == 1:
                others.append(piece)
        consumers = self._consumers(mine, number, read)
        blocks, problem = self._group_blocks(order)
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
        experts = self._experts(slots) if blocks is None else 0
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
            blocks = torch.arange(experts).repeat_interleave(len(units))
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
            blocks=blocks,
            locked_because=next((r for r in reasons if r), None),
            flags=frozenset(flags),
            key=tuple(order.tolist()),
        )

    def _experts(self, slots: list[Slot]) -> int:
        """The number of experts if every parameter is a stack of them: each expert then chooses its own channels."""
        counts = {self.tracer.experts.get(s.param, 0) if s.dim and s.ids.dim() == 1 else 0 for s in slots}
        return counts.pop() if len(counts) == 1 else 0

    def _number(self, slots: list[Slot], mine: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Number channels unit by unit, in the order in which the parameters show them first."""
        seen = torch.cat([s.ids.reshape(-1) for s in slots])
        seen = seen[seen >= 0]
        # every id of these units, also those that only occur in activations
        seen = torch.cat([seen, torch.arange(len(self.settled.unit))])
        seen = seen[mine[self.settled.unit[seen]]]
        channel, unit = self.settled.channel[seen], self.settled.unit[seen]
        order = list(dict.fromkeys(unit.tolist()))
        place = {u: i * width for i, u in enumerate(order)}
        number = torch.full((int(self.settled.channel.max()) + 1,), -1)
        for c, u in dict(zip(channel.tolist(), unit.tolist(), strict=True)).items():
            number[c] = place[u]
            place[u] += 1
        return number, torch.tensor(order)

    def _index(self, ids: Tensor, mine: Tensor, number: Tensor) -> Tensor:
        safe = ids.clamp(min=0)
        belongs = (ids >= 0) & mine[self.settled.unit[safe]]
        return torch.where(belongs, number[self.settled.channel[safe]], -1)

    def _consumers(self, mine: Tensor, number: Tensor, read: dict[tuple[str, int], ParamSlice]) -> tuple[Consumer, ...]:
        found = []
        for r in self.tracer.reads:
            index = self._index(r.ids, mine, number)
            if bool((index >= 0).any()):
                slices = tuple(read[p] for p in r.params if p in read)
                found.append(Consumer(slices, r.node, r.source, r.axis, index, self._module(r)))
        return tuple(found)

    def _module(self, r: Read) -> str | None:
        return r.module

    # --- the same number in every block ----------------------------------------------------------------------------
    def _blocks(self) -> tuple[dict[int, list[int]], dict[int, str]]:
        """Per unit its block in every balance constraint that it takes part in; units in several blocks of one
        constraint equally are balanced by themselves, all others are conflicts."""
        blocks: dict[int, list[int]] = defaultdict(list)
        conflicts: dict[int, str] = {}
        for c, (ids, reason) in enumerate(self.settled.blocks):
            g = ids.shape[0]
            unit = torch.where(ids >= 0, self.settled.unit[ids.clamp(min=0)], -1)
            counts: dict[int, Tensor] = {}
            for row in range(g):
                for u, k in zip(*[t.tolist() for t in unit[row].unique(return_counts=True)], strict=True):
                    counts.setdefault(u, torch.zeros(g, dtype=torch.int64))[row] = k
            counts.pop(-1, None)
            uneven = {u: k for u, k in counts.items() if int(k.min()) != int(k.max())}
            for u, k in uneven.items():
                if int((k > 0).sum()) > 1:
                    conflicts[u] = reason
                else:
                    blocks[u].append(c * 1_000_000 + int(k.argmax()))
            # every block needs the same supply of free units of one kind; checked per group in _group_blocks
        return blocks, conflicts

    def _group_blocks(self, units: Tensor) -> tuple[Tensor | None, str | None]:
        labels = [tuple(self.blocks.get(u, ())) for u in units.tolist()]
        if not any(labels):
            return None, None
        constraints = {tuple(b // 1_000_000 for b in label) for label in labels}
        names = {label: i for i, label in enumerate(sorted(set(labels)))}
        block = torch.tensor([names[label] for label in labels])
        sizes = torch.bincount(block)
        wanted = 1
        reason = ""
        for c in {x for cs in constraints for x in cs}:
            wanted = max(wanted, self.settled.blocks[c][0].shape[0])
            reason = self.settled.blocks[c][1]
        if len(constraints) > 1 or int(sizes.min()) != int(sizes.max()) or len(names) % wanted:
            return None, f"{reason}, and its channels are not spread evenly over them"
        return block, None


def _layer_name(param: str) -> str:
    return param.rpartition(".")[0] or param


def _spread(index: Tensor, experts: int, size: int) -> Tensor:
    """[n] -> [experts, n]: expert e has channels e * size + index."""
    return torch.where(index >= 0, index + size * torch.arange(experts)[:, None], -1)


def _per_expert(s: ParamSlice, experts: int, size: int) -> ParamSlice:
    return ParamSlice(s.param, s.dim, _spread(s.index, experts, size))


def lock(group: Group, reason: str) -> Group:
    """The same group, locked."""
    return dataclasses.replace(group, locked_because=reason)


def describe(groups: list[Group], shares: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """One row per group for tables: name, channels, unit, blocks, share of MACs, locked and why."""
    return [
        {
            "group": g.name,
            "channels": g.size,
            "unit": g.unit,
            "units": g.size // g.unit,
            "blocks": int(g.blocks.max()) + 1 if g.blocks is not None else 1,
            "producers": len(g.producers),
            "consumers": len(g.consumers),
            "macs_share": (shares or {}).get(g.name),
            "flags": sorted(g.flags),
            "locked_because": g.locked_because,
        }
        for g in groups
    ]
