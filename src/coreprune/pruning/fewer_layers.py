"""Which number of a Hugging Face configuration counts the blocks of a list, found by making models of it."""

from __future__ import annotations

import copy
from collections.abc import Collection
from functools import reduce
from typing import Any

from torch import nn

from coreprune.graph.shorter import per_layer
from coreprune.pruning.stock import scopes, stock_shapes


def with_fewer_layers(cls: type[nn.Module], config: Any, dropped: Collection[str]) -> tuple[Any, str]:
    """The configuration with which a class has fewer blocks in its lists.

    cls: a class of transformers. config: that of the dense model, which is not changed. dropped: the names of the
        blocks that have left, in the dense model.

    Returns (configuration, ""), or (None, why there is none). Settings with one entry per block lose those of the
    blocks that have left.
    """
    gone: dict[str, set[int]] = {}
    for name in dropped:
        holder, _, key = name.rpartition(".")
        if not key.isdecimal():
            return None, f"{type(config).__name__} cannot say that {name} has left."
        gone.setdefault(holder, set()).add(int(key))
    for holder, indices in gone.items():
        found = _fewer(cls, config, holder, indices)
        if found is None:
            own = type(config).__name__
            return None, f"{own} has no number for the count of {holder}, so it cannot say that blocks have left it."
        config = found
    return config, ""


def _fewer(cls: type[nn.Module], config: Any, holder: str, gone: set[int]) -> Any:
    """The configuration with fewer blocks in one list; None if there is none."""
    before = set(stock_shapes(cls, config))
    inside = {n.removeprefix(f"{holder}.").partition(".")[0] for n in before if n.startswith(f"{holder}.")}
    count = len(inside)
    stays = [i for i in range(count) if i not in gone]
    wanted = {n for n in before if not n.startswith(f"{holder}.")}
    for at, scope in scopes(config):
        for key, value in vars(scope).items():
            if type(value) is not int or value != count:
                continue
            new = copy.deepcopy(config)
            settings = vars(reduce(getattr, at, new))
            settings[key] = len(stays)
            for other, held in list(settings.items()):
                if per_layer(other, held, count):
                    settings[other] = type(held)(held[i] for i in stays)
            try:
                names = set(stock_shapes(cls, new))
            except Exception:  # models raise all kinds of errors for numbers that contradict each other
                continue
            mine = {n.removeprefix(f"{holder}.").partition(".")[0] for n in names if n.startswith(f"{holder}.")}
            others = {n for n in names if not n.startswith(f"{holder}.")}
            if len(mine) == len(stays) and others == wanted:
                return new
    return None
