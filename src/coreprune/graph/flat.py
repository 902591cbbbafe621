"""Graphs without graphs inside: regions of autocast and of gradient modes are written out in place."""

from __future__ import annotations

from typing import Any

from torch import fx

from coreprune.graph.ops import operation


def flatten(module: fx.GraphModule) -> fx.GraphModule:
    """Replace every call of a region by the operations inside, in place, and drop checks of dtypes.

    The operations then run without autocast, in the precision of their inputs. That is what selection and repair need;
    the pruned model keeps its autocast.
    """
    graph = module.graph
    _note_users(graph)
    for node in list(graph.nodes):
        kind = operation(node).kind if node.op == "call_function" else ""
        if kind == "region":
            _write_out(module, node)
        elif kind == "check" and not node.users:
            graph.erase_node(node)
    graph.lint()
    module.recompile()
    return module


def _note_users(graph: fx.Graph) -> None:
    """Note again who reads each node: torch.export forgets some readers when it makes a region."""
    for node in graph.nodes:
        node.users.clear()
    for node in graph.nodes:
        for read in node.all_input_nodes:
            read.users[node] = None


def _write_out(module: fx.GraphModule, node: fx.Node) -> None:
    at = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
    place: Any = node.args[at]
    inner = flatten(getattr(module, place.target))
    given: dict[fx.Node, Any] = dict(
        zip((n for n in inner.graph.nodes if n.op == "placeholder"), node.args[at + 1 :], strict=True)
    )
    for held in inner.graph.nodes:
        if held.op == "get_attr":  # a tensor, which moves out together with its node
            name = next(n for i in range(1 << 30) if not hasattr(module, n := f"{held.target}_{i}"))
            setattr(module, name, getattr(inner, held.target))
            held.target = name
    with module.graph.inserting_before(node):
        result: Any = module.graph.graph_copy(inner.graph, given)
    for user in list(node.users):  # the region returns a tuple
        user.replace_all_uses_with(result[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(node)
    if not place.users:
        module.graph.erase_node(place)
