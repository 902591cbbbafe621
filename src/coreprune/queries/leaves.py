"""The tensors among the example inputs (args, kwargs), by their positions among the leaves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from coreprune._example import batch_size
from coreprune.errors import InputError

_KEPT = ("mask", "position", "type", "label", "index")  # keywords that contain one of these are never drawn


def has_batch(leaf: Any, batch: int | None) -> bool:
    """Whether a leaf of the example is a tensor with a batch axis."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch


def batched(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Positions of the tensors with a batch axis."""
    batch = batch_size(args, kwargs)
    return [i for i, leaf in enumerate(pytree.tree_leaves((args, kwargs))) if has_batch(leaf, batch)]


def drawn(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Positions of the tensors that sources make. The others stay as they are in the example.

    These are all real tensors with a batch axis and a further one, and one such tensor of whole numbers (or all whose
    keyword ends in input_ids). Tensors whose keyword names a mask, positions, types or labels are left out.

    Raises InputError if there is none.
    """
    batch = batch_size(args, kwargs)
    reals: list[int] = []
    integers: list[tuple[int, str]] = []
    for i, (path, leaf) in enumerate(pytree.tree_leaves_with_path((args, kwargs))):
        name = "".join(str(getattr(key, "key", "")) for key in path[1:])
        if not has_batch(leaf, batch) or leaf.dim() < 2 or any(word in name for word in _KEPT):
            continue
        if leaf.is_floating_point():
            reals.append(i)
        elif not leaf.is_complex() and leaf.dtype != torch.bool:
            integers.append((i, name))
    named = [i for i, name in integers if name.endswith("input_ids")]
    found = sorted(reals + (named or [i for i, _ in integers[:1]]))
    if not found:
        raise InputError("no input can be drawn: the example has no real or integer tensor (N, ...). Pass samples.")
    return found


def by_keyword(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    """Positions of the tensors that are keyword arguments by themselves."""
    places, at = {}, len(pytree.tree_leaves(args))
    for name, x in kwargs.items():
        if isinstance(x, Tensor):
            places[name] = at
        at += len(pytree.tree_leaves(x))
    return places


def title(args: tuple[Any, ...], kwargs: dict[str, Any], leaf: int) -> str:
    """What messages call a tensor of the example: "input 'image'" or "input 0"."""
    inputs = [*enumerate(args), *kwargs.items()]
    owners = [name for name, x in inputs for _ in pytree.tree_leaves(x)]
    return f"input {owners[leaf]!r}"


def with_leaves(
    args: tuple[Any, ...], kwargs: dict[str, Any], new: dict[int, Tensor], n: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example with some leaves replaced, n rows in all. Other tensors with a batch axis repeat their first row."""
    leaves, tree = pytree.tree_flatten((args, kwargs))
    batch = batch_size(args, kwargs)
    for i, leaf in enumerate(leaves):
        if i in new:
            leaves[i] = new[i]
        elif has_batch(leaf, batch):
            leaves[i] = leaf[:1].expand(n, *leaf.shape[1:])
    return pytree.tree_unflatten(leaves, tree)
