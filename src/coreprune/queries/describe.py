"""Texts for sources of queries: one for people, and one that tells whether two runs asked for the same."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, range, np.generic, torch.dtype, torch.device, PurePath)
_ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+")


def shown(spec: Any) -> str:
    """What a report calls a source: module:name for a function, its options for a dataclass. It holds no address."""
    if isinstance(spec, (FunctionType, type)):
        return f"{spec.__module__}:{spec.__qualname__}"
    text = repr(spec)
    return type(spec).__name__ if _ADDRESS.search(text) else text


def description(x: Any) -> str | None:
    """A text that is the same in every process for what behaves the same; None where there is no such text.

    Numbers, strings, tensors and containers count by value, dataclasses by their fields, and functions by their code,
    their defaults, what they close over, and the plain constants and the functions of their own module that they use.
    Other callables count by their repr, if they define one. What is called in other modules is not followed.
    """
    try:
        return _text(x, frozenset())
    except _NotStable:
        return None


class _NotStable(Exception):
    """Something behaves in a way that no text tells."""


def _text(x: Any, seen: frozenset[int]) -> str:
    """seen: ids of the functions and objects around x; one that comes again is only named."""
    if x is None or x is Ellipsis or isinstance(x, Enum) or (isinstance(x, _PLAIN) and not _custom(x)):
        return repr(x)
    if isinstance(x, Tensor):
        values = x.detach().cpu().contiguous()
        return f"tensor {tuple(x.shape)} {x.dtype} {_hash(values.reshape(-1).view(torch.uint8).numpy().tobytes())}"
    if isinstance(x, np.ndarray) and not x.dtype.hasobject:
        return f"array {x.shape} {x.dtype} {_hash(np.ascontiguousarray(x).tobytes())}"
    if isinstance(x, (tuple, list)):
        return f"{type(x).__name__}({', '.join(_text(item, seen) for item in x)})"
    if isinstance(x, (set, frozenset)):
        return f"{type(x).__name__}({', '.join(sorted(_text(item, seen) for item in x))})"
    if isinstance(x, Mapping):
        return f"{{{', '.join(f'{_text(k, seen)}: {_text(v, seen)}' for k, v in x.items())}}}"
    if isinstance(x, (type, ModuleType)):
        return _name(x)
    if id(x) in seen:
        return f"the same {_name(type(x))}"
    seen |= {id(x)}
    if isinstance(x, FunctionType):
        return _function(x, seen)
    if isinstance(x, CodeType):
        return _code(x, seen)
    if isinstance(x, (MethodType, BuiltinFunctionType)):
        return f"{getattr(x, '__qualname__', '')} of {_text(x.__self__, seen)}"
    if isinstance(x, partial):
        return f"partial({_text((x.func, x.args, x.keywords), seen)})"
    if isinstance(x, nn.Module):
        return f"{_name(type(x))} {x!r} {_text(x.state_dict(), seen)} {_behaviour(x, seen)}"
    if is_dataclass(x):
        values = {f.name: getattr(x, f.name) for f in fields(x)}
        return f"{_name(type(x))} {_text(values, seen)} {_behaviour(x, seen)}"
    if callable(x) and type(x).__repr__ is not object.__repr__ and not _ADDRESS.search(repr(x)):
        return f"{_name(type(x))} {x!r} {_behaviour(x, seen)}"
    raise _NotStable


def _custom(x: Any) -> bool:
    """Whether a number or string is of a class of somebody's own, which may hold more than its value."""
    return type(x).__module__.partition(".")[0] not in ("builtins", "numpy", "torch", "pathlib")


def _behaviour(x: Any, seen: frozenset[int]) -> str:
    """The code of a callable object's class. Empty where it is hidden, e.g. by a decorator."""
    call = getattr(type(x), "__call__", None)  # noqa: B004 (its code, not whether it can be called)
    try:
        return _text(call, seen) if isinstance(call, FunctionType) else ""
    except _NotStable:
        return ""


def _function(f: FunctionType, seen: frozenset[int]) -> str:
    cells = []
    for cell in f.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # empty as yet
            cells.append(None)
    used = {name: f.__globals__[name] for name in sorted(_names(f.__code__)) if name in f.__globals__}
    own = {
        name: value
        for name, value in used.items()
        if isinstance(value, (*_PLAIN, Tensor, np.ndarray))
        or (isinstance(value, FunctionType) and value.__module__ == f.__module__)
    }
    parts = (f.__code__, f.__defaults__, f.__kwdefaults__, cells, own)
    return f"{f.__module__}.{f.__qualname__} {_text(parts, seen)}"


def _code(code: CodeType, seen: frozenset[int]) -> str:
    return f"code {_hash(code.co_code)} {code.co_names} {code.co_varnames} {_text(code.co_consts, seen)}"


def _names(code: CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*(_names(const) for const in inner))


def _name(x: Any) -> str:
    return x.__name__ if isinstance(x, ModuleType) else f"{x.__module__}.{x.__qualname__}"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
