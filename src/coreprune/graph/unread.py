"""Numbers that modules remember and that the forward does not read, such as those that `extra_repr` shows.

Nothing that runs says what they mean. They follow a size if the module's class says so: the size has the number's value
in every instance, or a layer inside keeps it under the same name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from coreprune.graph.groups import Group
from coreprune.graph.numbers import Keys, numbers
from coreprune.graph.remembered import remembers
from coreprune.graph.tracked import Slot

_LEVELS = 3  # how many modules around a cut parameter are looked at
_DEEP = 2  # how deep inside a module sizes are looked for

Size = tuple[str, str, int]  # (layer inside the module, its parameter or number, axis of the parameter or -1)


def numbers_unread(
    model: nn.Module,
    small: nn.Module,
    chosen: Sequence[tuple[Group, Tensor]],
    read: Collection[Slot],
    guess: bool = False,
) -> dict[Slot, int]:
    """What numbers that the forward does not read have to become.

    small: the copy of `model` whose layers of torch have been cut. read: the numbers that the forward reads. guess:
        also take a number for a size where one instance is all the evidence, and for the number of units of a group.
    """
    theirs = dict(small.named_modules())
    modules = dict(model.named_modules())
    alike: dict[type, list[str]] = defaultdict(list)
    for path, module in modules.items():
        alike[type(module)].append(path)
    found: dict[Slot, int] = {}
    sizes = _PerModule(modules, lambda m: dict(_sizes(m)))
    kept = _PerModule(modules, lambda m: dict(numbers(m)))
    for path in _around(chosen):
        module = modules.get(path)
        if module is None or not remembers(module):
            continue
        mine = {keys: n for keys, n in kept[path].items() if (path, keys) not in read}
        if not mine:
            continue
        after = dict(_sizes(theirs[path]))
        if sizes[path] == after and not guess:
            continue
        units = _units(path, chosen) if guess else {}
        for keys, n in mine.items():
            others = [(kept[p].get(keys), sizes[p]) for p in alike[type(module)]]
            new = _follows(keys, n, sizes[path], after, others, guess) or units.get(n)
            if new is not None and new != n:
                found[path, keys] = new
    return found


class _PerModule(dict[str, Any]):
    """What a function says about modules, by name, computed when it is asked for."""

    def __init__(self, modules: Mapping[str, nn.Module], function: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self._modules, self._function = modules, function

    def __missing__(self, path: str) -> Any:
        self[path] = self._function(self._modules[path])
        return self[path]


def _follows(
    keys: Keys,
    n: int,
    before: Mapping[Size, int],
    after: Mapping[Size, int],
    others: Sequence[tuple[int | None, Mapping[Size, int]]],
    guess: bool,
) -> int | None:
    """The new value of a number, if the sizes that it may stand for agree. others: for all instances."""
    known = [(value, theirs) for value, theirs in others if value is not None]
    same = [s for s, size in before.items() if size == n and s in after]
    same = [s for s in same if all(theirs.get(s, value) == value for value, theirs in known)]
    named = [s for s in same if s[1] == keys[-1] and s[2] < 0]
    if len({value for value, _ in known}) < 2 and not guess:
        same = named
    for sizes in (named, same):
        values = {after[s] for s in sizes}
        if len(values) == 1:
            return values.pop()
    return None


def _around(chosen: Sequence[tuple[Group, Tensor]]) -> list[str]:
    """The modules that own parameters which are cut, and some around them, innermost first."""
    paths: dict[str, None] = {}
    for group, _ in chosen:
        for s in group.slices:
            path = s.param
            for _ in range(_LEVELS):
                path = path.rpartition(".")[0]
                paths.setdefault(path)
    return list(paths)


def _sizes(module: nn.Module) -> Iterator[tuple[Size, int]]:
    """The lengths of the parameters inside a module, and the numbers that layers of torch keep about theirs."""
    for path, inner in module.named_modules():
        if path.count(".") >= _DEEP:
            continue
        for name, tensor in [*inner._parameters.items(), *inner._buffers.items()]:
            if tensor is not None:
                yield from (((path, name, axis), int(n)) for axis, n in enumerate(tensor.shape))
        if path and not remembers(inner):
            yield from (((path, str(keys[0]), -1), n) for keys, n in numbers(inner) if len(keys) == 1)


def _units(path: str, chosen: Sequence[tuple[Group, Tensor]]) -> dict[int, int]:
    """Units -> units that stay, for the groups that a module makes."""
    return {
        g.size // g.unit: len(keep) // g.unit
        for g, keep in chosen
        if any(s.param.startswith(f"{path}." if path else "") for s in g.producers)
    }
