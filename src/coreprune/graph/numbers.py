"""Whole numbers that modules remember: in attributes, and in tuples, dicts and objects that attributes hold."""

from __future__ import annotations

import copy
import enum
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Keys = tuple[Any, ...]  # an attribute, then indices, keys and attributes of what it holds

_DEPTH = 4  # containers inside of each other
_DEPTH_OF_OBJECTS = 2  # objects inside of each other, which may hold much that is no setting
_MOST = 64  # entries of a container; longer ones are data, such as a vocabulary
_MOST_ATTRIBUTES = 512  # of an object, such as a configuration
_OURS = frozenset({"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})
_NO_CONTAINERS = (nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.MethodType, enum.Enum)


def numbers(module: nn.Module) -> Iterator[tuple[Keys, int]]:
    """Where a module keeps whole numbers of 2 and more, and the numbers. Those of its submodules are not among them."""
    found: list[tuple[Keys, int]] = []

    def note(keys: Keys, value: int) -> int:
        if value > 1:
            found.append((keys, value))
        return value

    for key, value in attributes(module).items():
        mapped(value, note, (key,))
    yield from found


def attributes(module: nn.Module) -> dict[str, Any]:
    """What a module holds beside parameters, buffers, modules and hooks, with the whole numbers of its class."""
    of_class = {}
    for kind in reversed(type(module).__mro__):
        if not kind.__module__.startswith("torch.") and issubclass(kind, nn.Module):
            of_class.update({k: v for k, v in vars(kind).items() if type(v) is int and not k.startswith("__")})
    return of_class | {k: v for k, v in vars(module).items() if k not in _OURS and not k.endswith("_hooks")}


def change_numbers(module: nn.Module, change: Callable[[Keys, int], int], shared: dict[Any, Any] | None = None) -> None:
    """Put other numbers in the place of those that a module keeps.

    Containers are replaced by copies, because other modules may hold them too. shared: the copies made so far: where
    two modules held one container, they hold one again if its numbers change alike.
    """
    for key, value in attributes(module).items():
        new = mapped(value, change, (key,), shared)
        if new is not value:
            vars(module)[key] = new


def mapped(value: Any, change: Callable[[Keys, int], int], at: Keys, shared: dict[Any, Any] | None = None) -> Any:
    """The same with other numbers. What holds none that changed is returned as it is."""
    if type(value) is int:
        return change(at, value)
    held = parts(value, len(at))
    if not held:
        return value
    new = {k: mapped(v, change, (*at, k), shared) for k, v in held.items()}
    changed = {k: v for k, v in new.items() if v is not held[k]}
    if not changed:
        return value
    if shared is None:
        return _with(value, changed)
    alike = (id(value), tuple((k, v if type(v) is int else id(v)) for k, v in changed.items()))
    if alike not in shared:
        shared[alike] = (_with(value, changed), value, changed)  # what is kept alive keeps its id
    return shared[alike][0]


def parts(value: Any, depth: int) -> Mapping[Any, Any] | None:
    """What a container or an object holds, by index, key or attribute. None for anything else.

    depth: how far inside an attribute the value is: 1 for what the attribute itself holds.
    """
    if depth > _DEPTH:
        return None
    if isinstance(value, dict):
        return value if len(value) <= _MOST else None
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value)) if len(value) <= _MOST else None
    if isinstance(value, partial):
        return {"keywords": value.keywords, "args": value.args}
    if depth > _DEPTH_OF_OBJECTS or isinstance(value, _NO_CONTAINERS) or type(value).__module__.startswith("torch."):
        return None  # among torch's own are graphs, in which everything holds everything
    held = dict(vars(value)) if hasattr(value, "__dict__") else {}
    slots = [key for kind in type(value).__mro__ for key in _slots(kind) if hasattr(value, key)]
    held.update({key: getattr(value, key) for key in slots if not key.startswith("__")})
    return held if 0 < len(held) <= _MOST_ATTRIBUTES else None


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _with(value: Any, changed: Mapping[Any, Any]) -> Any:
    """A copy of a container or object in which some entries are others; the same if it cannot be copied."""
    if isinstance(value, tuple):
        items = [changed.get(i, x) for i, x in enumerate(value)]
        if hasattr(value, "_make"):
            return value._make(items)  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(value, torch.Size) and all(type(x) is int for x in items):
            return torch.Size(items)
        return tuple(items)
    if isinstance(value, partial):
        held = {"keywords": value.keywords, "args": value.args, **changed}
        return partial(value.func, *held["args"], **held["keywords"])
    try:
        new = copy.copy(value)
    except Exception:
        return value
    for key, item in changed.items():
        if isinstance(new, (dict, list)):
            new[key] = item
        elif key in getattr(new, "__dict__", ()):
            vars(new)[key] = item
        else:
            object.__setattr__(new, key, item)  # frozen dataclasses too
    return new
