"""Whole numbers that know where they came from, through sums and products too, and the arguments of calls with them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from coreprune.graph.numbers import Keys

Slot = tuple[str, Keys]  # (module, where it keeps the number)
Env = Mapping[Slot, int]


class Number(int):
    """A whole number that knows where it came from.

    slots: the numbers that it was computed from. then: its value after the cut, from theirs.
    """

    slots: frozenset[Slot]
    then: Callable[[Env], int]

    def __new__(cls, value: int, slots: frozenset[Slot], then: Callable[[Env], int]) -> Number:
        """`value` is what it is now."""
        new = super().__new__(cls, value)
        new.slots, new.then = slots, then
        return new

    def __deepcopy__(self, memo: Any) -> Number:
        return self

    __hash__ = int.__hash__


def _computes(name: str, reverse: bool = False) -> Callable[[Any, Any], Any]:
    function, plain = getattr(operator, name), getattr(int, f"__{'r' if reverse else ''}{name}__")

    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, int) or isinstance(other, bool):
            return plain(self, other)
        return _computed(function, other, self) if reverse else _computed(function, self, other)

    return method


def _computed(function: Callable[[int, int], int], a: int, b: int) -> Number:
    slots = frozenset().union(*(x.slots for x in (a, b) if isinstance(x, Number)))
    return Number(function(int(a), int(b)), slots, lambda env: function(after_cut(a, env), after_cut(b, env)))


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(Number, f"__{_name}__", _computes(_name))
    setattr(Number, f"__r{_name}__", _computes(_name, reverse=True))
Number.__neg__ = lambda self: _computed(operator.mul, self, -1)  # type: ignore[method-assign]


def after_cut(x: int, env: Env) -> int:
    """What a number becomes, given what the remembered ones become."""
    return x.then(env) if isinstance(x, Number) else x


class Shape(tuple):  # torch.Size keeps no numbers of ours
    """The shape of a tensor, in numbers that know what is left of it."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        return Shape(found) if isinstance(key, slice) else found

    def numel(self) -> int:
        """How many entries the tensor has."""
        return prod(self)


def known(after: Mapping[Keys, int], keys: Keys, value: int) -> int:
    """A number of which it is known what it becomes, because it follows from the size of a weight."""
    new = after.get(keys, value)
    return value if new == value else Number(value, frozenset(), lambda _: new)


def leaves(x: Any, kind: type) -> Iterator[Any]:
    """The values of a kind among the arguments of a call."""
    if isinstance(x, kind):
        yield x
    elif isinstance(x, slice):
        yield from leaves((x.start, x.stop, x.step), kind)
    elif isinstance(x, (tuple, list)):
        for item in x:
            yield from leaves(item, kind)
    elif isinstance(x, dict):
        yield from leaves(list(x.values()), kind)


def replaced(x: Any, number: Callable[[Any], int], tensor: Callable[[Tensor], Tensor]) -> Any:
    """The arguments of a call with other numbers and tensors."""
    if isinstance(x, Number):
        return number(x)
    if isinstance(x, Tensor):
        return tensor(x)
    if isinstance(x, slice):
        return slice(*(replaced(n, number, tensor) for n in (x.start, x.stop, x.step)))
    if isinstance(x, dict):
        return {k: replaced(v, number, tensor) for k, v in x.items()}
    if isinstance(x, torch.Size):
        return tuple(replaced(v, number, tensor) for v in x)
    if isinstance(x, list) or type(x) in (tuple, Shape):
        return type(x)(replaced(v, number, tensor) for v in x)
    return x


def plain(x: Any) -> Any:
    """The arguments of a call with plain numbers."""
    return replaced(x, int, lambda tensor: tensor)
