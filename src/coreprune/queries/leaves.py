"""The tensors among the example inputs (args, kwargs), by their positions among the leaves.

The example holds one sample, as the model takes it. `axes` says where its samples lie.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune._batch import BatchAxes
from coreprune.errors import InputError

_KEPT = ("mask", "position", "type", "label", "index")  # keywords that contain one of these are never drawn


def batched(args: tuple[Any, ...], kwargs: dict[str, Any], axes: BatchAxes) -> list[int]:
    """Positions of the tensors that differ between samples: those with a batch axis, or all in a whole example."""
    leaves = pytree.tree_leaves((args, kwargs))
    if axes.whole:
        return [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim()]
    return [i for i, axis in enumerate(axes.inputs) if axis is not None]


def drawn(args: tuple[Any, ...], kwargs: dict[str, Any], axes: BatchAxes) -> list[int]:
    """`drawable`. Raises InputError if there is none."""
    found = drawable(args, kwargs, axes)
    if not found:
        raise InputError("no input can be drawn: the example has no real or integer tensor (N, ...). Pass samples.")
    return found


def drawable(args: tuple[Any, ...], kwargs: dict[str, Any], axes: BatchAxes) -> list[int]:
    """Positions of the tensors that sources make. The others stay as they are in the example.

    These are all real tensors with a batch axis and a further one, and one such tensor of whole numbers (or all whose
    keyword ends in input_ids). Tensors whose keyword names a mask, positions, types or labels are left out. In a whole
    example that has real tensors, other whole numbers stay too: they may be the edges of a graph.
    """
    places = batched(args, kwargs, axes)
    reals: list[int] = []
    integers: list[tuple[int, str]] = []
    for i, (path, leaf) in enumerate(pytree.tree_leaves_with_path((args, kwargs))):
        name = "".join(str(getattr(key, "key", "")) for key in path[1:])
        if i not in places or axes.stored(i, leaf).dim() < 2 or any(word in name for word in _KEPT):
            continue
        if leaf.is_floating_point():
            reals.append(i)
        elif not leaf.is_complex() and leaf.dtype != torch.bool:
            integers.append((i, name))
    named = [i for i, name in integers if name.endswith("input_ids")]
    one = [] if axes.whole and reals else [i for i, _ in integers[:1]]
    return sorted(reals + (named or one))


def by_keyword(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    """Positions of the tensors that are keyword arguments by themselves."""
    places, at = {}, len(pytree.tree_leaves(args))
    for name, x in kwargs.items():
        if isinstance(x, Tensor):
            places[name] = at
        at += len(pytree.tree_leaves(x))
    return places


def by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    """`by_keyword`, and positions of the tensors among the positional arguments, by the names that forward gives
    them."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        names = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    except (TypeError, ValueError):  # some functions written in C do not say
        names = []
    places, at = dict[str, int](), 0
    for name, x in zip(names, args, strict=False):
        if isinstance(x, Tensor):
            places[name] = at
        at += len(pytree.tree_leaves(x))
    return places | by_keyword(args, kwargs)


def title(args: tuple[Any, ...], kwargs: dict[str, Any], leaf: int) -> str:
    """What messages call a tensor of the example: "input 'image'" or "input 0"."""
    inputs = [*enumerate(args), *kwargs.items()]
    owners = [name for name, x in inputs for _ in pytree.tree_leaves(x)]
    return f"input {owners[leaf]!r}"


def shared(args: tuple[Any, ...], kwargs: dict[str, Any], axes: BatchAxes, new: dict[int, Tensor]) -> frozenset[int]:
    """Positions of the tensors that all samples share, if `new` are replaced."""
    own = new.keys() if axes.whole else set(batched(args, kwargs, axes))
    leaves = pytree.tree_leaves((args, kwargs))
    return frozenset(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and i not in own)


def with_leaves(
    args: tuple[Any, ...], kwargs: dict[str, Any], axes: BatchAxes, new: dict[int, Tensor], n: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example with some leaves replaced, n samples in all, along axis 0.

    new: tensors (n, ...). Other tensors with a batch axis repeat their first sample; those of a whole example stay.
    """
    leaves, tree = pytree.tree_flatten((args, kwargs))
    for i, leaf in enumerate(leaves):
        if i in new:
            leaves[i] = new[i]
        elif axes.inputs[i] is not None:
            first = axes.stored(i, leaf)[:1]
            leaves[i] = first.expand(n, *first.shape[1:])
    return pytree.tree_unflatten(leaves, tree)
