"""What the outputs lose without each element of a module list, to first order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, fx

from coreprune import _ranks
from coreprune.graph import Element


class ElementLosses:
    """Measures, on the walk that collects the statistics, what the outputs lose with each element.

    Without an element, the value at its exit changes by Δ. With the gradient g of a random projection of the outputs,
    whose errors are shares of their variance, the loss is the mean over the queries of ⟨g, Δ⟩². So it is in the units
    of the error curves. Other than there, changes at several positions of one query add up before they are squared:
    what a block does is alike at many positions, and what is left by a refit is not.

    elements: on the graph of the calibration.
    """

    def __init__(self, elements: Iterable[Element] = ()) -> None:
        self.elements = tuple(elements)
        self._sums: dict[str, float] = {}
        self._exits = {e.exit for e in self.elements}
        self._entries = {e.entry for e in self.elements}
        self._entered: dict[fx.Node, Any] = {}
        self._change: dict[str, Tensor] = {}

    def found(self) -> dict[str, float]:
        """The losses by name; nothing for elements that the outputs have no gradient at.

        Of several processes, each has seen some of the batches, and all get the same sums.
        """
        seen = _ranks.gathered("the losses of the blocks", self._sums)
        names = dict.fromkeys(name for mine in seen for name in mine)
        return {name: math.fsum(mine.get(name, 0.0) for mine in seen) for name in names}

    def weighs(self, node: fx.Node) -> bool:
        """Whether the gradient at a node is needed."""
        return node in self._exits

    def enters(self, node: fx.Node) -> bool:
        """Whether a node's value enters an element."""
        return node in self._entries

    def see(self, node: fx.Node, value: Any, earlier: Callable[[fx.Node], Any]) -> None:
        """Note the value of a node for one batch. earlier: gives values that an earlier segment made."""
        if node in self._entries:
            self._entered[node] = value.detach()
        if node not in self._exits:
            return
        for e in self.elements:
            if e.exit is node:
                before = self._entered[e.entry] if e.entry in self._entered else earlier(e.entry)
                self._change[e.name] = before.to(value.device) - value.detach()

    def add(self, node: fx.Node, gradient: Tensor, samples: int, batches: int) -> None:
        """Add what one batch shows of the elements that end with a node. samples: of a batch."""
        for e in self.elements:
            if e.exit is node:
                product = (gradient * self._change[e.name]).double()
                # The noise of the projection is independent from query to query: together they are right on average.
                each = product.flatten(1).sum(1) if product.shape[0] == samples else product.sum()
                total = float(each.square().sum()) / (samples * batches)
                self._sums[e.name] = self._sums.get(e.name, 0.0) + total

    def forget(self) -> None:
        """Drop what belongs to one batch and segment."""
        self._entered.clear()
        self._change.clear()
