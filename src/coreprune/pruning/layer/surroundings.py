"""What surrounds a group of channels: batch norms, and whether one channel can replace another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from coreprune.graph import Captured, Group, ParamSlice
from coreprune.graph.ops import op_name, operation
from coreprune.pruning.layer.weights import NormStatistics


def norms_behind(
    tensors: Mapping[str, Tensor], captured: Captured, group: Group, columns: Mapping[str, tuple[int, int]]
) -> tuple[NormStatistics, ...]:
    """The batch norms in evaluation mode that directly follow a layer of the group, and are its only readers.

    columns: name of the layer's weight -> its columns in the incoming rows. There are none for units of several
    channels.
    """
    if group.unit != 1:
        return ()
    found = [_norm_of(tensors, captured, group, weight, columns[weight]) for weight in columns]
    return tuple(norm for norm in found if norm is not None)


def _norm_of(
    tensors: Mapping[str, Tensor], captured: Captured, group: Group, weight: str, columns: tuple[int, int]
) -> NormStatistics | None:
    layer = _only_user(captured, weight)
    if layer is None or len(layer.users) != 1:
        return None
    (norm,) = layer.users
    if norm.op != "call_function" or op_name(norm) != "batch_norm" or norm.args[0] is not layer or norm.args[5] is True:
        return None
    names = {
        role: name
        for role, at in (("scale", 1), ("shift", 2), ("mean", 3), ("variance", 4))
        if (name := _name(captured, norm.args[at])) is not None
    }
    if any(len(a.users) > 1 for a in norm.all_input_nodes[1:]):  # also used elsewhere, with other statistics
        return None
    names["weight"] = weight
    bias = _name(captured, layer.args[2]) if len(layer.args) > 2 else None
    if bias is not None:
        names["bias"] = bias
    pieces = {s.param: s for s in (*group.producers, *group.others)}
    roles = [role for role in names if role != "weight"]
    values = {
        role: value
        for role in roles
        if names[role] in pieces
        and (value := _per_channel(tensors[names[role]], pieces[names[role]], group)) is not None
    }
    if not {"mean", "variance"} <= values.keys() or len(values) != len(roles):
        return None
    zeros = torch.zeros_like(values["mean"])
    return NormStatistics(
        scale=values.get("scale", zeros + 1),
        shift=values.get("shift", zeros),
        mean=values["mean"],
        variance=values["variance"],
        eps=float(str(norm.args[7])),
        bias=values.get("bias", zeros),
        columns=columns,
        names=names,
    )


def _only_user(captured: Captured, param: str) -> fx.Node | None:
    """The only node that uses a parameter, if that node is a layer and the parameter its weight; otherwise None."""
    users = [user for node in captured.graph.graph.nodes if _name(captured, node) == param for user in node.users]
    if len(users) != 1 or not operation(users[0]).makes_channels or _name(captured, users[0].args[1]) != param:
        return None
    return users[0]


def never_negative(captured: Captured, weight: str) -> bool:
    """Whether no input of the layer with this weight is ever negative, as behind a ReLU.

    It is so if one operation makes only such numbers, and all from there to the layer keep the sign.
    """
    layer = _only_user(captured, weight)
    if layer is None or operation(layer).kind not in ("linear", "matmul", "conv", "transposed conv"):
        return False
    stack: list[object] = [layer.args[0]]
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return False
        known = operation(node)
        if not known.nonnegative_for(node):
            if not (known.keeps_sign and known.holds_for(node) and node.all_input_nodes):
                return False
            stack += node.all_input_nodes
    return True


def _name(captured: Captured, node: object) -> str | None:
    """The canonical name of the parameter or buffer that a node stands for, or None."""
    if not isinstance(node, fx.Node) or node.op != "placeholder":
        return None
    kind, name = captured.sources.get(node.name, ("", ""))
    return name if kind in ("parameter", "buffer") else None


def _per_channel(tensor: Tensor, piece: ParamSlice, group: Group) -> Tensor | None:
    """The number that every channel has in a tensor, (n,) float64; None unless each channel has exactly one."""
    table = group.layouts[piece.param, piece.dim]
    if tensor.ndim != 1 or table is None or table.shape[1] != 1:
        return None
    return tensor[table[:, 0].to(tensor.device)].to(torch.float64)


def other_rows(
    tensors: Mapping[str, Tensor], captured: Captured, group: Group, norms: tuple[NormStatistics, ...]
) -> Tensor | None:
    """Further parameters of every unit, (units, e) float64: those in `others` that do not belong to `norms`."""
    rows = []
    for piece in group.others:
        table = group.layouts[piece.param, piece.dim]
        if table is not None and piece.param in captured.parameters and not _belongs(piece.param, norms):
            part = tensors[piece.param].movedim(piece.dim, 0)
            rows.append(part[table.to(part.device)].reshape(len(table), -1).to(torch.float64))
    return torch.cat(rows, dim=1) if rows else None


def no_mean(group: Group) -> str:
    """In words, why two units of a group cannot be replaced by their mean; empty if they can."""
    if group.sections is not None:
        return "its units lie in sections that see different inputs"
    if "heads" in group.flags:
        return "attention heads are not averaged"
    if "norm-statistics" in group.flags:
        return "its channels enter the statistics of a norm"
    if not all(consumer.slices for consumer in group.consumers):
        return "its channels are also read without a weight"
    odd = next((s.param for s in group.slices if group.layouts[s.param, s.dim] is None), None)
    return f"its channels do not lie alike in {odd}" if odd else ""


def no_scale(captured: Captured, group: Group, norms: tuple[NormStatistics, ...]) -> str:
    """In words, why no unit of a group can be replaced by a multiple of another; empty if it can.

    It can if everything between the layers that make the channels and their consumers is positively homogeneous and
    works on each channel alone. Batch norms directly behind these layers do not matter here.
    """
    if reason := no_mean(group):
        return reason
    if group.unit > 1:
        return f"{group.unit} channels only leave together"
    own = next((s.param for s in group.others if not _belongs(s.param, norms)), None)
    if own:
        return f"every channel has numbers of its own in {own}"
    mine = {s.param for s in group.slices}
    nodes = {node.name: node for node in captured.graph.graph.nodes}
    stack = [nodes[consumer.source] for consumer in group.consumers if consumer.source in nodes]
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder" and _name(captured, node) is None and captured.sources[node.name][0] == "input":
            continue
        if node.op != "call_function":
            return f"{_name(captured, node) or node.name} enters between its layers"
        known, params = operation(node), {_name(captured, a) for a in node.all_input_nodes} - {None}
        if known.makes_channels and params:
            continue
        if op_name(node) == "batch_norm":
            if params & mine and not all(_belongs(str(p), norms) for p in params):
                return f"a norm ({node.name}) follows later"
            stack += node.all_input_nodes[:1] if params & mine else []
        elif not (known.homogeneous and known.holds_for(node)):
            return f"{op_name(node)} lies between its layers"
        else:
            stack += node.all_input_nodes[:1] if known.kind == "prelu" else node.all_input_nodes
    return ""


def _belongs(param: str, norms: tuple[NormStatistics, ...]) -> bool:
    return any(param in norm.names.values() for norm in norms)
