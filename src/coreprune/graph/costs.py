"""The cost of a model, as an exact function of the widths of its groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coreprune.graph.captured import Captured
from coreprune.graph.groups import Group
from coreprune.graph.members import Element
from coreprune.graph.tracer import Work
from coreprune.graph.unionfind import one_thread
from coreprune.graph.values import axes

Array = np.ndarray


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates for one sample, parameters, and bytes of parameters and buffers.

    A sample of a model without a batch is a whole example.
    """

    macs: int
    params: int
    bytes: int


class CostModel:
    """The cost of a captured model at any widths. It is made once, and then evaluated in microseconds.

    Every term is factor * prod (kept elements along an axis) / divisor. The number of kept elements along an axis is a
    constant, plus for every group the number of its channels that stay times the elements per channel. MACs are those
    of convolutions, linear layers and attention products, as in `torch.utils.flop_counter` (which counts two flops per
    MAC).
    """

    def __init__(self, captured: Captured, groups: Sequence[Group], gone: Sequence[Element] = ()) -> None:
        """gone: elements that have left, whose operations and weights cost nothing."""
        with one_thread():
            self._collect(captured, groups, gone)

    def _collect(self, captured: Captured, groups: Sequence[Group], gone: Sequence[Element]) -> None:
        idle = {n.name for element in gone for n in element.nodes}
        lost = {name for element in gone for name in element.tensors}
        self.groups = groups
        self.names = [g.name for g in groups]
        self._sizes = np.array([g.size for g in groups], dtype=np.float64)
        self._axes: list[tuple[int, dict[int, float]]] = [(1, {})]  # factor 0 is the constant 1
        self._making: list[tuple[int, int]] = []  # a term of the MACs, and the axis of the channels that it makes
        tracer = captured.channel_ids
        owner = torch.full((max(tracer.count, 1),), -1)
        for i, g in enumerate(groups):
            owner[g.ids] = i
        terms = {"macs": [], "params": [], "bytes": []}
        free = torch.tensor([g.locked_because is None for g in groups] + [False])  # the last: of no group
        for w in tracer.work:
            if w.node in idle:
                continue
            factor, maps = _apart(w, [set(owner[ids[ids >= 0]][free[owner[ids[ids >= 0]]]].tolist()) for ids in w.maps])
            kept = {i: self._axis(w.maps[i], owner) for i in maps}
            if w.made is not None:
                made = kept[w.made] if w.made in kept else self._axis(w.maps[w.made], owner)
                self._making.append((len(terms["macs"]), made))
            terms["macs"].append((factor, list(kept.values())))
        slots = {(s.param, s.dim): s for s in [*tracer.slots.values(), *tracer.sectioned]}
        for name, (shape, dtype) in captured.tensors.items():
            if name in lost:
                continue
            factor, kept = 1.0, []
            for dim, n in enumerate(shape):
                slot = slots.get((name, dim))
                if slot is None:
                    factor *= n
                else:
                    kept.append(self._axis(slot.ids, owner))
                    factor /= slot.ids.shape[0] if slot.ids.dim() == 2 else 1
            if name in captured.parameters:
                terms["params"].append((factor, kept))
            terms["bytes"].append((factor * dtype.itemsize, kept))
        self._constant = np.array([c for c, _ in self._axes], dtype=np.float64)
        self._slope = np.zeros((len(self._axes), len(groups)))
        for row, (_, slope) in enumerate(self._axes):
            for g, s in slope.items():
                self._slope[row, g] = s
        self._terms = {kind: _table(t) for kind, t in terms.items()}

    def _axis(self, ids: Tensor, owner: Tensor) -> int:
        """Register an axis; its length is constant + sum over groups of slope * width."""
        flat = ids.reshape(-1)
        real = flat >= 0
        owners = torch.where(real, owner[flat.clamp(min=0)], -1)
        slope = {}
        for g, n in zip(*[t.tolist() for t in owners[owners >= 0].unique(return_counts=True)], strict=True):
            slope[g] = n / self.groups[g].size
        self._axes.append((int((owners < 0).sum()), slope))
        return len(self._axes) - 1

    def widths(self, widths: Mapping[str, int] | None = None) -> Array:
        """The vector of widths, in channels; groups that are not named have their full size."""
        vector = self._sizes.copy()
        for i, name in enumerate(self.names):
            if widths and name in widths:
                vector[i] = widths[name]
        return vector

    def __call__(self, widths: Mapping[str, int] | Array | None = None) -> Cost:
        """The cost at these widths: group name -> number of channels that stay, or the vector from `widths()`."""
        vector = widths if isinstance(widths, np.ndarray) else self.widths(widths)
        kept = self._constant + self._slope @ vector
        macs, params, size = (self._total(kind, kept) for kind in ("macs", "params", "bytes"))
        return Cost(macs, params, size)

    def _total(self, kind: str, kept: Array) -> int:
        factor, index = self._terms[kind]
        return round(float((factor * kept[index].prod(1)).sum()))

    def making(self, widths: Mapping[str, int] | None = None) -> dict[str, int]:
        """For every group, the MACs of the convolutions and linear layers whose outputs are its channels.

        If a layer makes channels of several groups, its MACs are divided in proportion to the channels. Products of
        activations (attention) and recurrent layers belong to no group, so the sum may be less than the model's MACs.
        """
        vector = self.widths(widths)
        kept = self._constant + self._slope @ vector
        factor, index = self._terms["macs"]
        made = np.zeros(len(self.groups))
        for term, axis in self._making:
            spent = factor[term] * kept[index[term]].prod()
            if spent:
                made += spent * self._slope[axis] * vector / kept[axis]
        return dict(zip(self.names, np.rint(made).astype(int).tolist(), strict=True))

    def shares(self, kind: str = "macs") -> dict[str, float]:
        """For every group, the share of the cost that is saved if only one of its units stays."""
        full = getattr(self(), kind)
        out = {}
        for g in self.groups:
            low = getattr(self({g.name: g.unit}), kind)
            out[g.name] = (full - low) / full if full else 0.0
        return out

    def free_share(self, kind: str = "macs") -> float:
        """The share of the cost that is saved if every free group shrinks to one unit (one per section)."""
        least = {g.name: _least(g) for g in self.groups if g.locked_because is None}
        full = getattr(self(), kind)
        return 1 - getattr(self(least), kind) / full if full else 0.0


def _apart(work: Work, free: Sequence[set[int]]) -> tuple[float, list[int]]:
    """The factor of a product of maps, and which maps it is of: every position along an axis counts once.

    Several maps may vary along one axis, such as the tokens of a window, which two tables of biases have entries for.
    Exact as long as the groups that may be pruned meet on no axis.

    free: for every map, the groups among its owners that may be pruned.
    """
    factor, used, seen, kept = work.factor / work.divisor, set[int](), set[int](), []
    for i in sorted(range(len(work.maps)), key=lambda i: (not free[i], -work.maps[i].numel(), i)):
        ids, where = work.maps[i], axes(work.maps[i])
        if where <= used and free[i] <= seen and where:
            continue  # its positions are counted, and nothing else makes them fewer
        factor /= math.prod(ids.shape[a] for a in where & used)
        used, seen = used | where, seen | free[i]
        kept.append(i)
    return factor, sorted(kept)


def _least(g: Group) -> int:
    return g.unit * g.section_count


def _table(terms: list[tuple[float, list[int]]]) -> tuple[Array, Array]:
    most = max((len(a) for _, a in terms), default=0) or 1
    factor = np.array([f for f, _ in terms], dtype=np.float64)
    index = np.zeros((len(terms), most), dtype=np.int64)
    for row, (_, kept) in enumerate(terms):
        index[row, : len(kept)] = kept
    return factor, index


def cost(captured: Captured, groups: Sequence[Group], widths: Mapping[str, int] | None = None) -> Cost:
    """The cost at the given widths (channels that stay, by group name; all of them by default).

    For many widths, make one `CostModel` and call it.
    """
    return CostModel(captured, groups)(widths)
