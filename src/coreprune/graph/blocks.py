"""Cut a graph into blocks: stretches of nodes that one value leads into and one value leads out of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from coreprune.graph.execution import alive, dependents

_FEW, _MANY = 2, 4  # weights of a block


@dataclass(frozen=True, eq=False)
class Block:
    """A stretch of the nodes that depend on what was changed.

    nodes: in order. entry: the value of the block before that the nodes read; None for the first block. exits: the
    values that later nodes read: one tensor, or for the last block everything that the graph returns. reads: the other
    values that the nodes read, which do not depend on what was changed, except for the parameters among them.
    """

    nodes: tuple[fx.Node, ...]
    entry: fx.Node | None
    exits: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]


def is_real(node: fx.Node) -> bool:
    """Whether a node stands for one tensor of floating-point numbers."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def blocks(
    nodes: Sequence[fx.Node],
    changed: Collection[fx.Node],
    weight: Callable[[fx.Node], bool],
    ends: Callable[[fx.Node], bool] = is_real,
) -> tuple[Block, ...]:
    """The blocks of a graph, in order. Together they hold every node that depends on the changed ones.

    A block ends at a cut vertex: of all that was computed so far, later nodes read one tensor only, and what does not
    depend on the changed nodes. Blocks are made large enough for their layers to make up for each other: at least two
    weights, and from then on up to the next narrow place, where the value is not larger than at the next cut vertex,
    or up to four weights. The last layer is often a block of its own, because what comes before it is compared there.
    An activation belongs to the block before it, and a pooling to the block behind it, which has more to compare.

    nodes: all of the graph, in order. changed: those that differ: the placeholders of tensors that were changed, and
    calls with other numbers (sizes) in their arguments. weight: whether a node is the placeholder of a weight (a
    parameter with two axes or more). ends: whether a block may end with the value of a node.
    """

    def weights(block: Block) -> int:
        return len({n for node in block.nodes for n in node.all_input_nodes if weight(n)})

    out: list[Block] = []
    grows = False
    layers = _layers(_pieces(nodes, set(changed), ends), weights)
    followers: list[Block | None] = [*layers[1:], None]
    for layer, after in zip(layers, followers, strict=False):
        out.append(_joined(out.pop(), layer) if grows else layer)
        count, narrow = weights(out[-1]), after is None or after is layers[-1] or _entries(layer) <= _entries(after)
        grows = count < _FEW or (count < _MANY and not narrow)
    entries = [None, *(block.exits[0] for block in out)]
    return tuple(_read(block, entry) for block, entry in zip(out, entries, strict=False))


def _pieces(nodes: Sequence[fx.Node], changed: set[fx.Node], ends: Callable[[fx.Node], bool]) -> list[Block]:
    """The stretches between all cut vertices, without entry and sides."""
    carried = {n for n in dependents(nodes, changed) if n.op not in ("placeholder", "output")}
    out: list[Block] = []
    part: list[fx.Node] = []
    live: Mapping[fx.Node, None] = {}
    for node, live in alive(nodes, carried.__contains__):
        if node not in carried:
            continue
        part.append(node)
        if len(live) == 1 and ends(next(iter(live))):
            out.append(Block(tuple(part), None, tuple(live), ()))
            part = []
    if part:
        out.append(Block(tuple(part), None, tuple(live), ()))
    return out


def _layers(pieces: list[Block], weights: Callable[[Block], int]) -> list[Block]:
    """The pieces, each with at least one weight, unless there is none in the graph."""
    out: list[Block] = []
    for piece in pieces:
        activation = not weights(piece) and bool(out) and _entries(piece) == _entries(out[-1])
        if activation or (out and not weights(out[-1])):
            out[-1] = _joined(out[-1], piece)
        else:
            out.append(piece)
    if len(out) > 1 and not weights(out[-1]):
        out[-2:] = [_joined(out[-2], out[-1])]
    return out


def _joined(first: Block, second: Block) -> Block:
    return Block(first.nodes + second.nodes, None, second.exits, ())


def _read(block: Block, entry: fx.Node | None) -> Block:
    """The same block, with what it reads."""
    inside = {entry, *block.nodes}
    reads = dict.fromkeys(n for node in block.nodes for n in node.all_input_nodes if n not in inside)
    return Block(block.nodes, entry, block.exits, tuple(reads))


def _entries(block: Block) -> int:
    return sum(node.meta["val"].numel() for node in block.exits if is_real(node))
