"""Read a group of channels in the form of the theory: incoming rows, outgoing columns, and the activation between."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from coreprune.graph import Captured, Group, ParamSlice
from coreprune.graph.ops import op_name, operation
from coreprune.pruning.layer.activations import activation
from coreprune.pruning.layer.surroundings import never_negative, no_mean, no_scale, norms_behind, other_rows
from coreprune.pruning.layer.weights import LayerWeights


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by dotted name, detached."""
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def read_layer(tensors: Mapping[str, Tensor], captured: Captured, group: Group) -> LayerWeights:
    """Collect the weights around a group, one row and one column per unit, in float64.

    For a unit of several channels (a head), the rows of its channels stand side by side. Several producers or consumers
    are stacked: the response of the unit is then a function of all their inputs together.
    """
    units = group.size // group.unit
    made = [(_rows(tensors[s.param], s, group), tensors[s.param].ndim == 1) for s in group.producers]
    read = [_rows(tensors[s.param], s, group) for consumer in group.consumers for s in consumer.slices]
    weights = [rows for rows, is_bias in made if not is_bias]
    biases = [rows for rows, is_bias in made if is_bias]
    places = _columns(group, made)
    norms = norms_behind(tensors, captured, group, places)
    bias = torch.stack([b.sum(dim=1) for b in biases]).sum(dim=0) if biases and group.unit == 1 else None
    if norms and bias is None:
        bias = torch.zeros_like(weights[0][:, 0])
    columns = [bias[:, None]] if bias is not None else biases
    incoming = torch.cat([*weights, *columns], dim=1) if weights or columns else torch.zeros(units, 1)
    outgoing = torch.cat(read, dim=1).T if read else torch.ones(1, units)
    nonnegative = torch.ones(incoming.shape[1], dtype=torch.bool)  # also for the biases, which are read with a 1
    for weight, (first, stop) in places.items():
        nonnegative[first:stop] = never_negative(captured, weight)
    return LayerWeights(
        incoming=incoming.double(),
        outgoing=outgoing.double(),
        activation=activation(activation_name(captured, group)),
        bias_columns=sum(c.shape[1] for c in columns),
        nonnegative=nonnegative,
        norms=norms,
        others=other_rows(tensors, captured, group, norms),
        no_mean=no_mean(group),
        no_scale=no_scale(captured, group, norms),
    )


def _columns(group: Group, made: list[tuple[Tensor, bool]]) -> dict[str, tuple[int, int]]:
    """For every weight that makes the channels: name -> its columns in the incoming rows."""
    found, at = {}, 0
    for piece, (rows, is_bias) in zip(group.producers, made, strict=True):
        if not is_bias:
            found[piece.param] = (at, at + rows.shape[1])
            at += rows.shape[1]
    return found


def plain_linear(captured: Captured, group: Group) -> bool:
    """Whether the theorems apply as written: one linear layer makes the channels, linear layers read each of them once.

    The same selectors also choose channels of convolutions, and of linear layers that read several flattened positions.
    But those layers sum over positions, and the certificates hold for one position.
    """
    weights = {s.param for s in group.producers if len(captured.tensors[s.param][0]) > 1}
    readers = [s for consumer in group.consumers for s in consumer.slices]
    return (
        group.unit == 1
        and not group.others
        and len(weights) == 1
        and all(len(captured.tensors[name][0]) == 2 for name in weights)
        and bool(readers)
        and all(len(captured.tensors[s.param][0]) == 2 for s in readers)
        and all(int((s.index >= 0).sum()) == group.size for s in (*group.producers, *readers))
        and all(consumer.slices for consumer in group.consumers)
    )


def activation_name(captured: Captured, group: Group) -> str:
    """Name of the only activation between the layer that makes the channels and their consumers, or "unknown".

    It is "unknown" if there is any other operation in between, or if the activation has unusual parameters.
    """
    nodes = {node.name: node for node in captured.graph.graph.nodes}
    found = {_on_the_way(nodes.get(consumer.source), captured, group) for consumer in group.consumers}
    return found.pop() if len(found) == 1 else "unknown"


def _on_the_way(node: torch.fx.Node | None, captured: Captured, group: Group) -> str:
    """Walk back from what a consumer reads to a linear layer with a weight of the group."""
    made = {piece.param for piece in group.producers}
    names = []
    while node is not None and node.op == "call_function":
        known = operation(node)
        if known.kind == "linear":
            weight = captured.sources.get(getattr(node.args[1], "name", ""), ("", ""))[1]
            return (names or ["identity"])[0] if weight in made and len(names) < 2 else "unknown"
        if not known.holds_for(node):
            return "unknown"
        if known.function is not None:
            names.append(op_name(node))
        elif not known.bijective:
            return "unknown"
        node = next(iter(node.all_input_nodes), None)
    return "unknown"


def _rows(tensor: Tensor, piece: ParamSlice, group: Group) -> Tensor:
    """The entries of one parameter that belong to each unit: (units, entries)."""
    units = group.size // group.unit
    if piece.index.ndim == 2:  # a grouped convolution: section b of axis 0 has its own map
        sections = tensor.chunk(piece.index.shape[0], dim=0)
        parts = [_gather(section, piece.dim, index) for section, index in zip(sections, piece.index, strict=True)]
        values, owners = torch.cat([v for v, _ in parts]), torch.cat([o for _, o in parts])
    else:
        values, owners = _gather(tensor, piece.dim, piece.index)
    if not bool((owners.diff() >= 0).all()):  # mostly they are in order, and large weights need no copy
        values = values[torch.argsort(owners, stable=True)]
    return values.reshape(units, -1)


def _gather(tensor: Tensor, dim: int, index: Tensor) -> tuple[Tensor, Tensor]:
    rows = tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)
    index = index.to(tensor.device)
    if bool((index >= 0).all()):
        return rows, index
    live = torch.nonzero(index >= 0).flatten()
    return rows[live], index[live]
