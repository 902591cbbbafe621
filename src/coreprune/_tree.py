"""Nested arguments of a model as JSON: tensors as the caller says, everything else as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from coreprune.errors import InputError


def encode(x: Any, tensor: Callable[[Tensor], Any]) -> Any:
    """Plain values for JSON. tensor: what a tensor is written as. Raises InputError for what has no place in JSON."""
    if isinstance(x, Tensor):
        return {"tensor": tensor(x)}
    if x is None or isinstance(x, (bool, int, float, str)):
        return {"value": x}
    if type(x) in (tuple, list):
        return {type(x).__name__: [encode(item, tensor) for item in x]}
    if type(x) is dict and all(isinstance(key, str) for key in x):
        return {"dict": {key: encode(item, tensor) for key, item in x.items()}}
    raise InputError(
        f"a {type(x).__name__} among the inputs cannot be written. Only tensors, numbers, strings, None, and tuples, "
        "lists and dicts of them can."
    )


def decode(x: Any, tensor: Callable[[Any], Tensor]) -> Any:
    """What `encode` wrote. Raises ValueError, TypeError or AttributeError for anything else."""
    ((kind, content),) = dict(x).items()
    if kind == "tensor":
        return tensor(content)
    if kind == "value" and not isinstance(content, (dict, list)):
        return content
    if kind in ("tuple", "list") and isinstance(content, list):
        items = [decode(item, tensor) for item in content]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict" and isinstance(content, dict):
        return {key: decode(item, tensor) for key, item in content.items()}
    raise ValueError(f"unknown kind {kind!r}")
