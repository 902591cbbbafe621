"""Find elements of module lists that can leave whole: blocks that a skip connection leads around.

An element of an `nn.ModuleList` or `nn.Sequential` is a candidate if, on the graph, one value enters it and one value
of the same shape leaves it, and if a path of sums, norms and activations without weights of its own leads from the one
to the other. Without the element, what enters it passes on. Names of classes play no part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, fx, nn

from coreprune.graph.captured import Captured
from coreprune.graph.execution import overwritten, varying
from coreprune.graph.ops import op_name

_PRODUCT_AXES = 2  # a parameter with so many axes mixes channels


@dataclass(frozen=True, eq=False)
class Element:
    """One element of a list of modules.

    name: its dotted name. entry, exit: the values that enter and leave it. nodes: what it computes, the exit included.
    tensors: the names of its parameters and buffers.
    """

    name: str
    entry: fx.Node
    exit: fx.Node
    nodes: frozenset[fx.Node]
    tensors: frozenset[str]


def elements(captured: Captured, model: nn.Module) -> tuple[dict[str, Element], dict[str, str]]:
    """The elements that may leave, and why others may not, both by name in the order of the modules.

    captured: the graph of the model; its nodes are those of the elements. The model gives the lists of modules.
    """
    inside: dict[str, list[fx.Node]] = {}
    for node in captured.graph.graph.nodes:
        for name in _within(node):
            inside.setdefault(name, []).append(node)
    moving, written = varying(captured), overwritten(captured.graph.graph.nodes)
    found: dict[str, Element] = {}
    refused: dict[str, str] = {}
    for name in _members(model):
        nodes = frozenset(inside.get(name, ()))
        own = _tensors(captured, name)
        if not own and not any(len(n.all_input_nodes) for n in nodes):
            continue
        element = _element(captured, name, nodes, own, moving)
        if isinstance(element, str):
            refused[name] = element
        elif nodes & written:
            refused[name] = "it writes into parts of tensors"
        else:
            found[name] = element
    return found, refused


def _within(node: fx.Node) -> Iterator[str]:
    """The dotted names of the modules in whose forward a node was recorded, and of the lists that hold them."""
    seen: set[str] = set()
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        parts = str(path).split("@")[0].split(".")  # a second call is path@1
        seen.update(".".join(parts[:i]) for i in range(1, len(parts) + 1))
    yield from seen


def _members(model: nn.Module) -> Iterator[str]:
    """The names of all elements of lists with two elements or more."""
    for path, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
            yield from (f"{path}.{key}" if path else key for key, _ in module.named_children())


def _tensors(captured: Captured, name: str) -> frozenset[str]:
    return frozenset(own for alias, own in captured.aliases.items() if alias.startswith(f"{name}."))


def _element(
    captured: Captured, name: str, nodes: frozenset[fx.Node], own: frozenset[str], moving: set[fx.Node]
) -> Element | str:
    """One element, or why it has to stay."""
    shared = [alias for alias, held in captured.aliases.items() if held in own and not alias.startswith(f"{name}.")]
    if shared:
        return f"its weights are those of {shared[0]}, too"
    calls = [n for n in nodes if n.op == "call_function"]
    if not calls:
        return "its forward is not called"
    if not own:
        return "it has no weights"
    leaving = [n for n in calls if any(user not in nodes for user in n.users)]
    if len(leaving) != 1 or not _is_tensor(leaving[0]):
        return f"{len(leaving)} values leave it"
    (last,) = leaving
    given = dict.fromkeys(m for n in calls for m in n.all_input_nodes if m not in nodes and m in moving)
    entries = [n for n in given if _alike(n, last) and _skips(captured, n, last, nodes, moving)]
    if len(entries) != 1:
        return "no skip connection leads around it" if not entries else "several values are carried around it"
    return Element(name, entries[0], last, nodes, own)


def _skips(captured: Captured, entry: fx.Node, last: fx.Node, nodes: frozenset[fx.Node], moving: set[fx.Node]) -> bool:
    """Whether a path without products leads from the entry to the exit, through at least one sum of two values."""
    reached: dict[fx.Node, bool] = {entry: False}  # whether a sum lies on the way
    for node in captured.graph.graph.nodes:
        if node not in nodes or not _alike(node, last) or _mixes(captured, node):
            continue
        ways = [reached[n] for n in node.all_input_nodes if n in reached]
        if ways:
            summed = _is_sum(node) and sum(n in moving and _alike(n, last) for n in node.all_input_nodes) > 1
            reached[node] = summed or any(ways)
    return reached.get(last, False)


def _mixes(captured: Captured, node: fx.Node) -> bool:
    """Whether a node reads a weight with two axes or more, or whatever else is not done to one number at a time."""
    for read in node.all_input_nodes:
        kind, name = captured.sources.get(read.name, ("", "")) if read.op == "placeholder" else ("", "")
        if kind == "parameter" and len(captured.tensors[name][0]) >= _PRODUCT_AXES:
            return True
    return False


def _is_sum(node: fx.Node) -> bool:
    return op_name(node) == "add"


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values have one shape and dtype."""
    x, y = a.meta.get("val"), b.meta.get("val")
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype


def apart(one: Element, other: Element) -> bool:
    """Whether two elements have no node in common."""
    return not one.nodes & other.nodes


def named(captured: Captured, model: nn.Module, names: Collection[str]) -> dict[str, Element]:
    """The elements of these names on another graph of the model; those that are not found are left out."""
    found, _ = elements(captured, model)
    return {name: found[name] for name in names if name in found}
