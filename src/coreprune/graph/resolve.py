"""Settle what could only be recorded while the graph was running.

Removing channels commutes with every data movement if, in every tensor, the removed positions are whole slabs along one
axis. `settle` makes sure of that. If ids vary along several axes (a split into heads, a channel shuffle), and no single
axis decides which positions are removed, ids are tied until one axis does.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from coreprune.graph.tracer import Tracer
from coreprune.graph.unionfind import Partition
from coreprune.graph.values import FIXED, axes


@dataclass(eq=False)
class Settled:
    """The outcome.

    channel: the channel class of every id. unit: the unit of every id, which can only be removed whole. locked: unit ->
    why it stays. flags: unit -> its flags. sections: the balance constraints, as in `Tracer.balanced`.
    """

    channel: Tensor
    unit: Tensor
    locked: dict[int, str]
    flags: dict[int, set[str]]
    sections: list[tuple[Tensor, str]]


def settle(tracer: Tracer, norm_statistics: bool = False, columns: Collection[int] = ()) -> Settled:
    """Resolve the shapes, deferred meetings, statistics and locks of a finished run.

    Args:
        tracer: from `interpret.trace`.
        columns: balance constraints (positions in `tracer.balanced`) to satisfy by tying the k-th ids of all sections.
        norm_statistics: flag channels that enter the statistics of a LayerNorm or RMSNorm, or of a GroupNorm with one
            group; by default lock them.
    """
    n = max(tracer.count, 1)
    locks = list(tracer.locks)
    flags: list[tuple[Tensor, str]] = []
    same, tied = tracer.same.copy(), tracer.tied.copy()
    for c in columns:
        ids = tracer.balanced[c][0]
        tied.unite(ids, ids.max(0, keepdim=True).values)
        mixed = (ids == FIXED).any(0)
        locks.append((_real(ids[:, mixed]), tracer.balanced[c][1]))
    partial = list(tracer.partial)
    while True:
        unit, locked = _classes(same, tied, locks, n)
        leaving = _leaving(unit, locked)
        changed = False
        pending = []
        for big, small in partial:
            if _decided_without(big, axes(small), leaving):
                locks.append((_real(small), "is shared by sections that leave as a whole"))
            else:
                pending.append((big, small))
        if len(pending) < len(partial):
            partial = pending
            changed = True
        elif pending:
            for big, small in pending:
                tied.unite(big, small.expand(big.shape))
                if bool((small.expand(big.shape) == FIXED).any()):
                    locks.append((_real(big), "meets positions of a fixed size"))
            partial, changed = [], True
        if not changed:
            changed = any([_make_slabs(ids, leaving, tied, locks) for ids in tracer.seen.values()])
        if not changed:
            break
    for ids, along, reason in tracer.fixed:
        if not _decided_without(ids, along, leaving):
            locks.append((_real(ids), reason))
    for s in tracer.statistics:
        if not _uniform(s.ids, s.axes, unit):
            if s.flag and norm_statistics:
                flags.append((_real(s.ids), s.flag))
            else:
                locks.append((_real(s.ids), s.reason))
    unit, locked = _classes(same, tied, locks, n)
    flagged: dict[int, set[str]] = {}
    for ids, flag in flags:
        for u in unit[ids].unique().tolist():
            flagged.setdefault(u, set()).add(flag)
    for ids in tracer.heads:
        for u in unit[_real(ids)].unique().tolist():
            flagged.setdefault(u, set()).add("heads")
    return Settled(same.labels(n), unit, locked, flagged, list(tracer.balanced))


def _real(ids: Tensor) -> Tensor:
    return ids[ids >= 0].reshape(-1)


def _classes(
    same: Partition, tied: Partition, locks: list[tuple[Tensor, str]], n: int
) -> tuple[Tensor, dict[int, str]]:
    both = same.copy()
    both._pairs += tied._pairs
    unit = both.labels(n)
    locked: dict[int, str] = {}
    for ids, reason in locks:
        for u in unit[ids].unique().tolist():
            locked.setdefault(u, reason)
    return unit, locked


def _leaving(unit: Tensor, locked: dict[int, str]) -> Tensor:
    """For every id its unit, or -1 if the unit is locked."""
    stays = torch.zeros(int(unit.max()) + 1, dtype=torch.bool)
    stays[list(locked)] = True
    return torch.where(stays[unit], FIXED, unit)


def _names(ids: Tensor, unit: Tensor) -> Tensor:
    """The unit of every position of an id map; -1 for positions that stay."""
    return torch.where(ids >= 0, unit[ids.clamp(min=0)], FIXED)


def _constant_along(names: Tensor, along: frozenset[int]) -> bool:
    first = names
    for a in along:
        first = first.narrow(a, 0, 1)
    return bool((names == first).all())


def _decided_without(ids: Tensor, along: frozenset[int], leaving: Tensor) -> bool:
    """Whether what can be removed is constant along these axes and varies along another, or nothing can be removed."""
    names = _names(ids, leaving)
    if bool((names == FIXED).all()):
        return True
    rest = axes(ids) - along
    return bool(rest) and _constant_along(names, along)


def _uniform(ids: Tensor, along: frozenset[int], unit: Tensor) -> bool:
    """Whether all ids on every line along these axes are in one unit, and the ids vary along other axes too."""
    return bool(axes(ids) - along) and _constant_along(_names(ids, unit), along)


def _make_slabs(ids: Tensor, leaving: Tensor, tied: Partition, locks: list[tuple[Tensor, str]]) -> bool:
    """Tie ids until a single axis decides which positions are removed. Returns whether anything had to be tied."""
    names = _names(ids, leaving)
    vary = axes(ids)
    if any(_constant_along(names, vary - {a}) for a in vary):
        return False
    # Take the axis that leaves the most units free; of equal ones the last, because the sizes of blocks are often
    # literals in the forward.
    best, count = max(vary), 0
    for a in sorted(vary):
        lines = names.movedim(a, 0).reshape(names.shape[a], -1)
        trial = Partition()
        whole = lines >= 0
        trial.unite(torch.where(whole, lines, -1), lines.max(1, keepdim=True).values)
        classes = trial.labels(int(names.max()) + 1)
        free = len(classes[lines[whole]].unique())
        if free >= count:
            best, count = a, free
    lines = ids.movedim(best, 0).reshape(ids.shape[best], -1)
    stays = names.movedim(best, 0).reshape(ids.shape[best], -1) == FIXED
    tied.unite(lines, lines.max(1, keepdim=True).values)
    mixed = stays.any(1) & ~stays.all(1)
    if bool(mixed.any()):
        locks.append((_real(lines[mixed]), "leaves together with positions of a fixed size"))
    return True
