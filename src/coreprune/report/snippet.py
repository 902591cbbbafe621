"""The call that makes a report's result again."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import coreprune.queries as sources_of
from coreprune.pruning import SELECTORS, Budget, Distill, Repair
from coreprune.queries import QUERIES

_HARMLESS = (
    ast.Expression,
    ast.Call,
    ast.keyword,
    ast.Name,
    ast.Load,
    ast.Constant,
    ast.Tuple,
    ast.List,
    ast.UnaryOp,
    ast.USub,
)


def recipe(settings: Mapping[str, Any]) -> str:
    """Python source of the call, from `settings` of a report; empty where they name no method.

    What differs from the defaults is written out. Samples of the user's cannot be named, so they are left as a name.
    """
    method = settings.get("method")
    if not isinstance(method, str):
        return ""
    names, sources = {"prune"}, set[str]()
    arguments = ["model", "example_inputs"]
    budget = _call(Budget, settings.get("budget"))
    if budget is not None:
        names.add("Budget")
        arguments.append(budget)
    arguments.append(_method(method, settings.get("options"), names))
    if "queries" in settings:
        arguments.append(f"queries={_queries(settings['queries'], sources)}")
    repair, distill = settings.get("repair"), settings.get("distill")
    if "repair" in settings:
        written = "False" if repair is None else _call(Repair, repair)
        if written is None:
            written = "True"
        elif repair is not None:
            names.add("Repair")
        arguments += [] if written == "True" else [f"repair={written}"]
    if isinstance(distill, Mapping):
        names.add("Distill")
        arguments.append(f"distill={_call(Distill, distill) or 'Distill()'}")
    arguments += [f"{k}={settings[k]!r}" for k in ("seed", "delta") if isinstance(settings.get(k), (int, float))]
    imports = f"from coreprune import {', '.join(sorted(names, key=lambda n: (n.islower(), n)))}\n"
    if sources:
        imports += f"from coreprune.queries import {', '.join(sorted(sources))}\n"
    return imports + "\nresult = prune(\n" + "".join(f"    {a},\n" for a in arguments) + ")"


def _queries(asked: Any, sources: set[str]) -> str:
    """Source of the argument: a name or a path, or a source of queries with its options."""
    if asked is None or asked == "auto" or asked in QUERIES or str(asked).endswith((".npz", ".safetensors")):
        return repr(asked)
    made = _made(str(asked))
    sources |= made
    return str(asked) if made else "your_samples"


def _made(text: str) -> set[str]:
    """Names of the classes that an expression calls, if they are sources and it holds nothing but them and literals."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError):
        return set()
    known = {name for name in sources_of.__all__ if isinstance(getattr(sources_of, name), type)}
    called = {node.id for node in nodes if isinstance(node, ast.Name)}
    return called if called <= known and all(isinstance(node, _HARMLESS) for node in nodes) else set()


def _method(method: str, options: Any, names: set[str]) -> str:
    kind = SELECTORS.get(method)
    if not isinstance(kind, type):
        return repr(method)
    written = _call(kind, options)
    if written is None:
        return repr(method)
    names.add(kind.__name__)
    return written


def _call(kind: Any, values: Any) -> str | None:
    """Source of an object of a dataclass, or None where it has only defaults."""
    if not isinstance(values, Mapping):
        return None
    default = {f.name: f.default for f in fields(kind) if f.init and f.default is not MISSING}
    given = [f"{k}={values[k]!r}" for k in default if k in values and values[k] != default[k]]
    return f"{kind.__name__}({', '.join(given)})" if given else None
