"""The package as a newcomer walks through it: every module can be imported under the path that the folder shows."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import coreprune


def test_no_function_hides_a_module_of_the_same_name():
    """`import a.b.c` found a function where c.py was also exported as a function c: 14 modules were hidden so."""
    hidden = []
    for found in pkgutil.walk_packages(coreprune.__path__, "coreprune."):
        parent, _, leaf = found.name.rpartition(".")
        if leaf == "__main__":
            continue
        importlib.import_module(found.name)
        if not isinstance(getattr(importlib.import_module(parent), leaf), ModuleType):
            hidden.append(found.name)
    assert hidden == []
