"""Tensors that a forward made and left in attributes, and that it makes again when they are gone: tables of positions,
anchors, biases that were looked up. In a smaller copy they would be those of the original.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune._example import as_real
from coreprune._twin import quiet
from coreprune.errors import first_line
from coreprune.graph.numbers import Keys, attributes, parts

log = logging.getLogger(__name__)

Place = tuple[str, Keys, bool]  # (module, where it keeps the tensor, whether the attribute is absent until then)

_MOST_ALONE = 16  # places that are tried one by one


def caches(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Place, ...]:
    """Where the model keeps tensors that its forward makes anew: without them it gives the same, and fills them again.

    The model is not changed.
    """
    places = [(path, keys, False) for path, keys, _ in kept_tensors(model)]
    if not places:
        return ()
    try:
        with quiet(model) as still:
            want = still(*args, **kwargs)
    except Exception as error:
        log.debug("no caches are looked for: %s", first_line(error))
        return ()

    def made_anew(some: list[Place]) -> bool:
        try:
            with quiet(model) as still:
                drop(still, some)
                got = still(*args, **kwargs)
                filled = {(path, keys) for path, keys, _ in kept_tensors(still)}
        except Exception as error:
            log.debug("%s is no cache: %s", some, first_line(error))
            return False
        return {place[:2] for place in some} <= filled and _same(got, want)

    if made_anew(places):
        return tuple(places)
    ways = [[(path, keys, absent) for absent in (False, True)] for path, keys, _ in places[:_MOST_ALONE]]
    alone = [found for way in ways if (found := next((p for p in way if made_anew([p])), None))]
    return tuple(alone) if alone and made_anew(alone) else ()


def kept_tensors(model: nn.Module) -> Iterator[tuple[str, Keys, Tensor]]:
    """Tensors that modules keep and that are no parameters or buffers: (module, where, tensor)."""
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    for path, module in model.named_modules():
        for key, value in attributes(module).items():
            yield from ((path, keys, t) for keys, t in _inside((key,), value) if id(t) not in own)


def _inside(at: Keys, value: Any) -> Iterator[tuple[Keys, Tensor]]:
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter):
            yield at, value
        return
    for key, item in (parts(value, len(at)) or {}).items():
        if not isinstance(item, (int, float, str)):
            yield from _inside((*at, key), item)


def drop(model: nn.Module, places: Iterable[Place]) -> None:
    """Take tensors off a model: entries of dicts and lists go, attributes become None or absent."""
    modules = dict(model.named_modules())
    for path, keys, absent in places:
        holders: list[Any] = [vars(modules[path])]
        for depth, key in enumerate(keys):
            held = holders[-1] if depth == 0 else parts(holders[-1], depth)
            if not held or key not in held:  # it has gone already
                break
            holders.append(held[key])
        else:
            _drop(holders[:-1], keys, absent)


def _drop(holders: list[Any], keys: Keys, absent: bool) -> None:
    """holders: the attributes of a module, and the containers that the keys lead through."""
    holder, key = holders[-1], keys[-1]
    if len(holders) == 1:
        if isinstance(holder.get(key), (Tensor, tuple)):
            holder[key] = None
            if absent:
                del holder[key]
    elif isinstance(holder, tuple):  # it goes as a whole
        _drop(holders[:-1], keys[:-1], absent)
    elif isinstance(holder, dict):
        holder.pop(key, None)
    elif isinstance(holder, list):
        holder.clear()
    else:
        object.__setattr__(holder, key, None)


def _same(a: Any, b: Any) -> bool:
    x, y = ([t for t in pytree.tree_leaves(z) if isinstance(t, Tensor)] for z in (a, b))
    return len(x) == len(y) and all(
        p.shape == q.shape and p.dtype == q.dtype and torch.allclose(p.double(), q.double(), 1e-3, 1e-5, equal_nan=True)
        for p, q in zip(map(as_real, x), map(as_real, y), strict=True)
    )
