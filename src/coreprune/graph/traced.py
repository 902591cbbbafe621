"""A model together with its graph and its groups of channels. All later steps work on it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, nn

from coreprune.graph.captured import Captured
from coreprune.graph.check import Check
from coreprune.graph.costs import CostModel
from coreprune.graph.groups import Group, lock
from coreprune.graph.members import Element, elements
from coreprune.graph.remembered import numbers_read
from coreprune.graph.tracked import Slot

_KEPT = ("check", "numbers_read", "elements")  # what does not depend on the groups


@dataclass(frozen=True, eq=False)
class Traced:
    """One model, traced.

    Attributes:
        model: the model that was captured; it is not changed.
        captured: its graph, from `capture`.
        groups: from `find_groups`, free or locked, in the order of the layers that make them.
        dropped: the elements of module lists that are to leave whole. The groups inside them are locked.
        whole: the same with all elements; None if none is to leave.
        plain: names of the weights that are parameters in `model`, which is then a copy, and that the user's model
            computes from other tensors.
    """

    model: nn.Module
    captured: Captured
    groups: Sequence[Group]
    plain: tuple[str, ...] = ()
    dropped: tuple[Element, ...] = ()
    whole: Traced | None = None

    @cached_property
    def free(self) -> dict[str, Group]:
        """The groups that may shrink, by name."""
        return {g.name: g for g in self.groups if g.locked_because is None}

    @cached_property
    def cost_model(self) -> CostModel:
        """The cost of the model at any widths of its groups."""
        return CostModel(self.captured, self.groups, self.dropped)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer of the model by dotted name, detached."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: tensor.detach() for name, tensor in named}

    @cached_property
    def check(self) -> Check:
        """How pruned copies are compared with the model."""
        return Check(self.model, self.captured)

    @cached_property
    def numbers_read(self) -> frozenset[Slot]:
        """The numbers that modules remember and that the forward gives to a function of torch."""
        return frozenset() if self.check.blind else numbers_read(self.check.oracle)

    @cached_property
    def elements(self) -> tuple[dict[str, Element], dict[str, str]]:
        """The elements of module lists that may leave, and why others may not, by name."""
        return elements(self.captured, self.model)

    def dropping(self, more: Sequence[Element]) -> Traced:
        """The same, with further elements that are to leave."""
        lost = {name for element in more for name in element.tensors}
        inside = [g for g in self.groups if g.slices and all(s.param in lost for s in g.slices)]
        new = self.locking({g.name: f"it is inside of {_around(g, more)}, which was dropped" for g in inside})
        place = {n: i for i, n in enumerate(self.captured.graph.graph.nodes)}
        gone = sorted([*self.dropped, *more], key=lambda e: place[e.exit])
        new = replace(new, dropped=tuple(gone), whole=self.whole or self)
        vars(new).update({key: vars(self)[key] for key in _KEPT if key in vars(self)})
        return new

    def locking(self, reasons: Mapping[str, str]) -> Traced:
        """The same, with the named groups locked. reasons: group name -> why."""
        if not reasons:
            return self
        return self._with([lock(g, reasons[g.name]) if g.name in reasons else g for g in self.groups])

    def flagging(self, names: Collection[str], flag: str) -> Traced:
        """The same, with a flag on the named groups."""
        return self._with([replace(g, flags=g.flags | {flag}) if g.name in names else g for g in self.groups])

    def _with(self, groups: Sequence[Group]) -> Traced:
        new = replace(self, groups=groups)
        vars(new).update({key: vars(self)[key] for key in _KEPT if key in vars(self)})
        return new


def _around(group: Group, gone: Sequence[Element]) -> str:
    """The element that a group is inside of."""
    return next(e.name for e in gone if any(s.param in e.tensors for s in group.slices))
