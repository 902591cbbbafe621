"""Take elements out of module lists, in a copy: the others move up, and so do the numbers that they remember.

Two numbers follow the position of a block in its list, and no tensor shows them: the index that a block remembers, for
example to find its keys and values in a cache, and settings of the module around the list with one entry per block.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune._twin import quiet, twin
from coreprune.errors import InputError

_WORDS = ("layer", "block", "depth")


class Passing(nn.Module):
    """Stands for an element that has left: returns what enters, in the form in which the element returned it.

    returned: what the element returned, with an `_Argument` in the place of every tensor.
    """

    def __init__(self, element: nn.Module, returned: Any) -> None:
        super().__init__()
        ours = set(vars(self))
        # The module around it may read settings of the element, such as the kind of its attention.
        vars(self).update({k: v for k, v in vars(element).items() if k not in ours and not isinstance(v, nn.Module)})
        self._returned = returned

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What entered."""
        given = {**dict(enumerate(args)), **kwargs}
        return pytree.tree_map(lambda x: given[x.at] if isinstance(x, _Argument) else x, self._returned)


@dataclass(frozen=True)
class _Argument:
    """An argument of a call, by its position or keyword."""

    at: int | str


def passing_(model: nn.Module, names: Collection[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Put a `Passing` in the place of each of the named elements, in place. All other names stay what they are.

    args, kwargs: on these a twin of the model is run, to see what the elements take and return.

    Raises InputError for an element that takes or returns no such thing.
    """
    seen: dict[str, tuple[Any, Any, Any]] = {}
    with quiet(model) as still:
        for name in names:
            still.get_submodule(name).register_forward_hook(
                lambda _m, a, k, out, name=name: seen.update({name: (a, k, out)}), with_kwargs=True
            )
        still(*args, **kwargs)
    for name in names:
        if name not in seen:
            raise InputError(f"the forward does not call {name}.")
        holder, key = _holder(model, name)
        holder._modules[key] = _passing(name, model.get_submodule(name), *seen[name]).train(model.training)


def _passing(name: str, element: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Passing:
    """What takes the place of an element that was called with these arguments, and returned `out`."""
    leaves, spec = pytree.tree_flatten(out)
    given = {k: x for k, x in {**dict(enumerate(args)), **kwargs}.items() if isinstance(x, Tensor)}
    found: list[Any] = []
    made = 0
    for leaf in leaves:
        at = next((k for k, x in given.items() if x is leaf), None)
        if at is None and isinstance(leaf, Tensor):
            made += 1
            at = next((k for k, x in given.items() if x.shape == leaf.shape), None)
            if at is None:
                raise InputError(f"no argument of {name} has the shape of what it returns.")
        found.append(leaf if at is None else _Argument(at))
    if made != 1:
        raise InputError(f"{name} returns {made} tensors of its own.")
    return Passing(element, pytree.tree_unflatten(found, spec))


def shallow(model: nn.Module, names: Collection[str]) -> nn.Module:
    """A twin of the model, which shares its weights, without the named elements of its lists.

    Raises InputError for a name that is no element of a list, or if no element of a list would stay.
    """
    return shallow_(twin(model), names)


def shallow_(model: nn.Module, names: Collection[str]) -> nn.Module:
    """Take the named elements out of the lists of a model, in place; see `shallow`."""
    gone: dict[str, set[str]] = {}
    for name in names:
        path, _, key = name.rpartition(".")
        gone.setdefault(path, set()).add(key)
    held = dict(model.named_modules())
    for path, keys in gone.items():
        holder = held.get(path)
        if not isinstance(holder, (nn.ModuleList, nn.Sequential)) or not keys <= set(holder._modules):
            raise InputError(f"the model has no list of modules {path!r} with the elements {', '.join(sorted(keys))}.")
        if len(keys) == len(holder):
            raise InputError(f"no element of {path or 'the model'} would stay.")
    for path in sorted(gone, key=lambda p: -p.count(".")):  # inner lists first, whose names change with the outer ones
        parent = held.get(path.rpartition(".")[0]) if path else None
        _shorten(held[path], gone[path], parent)
    return model


def _shorten(holder: nn.Module, keys: set[str], parent: nn.Module | None) -> None:
    """Remove elements from one list, and let numbers follow."""
    old = dict(holder._modules)
    stays = [i for i, key in enumerate(old) if key not in keys]
    _renumber(list(old.values()), stays)
    if parent is not None:
        _follow(parent, len(old), stays)
    left = [(key, module) for key, module in old.items() if key not in keys]
    counted = list(old) == [str(i) for i in range(len(old))]
    holder._modules.clear()
    holder._modules.update({str(i) if counted else key: module for i, (key, module) in enumerate(left)})


def _renumber(old: Sequence[nn.Module | None], stays: Sequence[int]) -> None:
    """The index that the elements remember: an attribute that is the position of the element in all that have it."""
    found: dict[tuple[str, str], dict[int, nn.Module]] = {}
    differs: set[tuple[str, str]] = set()
    for i, element in enumerate(old):
        for path, module in element.named_modules() if element is not None else ():
            for key, value in vars(module).items():
                if type(value) is int:
                    found.setdefault((path, key), {})[i] = module
                    differs |= set() if value == i else {(path, key)}
    new = {i: n for n, i in enumerate(stays)}
    for at, holders in found.items():
        if at not in differs and len(holders) > 1:
            for i, module in holders.items():
                vars(module)[at[1]] = new.get(i, i)


def _follow(parent: nn.Module, count: int, stays: Sequence[int]) -> None:
    """Lists of settings with one entry per element, in the module around the list and in what it holds; and a count."""
    own = ("_parameters", "_buffers", "_modules")
    mine = {key: value for key, value in vars(parent).items() if key not in own}
    for key, value in mine.items():
        if type(value) is int and value == count > 1 and any(word in key for word in _WORDS):
            vars(parent)[key] = len(stays)
    for holder in (mine, *(value for value in mine.values() if _is_settings(value))):
        target = vars(parent) if holder is mine else vars(holder)
        for key, value in list(target.items()):
            if per_layer(key, value, count):
                target[key] = type(value)(value[i] for i in stays)


def per_layer(key: str, value: Any, count: int) -> bool:
    """Whether an attribute is a list of plain values, one for each of so many layers."""
    plain = type(value) in (list, tuple) and len(value) == count > 1
    return plain and "layer" in key and all(isinstance(x, (str, int, float, bool)) for x in value)


def _is_settings(value: object) -> bool:
    """Whether an object may hold settings: it has attributes, and is no module, tensor or function."""
    return hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Tensor, type)) and not callable(value)


def _holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key
