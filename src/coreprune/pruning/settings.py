"""The settings of one call of prune(), for the report and for the Python code that repeats the call."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar

from coreprune.pruning.allocation.budget import Budget
from coreprune.pruning.allocation.spending import CostFunction
from coreprune.pruning.distill.options import Distill
from coreprune.pruning.repair.options import Repair
from coreprune.pruning.selectors import Own, Selector

SAMPLES = "samples"  # stands for the user's samples, which may be large and have no name
EXAMPLES = "examples"  # stands for further examples of the user


@dataclass(frozen=True)
class Settings:
    """The arguments of one call of prune(), under the same names, after checks and with defaults filled in.

    method: the selector itself. exclude: names or patterns of groups. queries: a name, a path, a source, or "samples"
    for the user's own tensors; None for no queries. repair, distill: their options, or None if they are off. cost: the
    user's own, or None. also: "examples" if there were further examples. part: the name of the module that was pruned
    alone, or empty. residual: "rotate", or empty. tokenizer: the user's, or None.
    """

    budget: Budget
    method: Selector
    queries: Any
    n_queries: int | None
    exclude: tuple[str, ...]
    repair: Repair | None
    distill: Distill | None
    seed: int
    delta: float
    cost: CostFunction | None = None
    compare: bool = True
    also: str = ""
    batch_axis: Any = "auto"
    part: str = ""
    norm_statistics: bool = False
    tokenizer: Any = None
    memory: int | str | None = None
    depth: bool = False
    residual: str = ""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {  # of prune(); the written call leaves them out
        "queries": "auto",
        "n_queries": None,
        "exclude": (),
        "repair": Repair(),
        "distill": None,
        "compare": True,
        "delta": 0.01,
        "cost": None,
        "also": "",
        "batch_axis": "auto",
        "part": "",
        "norm_statistics": False,
        "tokenizer": None,
        "memory": None,
        "depth": False,
        "residual": "",
    }

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, one entry per field."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def call(self) -> str:
        """Python source that gives the same result again.

        Objects of the caller are imported where that is possible. Otherwise a name stands for them.
        """
        code = _Source()
        arguments = ["model", "example_inputs"]
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in self.DEFAULTS and value == self.DEFAULTS[f.name]:
                continue
            if f.name == "repair" and value is None:
                value = False
            yours = {("queries", SAMPLES): "your_samples", ("also", EXAMPLES): "your_examples"}
            written = yours.get((f.name, value)) if isinstance(value, str) else None
            written = written or code.of(value)
            arguments.append(f"{f.name}={written}")
        body = "".join(f"    {a},\n" for a in arguments)
        return f"{code.imports('prune')}\nresult = prune(\n{body})"


def asked_queries(queries: Any) -> Any:
    """What `Settings.queries` stores for the argument `queries`."""
    if queries is None or isinstance(queries, (str, Path)):
        return queries if queries is None else str(queries)
    return queries if callable(queries) else SAMPLES


class _Source:
    """Writes values as Python source, and collects the imports that the source needs."""

    def __init__(self) -> None:
        self.imported: dict[str, set[str]] = {}
        self.yours: list[str] = []

    def of(self, value: Any) -> str:
        """The source of one value."""
        if isinstance(value, Own):
            value = value.name if value.registered else value.function
        if isinstance(value, str):
            return json.dumps(value, ensure_ascii=False)
        if value is None or isinstance(value, (bool, int, float)):
            return repr(value)
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{self.of(k)}: {self.of(v)}" for k, v in value.items()) + "}"
        if isinstance(value, (tuple, list)):
            inside = ", ".join(map(self.of, value))
            return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' if len(value) == 1 else ''})"
        if is_dataclass(value) and not isinstance(value, type) and self._importable(type(value)):
            given = [
                f"{f.name}={self.of(getattr(value, f.name))}"
                for f in fields(value)
                if f.init and (f.default is MISSING or getattr(value, f.name) != f.default)
            ]
            return f"{type(value).__name__}({', '.join(given)})"
        if isinstance(value, FunctionType) and self._importable(value):
            return value.__name__
        name = "your_" + "".join(c if c.isalnum() else "_" for c in _name_of(value))
        self.yours.append(name)
        return name

    def imports(self, *ours: str) -> str:
        """The import lines, ours first, and a comment for each object that cannot be imported."""
        self.imported.setdefault("coreprune", set()).update(ours)
        lines = [
            f"from {place} import {', '.join(sorted(names, key=lambda n: (n.islower(), n)))}\n"
            for place, names in sorted(self.imported.items(), key=lambda item: (item[0] != "coreprune", item[0]))
        ]
        return "".join(lines) + "".join(f"# {name}: made by the caller, not in any module\n" for name in self.yours)

    def _importable(self, thing: Any) -> bool:
        """Whether a class or function can be imported by its name. If so, note the module to import it from."""
        name = thing.__name__
        for place in _places(thing.__module__):
            if place in sys.modules and getattr(sys.modules[place], name, None) is thing:
                self.imported.setdefault(place, set()).add(name)
                return True
        return False


def _places(module: str) -> Iterable[str]:
    """The modules to import a name from, given where it is defined: our public modules first, never a script."""
    if module.partition(".")[0] == "coreprune":
        yield from ("coreprune", "coreprune.selectors", "coreprune.queries")
    if module != "__main__":
        yield module


def _name_of(value: Any) -> str:
    """What an object of the caller is called: by its `name`, its `__name__`, or its class."""
    return str(getattr(value, "name", None) or getattr(value, "__name__", None) or type(value).__name__)


def _plain(value: Any) -> Any:
    """A value for JSON. Options become a dict with the name of their class; everything unknown becomes text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, (Budget, Repair, Distill)):
        return _plain(asdict(value))
    if isinstance(value, Own):
        return {**_plain(value.function), "name": value.name}
    options = {f.name: _plain(getattr(value, f.name)) for f in fields(value)} if is_dataclass(value) else {}
    return {"name": _name_of(value), **options}
