"""Run the exported graph on numbers, with some channels set to zero where they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from coreprune.graph.captured import Captured

# node -> for some of its inputs (the node that is read, the factor of every element)
Masks = Mapping[str, list[tuple[str, Tensor]]]


class _Masked(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, masks: Masks, skips: Mapping[str, str]) -> None:
        super().__init__(module, garbage_collect_values=not skips)
        self._masks, self._skips = masks, skips

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self._skips:
            entry = self._skips[n.name]
            return next(value for node, value in self.env.items() if node.name == entry)
        if n.name not in self._masks:
            return super().run_node(n)
        factors = dict(self._masks[n.name])

        def fetch(node: fx.Node) -> Any:
            value = self.env[node]
            return value * factors[node.name].to(value.device) if node.name in factors else value

        args, kwargs = map_arg((n.args, n.kwargs), fetch)
        with self._set_current_node(n):
            return getattr(self, n.op)(n.target, args, kwargs)


def replay(
    captured: Captured,
    model: nn.Module,
    replaced: Mapping[str, Tensor],
    masks: Masks,
    skips: Mapping[str, str] | None = None,
) -> list[Tensor]:
    """Run the captured graph on its example, and return the tensors of its output.

    Args:
        captured: the graph and its example.
        model: where parameters and buffers come from.
        replaced: tensors to use in place of the model's own, by canonical name.
        masks: factors to multiply inputs by, before a node reads them.
        skips: names of nodes whose value is that of an earlier node, given by its name.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), **replaced}
    inputs = iter(pytree.tree_leaves((captured.args, captured.kwargs)))
    feed = []
    for node in captured.graph.graph.nodes:
        if node.op == "placeholder":
            kind, name = captured.sources.get(node.name, ("input", node.name))
            if kind == "input":
                feed.append(next(inputs))
            else:
                feed.append(captured.constants[node.name] if kind == "constant" else tensors[name])
    with torch.no_grad():
        result = _Masked(captured.graph, masks, skips or {}).run(*feed)
    return [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
