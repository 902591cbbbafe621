"""The original and the pruned model, run through the same graph side by side, node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from coreprune import _ranks
from coreprune.graph import Element
from coreprune.graph.execution import Execution, overwritten
from coreprune.graph.over_kept import over_kept
from coreprune.pruning.calibration.calibration import Calibration
from coreprune.pruning.layer.linear_maps import Operator
from coreprune.pruning.repair.products import Mix
from coreprune.pruning.repair.residual_paths import Path, path_of, schedule


@dataclass(frozen=True, eq=False)
class Cut:
    """The original and the pruned model, both in the original's shapes.

    original: the original's tensors by name. start: those of the pruned model, from `weights_after`.
    masks: (name, axis) -> which positions stay. mixes: by name of the weight, for layers that are to compute something
    else than the original's layer; `start` has their new weights. gone: the elements, on the graph of the calibration,
    that the pruned model has no more: there what enters passes on.
    """

    original: Mapping[str, Tensor]
    start: Mapping[str, Tensor]
    masks: Mapping[tuple[str, int], Tensor]
    mixes: Mapping[str, Mix] = field(default_factory=dict)
    gone: tuple[Element, ...] = ()


class Walk:
    """The executions of both models, and what is known about the layers.

    order: the nodes as they are run. end: how many of them there are up to the last layer; nothing needs to run after
    that. operators, paths: the layers by node, and what follows each. full, small: the original and the pruned model,
    whose tensors the refits change. masks, mixes: as in `Cut`. share: the batches of this process. count, samples: of
    all batches. padding, kinds: of the calibration.
    """

    def __init__(self, both: Cut, calibration: Calibration) -> None:
        captured = calibration.captured
        self.share = _ranks.share(len(calibration.batches))  # of several processes, each runs some of the batches
        self.count, batches = len(calibration.batches), [calibration.batches[b] for b in self.share.numbers]
        self._skipped = frozenset(n for e in both.gone for n in e.nodes)
        self._passed = {e.exit: e.entry for e in both.gone}
        self._held: dict[fx.Node, Any] = {}  # what passes on
        found = {n: o for n, o in calibration.operators.items() if o.node not in self._skipped}
        original, masks = both.original, both.masks
        self.captured, self.masks, self.mixes = captured, masks, both.mixes
        self.samples = sum(map(captured.axes.size, calibration.batches))
        self.full = Execution(captured, original, batches, calibration.shelf.put)
        # Equal tensors become the same object, so that only what changed is run again.
        same = {n: original[n] if torch.equal(t, original[n]) else t for n, t in both.start.items()}
        self._norms = over_kept(captured, masks)
        self.small = Execution(captured, same, batches, calibration.shelf.put, self._norms)
        nodes = list(captured.graph.graph.nodes)
        cut = {o.node for o in found.values() if (o.weight, o.in_dim) in masks}
        first = {o.node: path_of(o, captured) for o in found.values()}
        # Layers that lost inputs come first when residual sums are assigned to layers.
        _, paths = schedule(nodes, {n: p for n, p in first.items() if n in cut})
        taken = {p.join for p in paths.values() if p.join is not None}
        rest = {
            n: p if p.join not in taken else Path(p.norm, p.steps, None, None) for n, p in first.items() if n not in cut
        }
        self.order, self.paths = schedule(nodes, {n: paths.get(n) or rest[n] for n in nodes if n in first})
        self.operators = {o.node: o for o in found.values()}
        self._cut = cut
        self.padding, self.kinds = calibration.padding_of, calibration.kinds
        self._tainted = overwritten(nodes)  # for these nodes, both models need their own memory
        # Nothing needs to run after the last layer. Where it is linear, its outputs, such as the logits of a language
        # model, are made for the rows that are fitted alone: all of them are larger than everything before.
        self.end = 1 + max((i for i, n in enumerate(self.order) if n in self.operators), default=-1)
        last = [n for n in self.order[: self.end][-1:] if n not in self._tainted | self._skipped]
        self.unread = {n for n in last if not self.operators[n].kernel and self.paths[n].join is None}

    def lead(self, node: fx.Node) -> None:
        """Run a node in the original."""
        if node not in self.full.values and node not in self.unread:
            self.full.run(node)

    def refittable(self, node: fx.Node, producers: bool) -> bool:
        """Whether a node is a layer that has lost inputs. producers: or whose input has changed."""
        operator = self.operators.get(node)
        return operator is not None and (node in self._cut or (producers and operator.source in self._tainted))

    def follow(self, node: fx.Node) -> None:
        """Run a node in the pruned model; where nothing has changed, take what the original has made."""
        if node in self.unread:
            return
        if node in self._skipped:
            if node in self._passed:
                self._tainted.add(node)
                self.small.values[node] = self._held.pop(node)
                self._hold(node)
            return
        reads = [n for n in node.all_input_nodes]
        if node in self._norms or any(n in self._tainted or self._parameter_changed(n) for n in reads):
            self._tainted.add(node)
            self.small.run(node)
        else:
            self.small.values[node] = self.full.values[node]
        self._hold(node)

    def ahead(self, path: Path) -> None:
        """Run the original up to the residual sum."""
        for step in (*path.steps, path.join):
            if step is not None and step not in self.full.values:
                self.full.run(step)

    def computed(self, operator: Operator, source: Tensor, rows: Tensor | None, kept: Tensor | None = None) -> Tensor:
        """What a linear layer of the original computes of some rows of its input, (1, rows, o). kept: some outputs."""
        tensors: dict[str, Tensor] = self.full.tensors  # type: ignore[assignment]
        matrix = operator.matrix(tensors[operator.weight])
        bias = None if operator.bias is None else tensors[operator.bias]
        if kept is not None:
            matrix, bias = matrix[:, kept], None if bias is None else bias[kept]
        y = operator.features(source, rows) @ matrix.mT
        return y if bias is None else y + bias

    def forget(self, nodes: Sequence[fx.Node]) -> None:
        """Drop values that nothing reads any more."""
        for node in nodes:
            self.full.values.pop(node, None)
            self.small.values.pop(node, None)

    def _hold(self, node: fx.Node) -> None:
        """Keep a value that passes on, which may be forgotten before the place where it does."""
        self._held.update({exit_: self.small.values[node] for exit_, entry in self._passed.items() if entry is node})

    def _parameter_changed(self, node: fx.Node) -> bool:
        kind, name = self.captured.sources.get(node.name, ("", "")) if node.op == "placeholder" else ("", "")
        return kind in ("parameter", "buffer") and self.small.tensors[name] is not self.full.tensors[name]
