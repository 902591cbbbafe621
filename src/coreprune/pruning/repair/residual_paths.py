"""Follow a layer's output: through which affine steps it goes, and into which residual sum.

The output y of a linear map is often normalised, scaled and added to another branch before anything non-linear happens:
join = other + a·y + c, with a and c per channel. A repair that matches the join also corrects the errors of the other
branch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from coreprune.graph import Captured
from coreprune.graph.execution import overwritten
from coreprune.graph.ops import op_name, operation
from coreprune.pruning.layer.linear_maps import Operator, is_tensor_meta

_ARRANGED = ("view", "reshape", "_unsafe_view", "flatten", "unflatten")


@dataclass(frozen=True, eq=False)
class Path:
    """The affine steps behind an operator.

    norm: the batch norm that reads the operator directly, or None. steps: the nodes in order, without the sum.
    join, other: the residual sum and its other operand, or None. gated: whether only a ReLU reads the result.
    """

    norm: fx.Node | None
    steps: tuple[fx.Node, ...]
    join: fx.Node | None
    other: fx.Node | None
    gated: bool = False


def path_of(operator: Operator, captured: Captured) -> Path:
    """Follow an operator's output as long as it has one reader, and only affine operations per channel.

    A linear layer may compute on rows, (batch · positions, channels), that get their axes back before the sum.
    """
    node, steps, norm = operator.node, [], None
    while len(node.users) == 1:
        (user,) = node.users
        name = op_name(user)
        if name == "batch_norm" and _is_norm(operator, node, user):
            mean = captured.sources.get(getattr(user.args[3], "name", ""), ("", ""))[1]
            norm = user if node is operator.node and captured.readers[mean] == 1 else norm
        elif name == "mul" and not _is_scale(operator, captured, node, user):
            break
        elif name == "add":
            other = next((a for a in user.args if isinstance(a, fx.Node) and a is not node), None)
            plain = not user.kwargs and len(user.all_input_nodes) == 2
            if other is not None and plain and _same_shape(other, node) and not _depends(other, operator.node):
                return Path(norm, tuple(steps), user, other, _gated(user))
            break
        elif name != "mul" and not _is_the_same(operator, node, user):
            break
        steps.append(user)
        node = user
    return Path(norm, tuple(steps), None, None, _gated(node))


def _is_the_same(operator: Operator, node: fx.Node, user: fx.Node) -> bool:
    """Whether a node returns its argument, or the rows of a linear layer in their order with other axes before them."""
    if operation(user).identity:
        return operation(user).holds_for(user)
    arranged = not operator.kernel and op_name(user) in _ARRANGED and is_tensor_meta(user)
    return arranged and user.meta["val"].shape[-1:] == node.meta["val"].shape[-1:]


def _is_norm(operator: Operator, node: fx.Node, user: fx.Node) -> bool:
    """Whether a batch norm in evaluation mode normalises the operator's channels, not another axis of its output."""
    along = operator.channel_axis % node.meta["val"].dim() == 1
    return along and user.args[0] is node and user.args[5] is False and user.args[3] is not None


def _gated(node: fx.Node) -> bool:
    """Whether only a ReLU reads the value, so that all negative entries have the same effect."""
    return len(node.users) == 1 and operation(next(iter(node.users))).one_sided


def affine(path: Path, channels: int, fetch: Callable[[fx.Node], Any]) -> tuple[Tensor, Tensor]:
    """a and c of the steps, (channels,) float64. `fetch` gives the value of a parameter's node."""
    scale = torch.ones(channels, dtype=torch.float64)
    shift = torch.zeros(channels, dtype=torch.float64)
    for step in path.steps:
        name = op_name(step)
        if name == "batch_norm":
            gamma, beta, mean, variance, eps = batch_norm_tensors(step, channels, fetch)
            factor = gamma / (variance + eps).sqrt()
            scale, shift = scale.to(factor) * factor, (shift.to(factor) - mean) * factor + beta
        elif name == "mul":
            factors = [_stored(a) for a in step.args if isinstance(a, fx.Node)]
            factor = fetch(next(n for n in factors if not n.all_input_nodes)).detach().double().reshape(-1)
            scale, shift = scale.to(factor) * factor, shift.to(factor) * factor
    return scale, shift


def batch_norm_tensors(
    node: fx.Node, channels: int, fetch: Callable[[fx.Node], Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """γ, β, running mean, running variance (float64) and ε of a batch norm in evaluation mode."""
    mean, variance = (fetch(a).detach().double() for a in node.args[3:5])  # type: ignore[arg-type]
    gamma = fetch(node.args[1]).detach().double() if node.args[1] is not None else torch.ones(channels).to(mean)  # type: ignore[arg-type]
    beta = fetch(node.args[2]).detach().double() if node.args[2] is not None else torch.zeros(channels).to(mean)  # type: ignore[arg-type]
    return gamma, beta, mean, variance, float(node.args[7])  # type: ignore[arg-type]


def schedule(nodes: list[fx.Node], paths: Mapping[fx.Node, Path]) -> tuple[list[fx.Node], dict[fx.Node, Path]]:
    """An order of execution in which the other operand of a join is computed before the operator that is matched to it.

    Returns the order, and the path of every operator node. If two operators feed one join, only the first keeps it.
    """
    claimed: dict[fx.Node, fx.Node] = {}
    kept: dict[fx.Node, Path] = {}
    extra: dict[fx.Node, list[fx.Node]] = {}
    place = {node: i for i, node in enumerate(nodes)}
    fixed = bool(overwritten(nodes))  # writes through views are only right in the order of the graph
    for node in nodes:
        path = paths.get(node)
        if path is None:
            continue
        if path.join is not None and path.other is not None:
            if path.join in claimed or (fixed and place[path.other] > place[node]):
                path = Path(path.norm, path.steps, None, None)
            else:
                claimed[path.join] = node
                extra[node] = [path.other]
        kept[node] = path
    if fixed:
        return nodes, kept
    order: list[fx.Node] = []
    state: dict[fx.Node, int] = {}
    for root in nodes:
        stack = [(root, False)]
        while stack:
            node, ready = stack.pop()
            if ready:
                order.append(node)
                state[node] = 2
            elif state.get(node, 0) == 0:
                state[node] = 1
                stack.append((node, True))
                needs = [*node.all_input_nodes, *extra.get(node, ())]
                stack.extend((n, False) for n in reversed(needs) if state.get(n, 0) == 0)
    return order, kept


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return is_tensor_meta(a) and a.meta["val"].shape == b.meta["val"].shape


def _is_scale(operator: Operator, captured: Captured, node: fx.Node, user: fx.Node) -> bool:
    """Whether the other factor of a product is a parameter with one entry per channel of the operator's output."""
    factor = next((a for a in user.args if isinstance(a, fx.Node) and a is not node), None)
    kind = "" if factor is None else captured.sources.get(_stored(factor).name, ("",))[0]
    if factor is None or kind not in ("parameter", "buffer") or len(user.args) != 2:
        return False
    shape, out = list(factor.meta["val"].shape), list(node.meta["val"].shape)
    axis = operator.channel_axis % len(out)
    shape = [1] * (len(out) - len(shape)) + shape
    return len(shape) == len(out) and all(n == (out[a] if a == axis else 1) for a, n in enumerate(shape))


def _stored(node: fx.Node) -> fx.Node:
    """The tensor that a node is a view of, with the same entries in the same order."""
    while isinstance(source := next(iter(node.args), None), fx.Node) and is_tensor_meta(source):
        whole = op_name(node) == "slice" and node.meta["val"].numel() == source.meta["val"].numel()
        if not whole and op_name(node) not in (*_ARRANGED, "unsqueeze", "squeeze"):
            break
        node = source
    return node


def _depends(node: fx.Node, on: fx.Node) -> bool:
    seen, stack = set(), [node]
    while stack:
        n = stack.pop()
        if n is on:
            return True
        if n not in seen:
            seen.add(n)
            stack.extend(n.all_input_nodes)
    return False
