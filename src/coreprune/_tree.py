"""Nested arguments of a model as JSON. The caller decides how tensors are written; everything else is kept."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from coreprune.errors import InputError

_DEEPEST = 64  # levels; below every recursion limit


def encode(x: Any, tensor: Callable[[Tensor], Any], depth: int = 0) -> Any:
    """Plain values for JSON. tensor: turns a tensor into such values. Raises InputError for what JSON cannot hold."""
    if depth > _DEEPEST:
        raise InputError(f"the inputs are nested more than {_DEEPEST} levels deep, which cannot be written.")
    if isinstance(x, Tensor):
        return {"tensor": tensor(x)}
    if x is None or isinstance(x, (bool, int, float, str)):
        return {"value": x}
    if type(x) in (tuple, list):
        return {type(x).__name__: [encode(item, tensor, depth + 1) for item in x]}
    if type(x) is dict and all(isinstance(key, str) for key in x):
        return {"dict": {key: encode(item, tensor, depth + 1) for key, item in x.items()}}
    raise InputError(
        f"a {type(x).__name__} among the inputs cannot be written. Only tensors, numbers, strings, None, and tuples, "
        "lists and dicts of them can."
    )


def decode(x: Any, tensor: Callable[[Any], Tensor], depth: int = 0) -> Any:
    """Read what `encode` wrote. Raises ValueError for anything else."""
    if not isinstance(x, dict) or len(x) != 1 or depth > _DEEPEST:
        raise ValueError(f"{reprlib.repr(x)} is no argument")
    ((kind, content),) = x.items()
    if kind == "tensor":
        return tensor(content)
    if kind == "value" and not isinstance(content, (dict, list)):
        return content
    if kind in ("tuple", "list") and isinstance(content, list):
        items = [decode(item, tensor, depth + 1) for item in content]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict" and isinstance(content, dict):
        return {key: decode(item, tensor, depth + 1) for key, item in content.items()}
    raise ValueError(f"unknown kind {reprlib.repr(kind)}")
