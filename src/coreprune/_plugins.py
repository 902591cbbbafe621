"""Selectors and sources of queries by name: built-in ones, and those that other installed packages register.

A package registers an object with an entry point in its pyproject.toml:

    [project.entry-points."coreprune.queries"]
    my-scans = "my_package.scans:draw_scans"

Nothing is imported until the name is used, so a broken package does no harm to users who do not need it.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, distributions
from typing import Any, Generic, TypeVar

from coreprune.errors import InputError, first_line

T = TypeVar("T")
_log = logging.getLogger(__name__)


def registered(group: str) -> dict[str, Callable[[], Any]]:
    """Names that installed packages register under an entry-point group, each with a function that imports its object.

    If two packages register one name, the first wins. A package whose metadata cannot be read is logged and left out.
    The functions raise InputError if the import fails.
    """
    found: dict[str, EntryPoint] = {}
    for package in distributions():
        try:
            entries = [entry for entry in package.entry_points if entry.group == group]
        except Exception as error:  # metadata may be damaged in any way
            _log.warning("the entry points of a package in %s cannot be read (%s)", _place(package), first_line(error))
            continue
        for entry in entries:
            first = found.setdefault(entry.name, entry)
            if first.value != entry.value:
                _log.warning("%s: %r stands for %s; %s is ignored", group, entry.name, first.value, entry.value)
    return {name: partial(_load, entry) for name, entry in found.items()}


@dataclass(frozen=True, eq=False)
class Registry(Mapping[str, Callable[[], T]], Generic[T]):
    """By name, functions that make things of one kind: first `built_in`, then those that other packages register.

    group: of the entry points. built_in: these names always win over registered ones.
    adapt: called with the name and the imported object of a registered name; returns a thing of this kind, or raises
        InputError.

    `registry[name]()` makes a thing. Reading the names, or `registry[name]` without calling it, imports nothing.
    """

    group: str
    built_in: Mapping[str, Callable[[], T]]
    adapt: Callable[[str, Any], T]

    def __getitem__(self, name: str) -> Callable[[], T]:
        if name in self.built_in:
            return self.built_in[name]
        load = registered(self.group)[name]
        return lambda: self.adapt(name, load())

    def __iter__(self) -> Iterator[str]:
        yield from self.built_in
        for name in registered(self.group):
            if name in self.built_in:
                _log.warning("%s: %r is a name of coreprune's own; the registered one is ignored", self.group, name)
            else:
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)


def imported(reference: str) -> Any:
    """Import the object that "module:name" stands for, e.g. "my_package.scans:draw_scans". Raises InputError."""
    module, colon, name = reference.partition(":")
    if not colon or not module or not name:
        raise InputError(f"{reference!r} must read package.module:name, e.g. my_package.scans:draw_scans.")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # it is the code of another package
        advice = "Run from the folder it lies in, or install it."
        raise InputError(f"cannot import {module!r} ({first_line(error)}). {advice}") from error
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise InputError(f"module {module!r} has no {name!r}.") from error
    return found


def _load(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:  # it is the code of another package
        owner = f"the package {entry.dist.name}" if entry.dist else "an installed package"
        raise InputError(
            f"{entry.name!r} is registered by {owner} as {entry.value}, which cannot be imported "
            f"({first_line(error)}). Repair or remove that package, or choose another name."
        ) from error


def _place(package: Any) -> str:
    return str(getattr(package, "_path", "an unknown place"))
