"""Write operations that have no rule as those that torch makes them of.

This is done in the graph itself, so that tracing, repair and costs see the same operations. An operation stays where
torch has no parts for it, or where one of its parts has no rule either.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from coreprune.errors import first_line
from coreprune.graph.equations import pairs
from coreprune.graph.ops import op_name, operation
from coreprune.graph.rules.registry import RULES

log = logging.getLogger(__name__)


def _bilinear(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = torch.einsum("...oj,...j->...o", torch.einsum("...i,oij->...oj", a, weight), b)
    return out if bias is None else out + bias


def _addbmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * c + alpha * torch.bmm(a, b).sum(0)


# Of what other operations are made, where torch does not say.
_OURS = {torch.ops.aten.bilinear.default: _bilinear, torch.ops.aten.addbmm.default: _addbmm}


def decompose(module: fx.GraphModule) -> None:
    """Replace the operations of a flat graph that have no rule by others that have one."""
    _decompose(module, set())


def has_rule(node: fx.Node) -> bool:
    """Whether it is known what a node does to channels."""
    if operation(node).kind == "getitem" or op_name(node) in RULES:
        return True
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _decompose(module: fx.GraphModule, hopeless: set[Any]) -> None:
    changed = False
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if op_name(node) == "einsum" and len(node.args[1]) > 2:
            _in_pairs(node)
        elif has_rule(node) or node.target in hopeless:
            continue
        elif (parts := _parts(node, hopeless)) is None:
            hopeless.add(node.target)
            continue
        else:
            _inline(node, parts)
        changed = True
    if changed:
        module.graph.lint()
        module.recompile()


def _parts(node: fx.Node, hopeless: set[Any]) -> fx.GraphModule | None:
    """What a node does, as a graph of operations that all have rules; None if there is none."""
    operator = node.target
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]
    values = [leaves[i].meta.get("val") for i in at]
    mode = detect_fake_mode(values)
    if not isinstance(operator, OpOverload) or operator._schema.is_mutable or mode is None:
        return None

    def run(*tensors: Tensor) -> Any:
        given = dict(zip(at, tensors, strict=True))
        args, kwargs = pytree.tree_unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)], spec)
        return _OURS.get(operator, operator)(*args, **kwargs)

    table = {operator: decomposition_table[operator]} if operator in decomposition_table else {}
    try:
        with mode, torch.no_grad():
            parts = make_fx(run, decomposition_table=table)(*values)
    except Exception as error:  # whatever the error is, the operation stays
        log.debug("%s cannot be decomposed: %s", operator, first_line(error))
        return None
    inner = [n for n in parts.graph.nodes if n.op not in ("placeholder", "output")]
    if any(n.op != "call_function" or n.target == operator for n in inner):
        return None
    _decompose(parts, {*hopeless, operator})
    return parts if all(has_rule(n) for n in parts.graph.nodes if n.op == "call_function") else None


def _inline(node: fx.Node, parts: fx.GraphModule) -> None:
    """Put a graph in the place of a node."""
    env: dict[fx.Node, Any] = dict(zip(parts.graph.find_nodes(op="placeholder"), _arguments(node), strict=True))
    result: Any = None
    with node.graph.inserting_before(node):
        for part in parts.graph.nodes:
            if part.op == "output":
                result = pytree.tree_map_only(fx.Node, env.__getitem__, part.args[0])
            elif part.op == "call_function":
                env[part] = node.graph.node_copy(part, env.__getitem__)
                _place(env[part], node)
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):  # each takes one of several results
            user.replace_all_uses_with(result[user.args[1]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)


def _arguments(node: fx.Node) -> list[fx.Node]:
    return [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(leaf, fx.Node)]


def _in_pairs(node: fx.Node) -> None:
    """An einsum of three or more operands as a chain of those of two."""
    operands: list[Any] = list(node.args[1])  # pyright: ignore[reportArgumentType]
    ndims = [n.meta["val"].dim() for n in operands]
    for i, j, equation in pairs(str(node.args[0]), ndims, node.kwargs.get("path")):  # pyright: ignore[reportArgumentType]
        second, first = operands.pop(j), operands.pop(i)
        with node.graph.inserting_before(node):
            made = node.graph.call_function(node.target, (equation, [first, second]))  # pyright: ignore[reportArgumentType]
        values = [first.meta["val"], second.meta["val"]]
        mode = detect_fake_mode(values)
        assert mode is not None
        with mode:
            made.meta["val"] = torch.einsum(equation, *values)
        _place(made, node)
        operands.append(made)
    node.replace_all_uses_with(operands[0])
    node.graph.erase_node(node)


def _place(part: fx.Node, whole: fx.Node) -> None:
    """A part belongs to the module in whose forward the whole was recorded."""
    for key in ("nn_module_stack", "stack_trace"):
        if key in whole.meta:
            part.meta[key] = whole.meta[key]
