"""The records that are made while a graph runs on channel ids.

Every axis of every parameter gets new ids. Two ids that meet element by element are the *same channel* (`same`). Ids
that can only be removed together, such as the channels of one attention head, are *tied* (`tied`). What cannot be
decided before the whole graph has been seen is recorded here, and settled in `resolve.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from coreprune.graph.captured import Captured
from coreprune.graph.unionfind import Partition
from coreprune.graph.values import FIXED, Value, place


@dataclass(frozen=True, eq=False)
class Slot:
    """One axis of one parameter or buffer, with an id per position.

    ids has shape [n]. It has shape [g, n] (`sectioned`) if axis 0 is divided into g equal sections, and each section
    has its own ids along `dim`, as on the second axis of a grouped convolution's weight.
    """

    param: str
    dim: int
    ids: Tensor


@dataclass(frozen=True, eq=False)
class Read:
    """A place where channels are summed over: `ids` along `axis` of the tensor that `source` makes and `node` reads."""

    node: str
    source: str
    axis: int
    ids: Tensor
    module: str | None
    params: tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class Work:
    """The multiply-accumulates of one operation: factor * prod over id maps (number of kept elements) // divisor.

    made: the position in `maps` of the channels that a weight makes in this operation, or None.
    """

    node: str
    factor: int
    maps: tuple[Tensor, ...]
    divisor: int = 1
    made: int | None = None


@dataclass(frozen=True, eq=False)
class Statistic:
    """A reduction over channels. If not all ids on each line are in one unit, it locks or flags the channels."""

    ids: Tensor
    axes: frozenset[int]
    reason: str
    flag: str | None = None


@dataclass(frozen=True, eq=False)
class Normed:
    """A norm whose `sections` [g, n] have statistics of their own: how many there are is a number in `module`."""

    sections: Tensor
    node: str
    module: str | None


@dataclass(eq=False)
class Tracer:
    """Everything that is known after running the graph on ids.

    Attributes:
        count: how many ids were handed out.
        same, tied: the two partitions of the ids.
        slots: parameter axis -> its ids.
        sectioned: the axes whose ids differ between sections of axis 0.
        roles: parameter axis -> "out" (makes channels), "in" (reads them), "other" (one number per channel).
        depthwise: parameters of depthwise convolutions.
        experts: stacked parameters of experts -> how many experts.
        locks: ids that stay, with the reason.
        seen: id maps that vary along several axes. `settle` makes sure that a single axis decides what is removed.
        partial: pairs of id maps; the sections of the bigger one share the smaller one.
        fixed: id maps that meet a size which does not change, the axes along which they do, and the reason.
        balanced: ids [g, n], with the reason: the same number has to stay in each of the g rows.
        statistics, reads, work: lists of the records above.
        normed: the norms over sections of channels.
        heads: id maps of attention heads.
        origin: first id, one past the last id, parameter and axis of every slot.
    """

    captured: Captured
    count: int = 0
    same: Partition = field(default_factory=Partition)
    tied: Partition = field(default_factory=Partition)
    slots: dict[tuple[str, int], Slot] = field(default_factory=dict)
    sectioned: list[Slot] = field(default_factory=list)
    roles: dict[tuple[str, int], set[str]] = field(default_factory=dict)
    depthwise: set[str] = field(default_factory=set)
    locks: list[tuple[Tensor, str]] = field(default_factory=list)
    seen: dict[int, Tensor] = field(default_factory=dict)
    partial: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    fixed: list[tuple[Tensor, frozenset[int], str]] = field(default_factory=list)
    statistics: list[Statistic] = field(default_factory=list)
    balanced: list[tuple[Tensor, str]] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    experts: dict[str, int] = field(default_factory=dict)
    normed: list[Normed] = field(default_factory=list)
    heads: list[Tensor] = field(default_factory=list)
    origin: list[tuple[int, int, str, int]] = field(default_factory=list)

    # --- ids -------------------------------------------------------------------------------------------------------
    def parameter(self, name: str) -> Value:
        """The value of a parameter or buffer, with one id map for every axis longer than 1."""
        shape, _ = self.captured.tensors[name]
        maps = []
        for dim, n in enumerate(shape):
            if n < 2:
                continue
            if (name, dim) not in self.slots:
                ids = self.fresh([n])
                self.slots[name, dim] = Slot(name, dim, ids)
                self.origin.append((self.count - n, self.count, name, dim))
            maps.append(place(self.slots[name, dim].ids, [dim], len(shape)))
        return Value(shape, tuple(maps), weight=True)

    def fresh(self, shape: Sequence[int]) -> Tensor:
        """New ids, of no parameter: for positions that follow the channels that they meet."""
        ids = torch.arange(self.count, self.count + math.prod(shape)).reshape(*shape)
        self.count += ids.numel()
        return ids

    def origins(self, ids: Tensor) -> set[tuple[str, int]]:
        """The parameter axes whose own ids occur in an id map. Ids that were united with them do not count."""
        ids = ids[ids >= 0]
        if not len(ids):
            return set()
        low, high = int(ids.min()), int(ids.max())
        return {
            (name, dim)
            for lo, hi, name, dim in self.origin
            if lo <= high and low < hi and bool(((ids >= lo) & (ids < hi)).any())
        }

    def play(self, value: Value, ids: Tensor, role: str) -> None:
        """Record a role of the parameter axes whose ids occur in an id map of a weight."""
        if value.weight:
            for slot in self.origins(ids):
                self.roles.setdefault(slot, set()).add(role)

    # --- what the rules say ----------------------------------------------------------------------------------------
    def unify(self, a: Tensor, b: Tensor, reason: str = "meets positions of a fixed size") -> None:
        """The ids of a and b (broadcast) are the same channels. An id that meets a fixed position is locked."""
        a, b = torch.broadcast_tensors(a, b)
        self.same.unite(a, b)
        self.lock(a[(b == FIXED) & (a != FIXED)], reason)
        self.lock(b[(a == FIXED) & (b != FIXED)], reason)

    def tie_to(self, a: Tensor, b: Tensor, reason: str) -> None:
        """The ids of a and b (broadcast) can only be removed together, but are different channels."""
        a, b = torch.broadcast_tensors(a, b)
        self.tied.unite(a, b)
        self.lock(a[(b == FIXED) & (a != FIXED)], reason)
        self.lock(b[(a == FIXED) & (b != FIXED)], reason)

    def tie(self, ids: Tensor, along: Sequence[int]) -> Tensor:
        """All ids on each line along these axes can only be removed together.

        Returns the id map with size 1 along these axes.
        """
        first = ids
        for a in along:
            first = first.narrow(a, 0, 1)
        self.tied.unite(ids, first)
        mixed = (ids == FIXED) != (first == FIXED)
        if bool(mixed.any()):
            self.lock(ids, "leaves together with positions of a fixed size")
        return first

    def lock(self, ids: Tensor, reason: str) -> None:
        """Lock these channels: they stay."""
        ids = ids[ids >= 0]
        if len(ids):
            self.locks.append((ids.reshape(-1), reason))

    def lock_all(self, values: Sequence[Value], reason: str) -> None:
        """Lock every channel of these values."""
        for value in values:
            for ids in value.maps:
                self.lock(ids, reason)
