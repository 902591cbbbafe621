"""Recipe: how surgery changed the shapes of a model, so that it can be repeated without a trace.

A plan says which channels stay. To carry it out, the model has to be traced. A recipe says how the shape of every
tensor changed, and every number that a module stores. To carry it out, the model's code is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from coreprune._twin import duplicate
from coreprune.errors import ModelError
from coreprune.graph.numbers import attributes, change_numbers, parts

Shape = tuple[int, ...]
Number = int | tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """The changes from the dense model to the pruned one.

    plain: dotted names of the weights that the dense model computes, and that were made parameters first. All names are
    those of the model with plain weights (`_plain.plain`).
    shapes: canonical name of a parameter or buffer -> (shape before, shape after), for those that were cut.
    dropped: the elements of module lists that have left, by their names in the dense model. Names of shapes and numbers
        are those after that (`shallow`). rest: then the fingerprint of the model without them, in its dense shapes.
    recast: what has another form in the model that was pruned (`_recast.recast`).
    numbers: dotted name of a module -> attribute -> (before, after), e.g. in_features and num_heads. A number inside of
        a container or an object that the module holds is called attribute/key.
    """

    shapes: Mapping[str, tuple[Shape, Shape]]
    numbers: Mapping[str, Mapping[str, tuple[Number, Number]]]
    plain: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    rest: str = ""
    recast: tuple[str, ...] = ()


def recipe_of(model: nn.Module, small: nn.Module) -> Recipe:
    """The recipe that turns `model` into `small`, its pruned copy."""
    after = dict(named_tensors(small))
    shapes = {
        name: (tuple(old.shape), tuple(after[name].shape))
        for name, old in named_tensors(model)
        if after[name].shape != old.shape
    }
    theirs = dict(small.named_modules())
    numbers = {path: dict(number_changes(module, theirs[path])) for path, module in model.named_modules()}
    return Recipe(shapes, {path: changes for path, changes in numbers.items() if changes})


def number_changes(module: nn.Module, other: nn.Module) -> Iterator[tuple[str, tuple[Number, Number]]]:
    """Where a number is kept -> (value in `module`, value in `other`), for whole numbers and tuples that differ.

    A number inside of a container or an object is called attribute/key or attribute/key/key.
    """
    mine = attributes(module)
    for key, value in attributes(other).items():
        if _is_number(value) and _is_number(mine.get(key)):
            if mine[key] != value:
                yield key, (mine[key], value)
        elif key in mine:
            yield from _inside(key, mine[key], value)


def _inside(at: str, mine: Any, other: Any, depth: int = 1) -> Iterator[tuple[str, tuple[int, int]]]:
    if type(mine) is int and type(other) is int:
        if mine != other:
            yield at, (mine, other)
        return
    theirs = parts(other, depth)
    held = parts(mine, depth) if theirs and type(mine) is type(other) else None
    for key, value in (theirs or {}).items():
        if held and key in held and "/" not in str(key):
            yield from _inside(f"{at}/{key}", held[key], value, depth + 1)


def set_numbers(module: nn.Module, values: Mapping[str, Number], shared: dict[Any, Any]) -> None:
    """Change numbers that a module keeps. values: by where, as in `number_changes`. shared: as in `change_numbers`."""
    mine, inside = vars(module), {}
    for at, value in values.items():
        if at in mine:
            mine[at] = value
        else:
            inside[at] = value
    if inside:
        change_numbers(module, lambda keys, old: inside.get("/".join(map(str, keys)), old), shared)


def _number_at(module: nn.Module, at: str) -> Any:
    """What a module keeps at a place, or None."""
    mine = attributes(module)
    if at in mine:
        return mine[at]
    first, *rest = at.split("/")
    value = mine.get(first)
    for depth, key in enumerate(rest, 1):
        value = next((v for k, v in (parts(value, depth) or {}).items() if str(k) == key), None)
    return value


def _is_number(value: object) -> bool:
    """Whether a value is a whole number or a tuple of them. Tuples of modules or tensors differ in every copy."""
    return isinstance(value, int) or (isinstance(value, tuple) and all(isinstance(n, int) for n in value))


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each only once, under its first name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def all_names(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under all of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def rebuilt(model: nn.Module, recipe: Recipe, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` with `tensors` in place of its tensors of the same names, and with the recipe's numbers.

    model: may be on the meta device. It is not changed, and tensors that are replaced are not copied. tensors: by name;
        tied tensors under any one of their names.

    Raises ModelError if the numbers before, as the recipe has them, are not those of the model.
    """
    memo: dict[int, Any] = {}
    for name, old in all_names(model):
        if name in tensors:
            new = tensors[name]
            memo[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    small = duplicate(model, memo)
    modules, shared = dict(small.named_modules()), {}
    for path, changes in recipe.numbers.items():
        for key, (before, _) in changes.items():
            have = _number_at(modules[path], key) if path in modules else None
            if type(have) is not type(before) or have != before:
                raise ModelError(
                    f"{path or 'the model'}.{key} was {before} in the model that was pruned, and is {have} here. "
                    "Load with the code and the settings that the model was made with."
                )
        set_numbers(modules[path], {key: after for key, (_, after) in changes.items()}, shared)
    return small
