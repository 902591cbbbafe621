"""Cut a graph into segments at its narrow places, where little of what was computed is needed later."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, fx

from coreprune.graph.captured import Captured
from coreprune.graph.execution import alive, overwritten, varying

_FEW = 2  # layers of a segment; with fewer, what is kept between segments is as much as what is inside of them


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive nodes of a graph.

    nodes: in order. outer: nodes without inputs (parameters, inputs of the model, constants) that are read here and
    stand in another segment; they can be run anew. entries: the other values from earlier segments that are read here.
    exits: the values made here that later segments read.
    """

    nodes: tuple[fx.Node, ...]
    outer: tuple[fx.Node, ...]
    entries: tuple[fx.Node, ...]
    exits: tuple[fx.Node, ...]


def segments(captured: Captured) -> tuple[Segment, ...]:
    """All nodes of a graph, in segments; one segment if the graph has no narrow place.

    Between two layers that follow each other, the place with the fewest entries alive is a candidate. Those of them
    that have no more entries than the candidates before and behind them are narrow places: the residual stream between
    the blocks of a network, an image that a pooling made smaller, every activation of a chain of equal layers. Whatever
    else is alive there, such as skip connections or the output of an encoder, is carried along.
    """
    nodes = list(captured.graph.graph.nodes)
    cuts = _cuts(captured, nodes)
    return tuple(_segment(nodes, start, stop) for start, stop in zip([0, *cuts], [*cuts, len(nodes)], strict=True))


def _cuts(captured: Captured, nodes: list[fx.Node]) -> list[int]:
    """Positions in front of which a segment ends."""
    moving, written = varying(captured), overwritten(nodes)
    counted = [n for n in nodes if n in written or not _free(n)]
    found: list[tuple[float, int]] = []  # the fewest entries alive behind every layer but the last, and where
    best: tuple[float, int] | None = None
    for i, (node, live) in enumerate(alive(nodes, frozenset(counted).__contains__)):
        if any(_is_weight(captured, n) for n in node.all_input_nodes):
            found += [best] if best is not None else []
            best = (math.inf, i)
        if best is None:
            continue
        values = [n.meta.get("val") for n in live if n in moving]
        # A later write must not change what was kept, and only tensors are kept.
        fits = not any(n in written for n in live) and all(isinstance(v, Tensor) for v in values)
        size = sum(v.numel() for v in values if isinstance(v, Tensor)) if fits else math.inf
        if size <= best[0]:
            best = (size, i + 1)
    sizes = [math.inf, *(size for size, _ in found), math.inf]
    cuts, since = [], 0
    for (size, at), before, after in zip(found, sizes, sizes[2:], strict=False):
        since += 1
        if math.isfinite(size) and size <= min(before, after) and since >= _FEW:
            cuts.append(at)
            since = 0
    return cuts


def _segment(nodes: list[fx.Node], start: int, stop: int) -> Segment:
    part = nodes[start:stop]
    inside = set(part)
    read = [n for n in dict.fromkeys(n for node in part for n in node.all_input_nodes) if n not in inside]
    exits = [n for n in part if not _free(n) and any(user not in inside for user in n.users)]
    return Segment(
        tuple(part), tuple(n for n in read if _free(n)), tuple(n for n in read if not _free(n)), tuple(exits)
    )


def _free(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr")


def _is_weight(captured: Captured, node: fx.Node) -> bool:
    kind, name = captured.sources.get(node.name, ("", ""))
    return node.op == "placeholder" and kind == "parameter" and len(captured.tensors[name][0]) > 1
