"""The package itself: what importing it costs, its public names, and the old ones."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
import types
import warnings
from importlib import import_module
from pathlib import Path

import pytest

import coreprune

INIT = Path(coreprune.__file__)


def static_names() -> dict[str, str]:
    """What type checkers see: public name -> the module that it is imported from."""
    block = next(node for node in ast.parse(INIT.read_text(encoding="utf-8")).body if isinstance(node, ast.If))
    return {
        alias.asname or alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }  # fmt: skip


def in_a_fresh_interpreter(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={"PYTHONPATH": str(INIT.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_that_takes_long():
    loaded = (
        "import sys, coreprune; coreprune.InputError; print(sorted({'torch', 'numpy', 'typer'} & set(sys.modules)))"
    )
    assert in_a_fresh_interpreter(loaded) == "[]"


def test_the_lazy_names_are_those_that_type_checkers_see():
    static = static_names()
    assert len(static) > 40
    assert set(static) == set(coreprune.__all__)
    for name in coreprune.__all__:
        assert getattr(coreprune, name) is getattr(import_module(static[name]), name), name


def test_a_star_import_brings_the_public_names_and_no_others():
    found = {}
    exec("from coreprune import *", found)
    assert set(found) - {"__builtins__"} == set(coreprune.__all__)


def test_dir_lists_what_has_not_been_asked_for():
    listed = in_a_fresh_interpreter("import coreprune; print(*dir(coreprune))").split()
    assert set(coreprune.__all__) <= set(listed)
    assert {"geometry", "graph", "report", "__all__"} <= set(listed)


def test_subpackages_are_attributes_although_nobody_imported_them():
    assert in_a_fresh_interpreter("import coreprune; print(coreprune.geometry.mvee.__name__)") == "mvee"


def test_the_public_classes_pickle():
    budget = pickle.loads(pickle.dumps(coreprune.Budget(macs=0.5)))
    assert budget == coreprune.Budget(macs=0.5)


def test_a_wrong_name_is_refused_as_by_any_module():
    with pytest.raises(AttributeError, match=r"^module 'coreprune' has no attribute 'prun'"):
        coreprune.prun  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'prun'"):
        exec("from coreprune import prun")


@pytest.fixture
def renamed(monkeypatch):
    """An old name of our own: the mechanism is the same when there is none in the table."""
    monkeypatch.setitem(coreprune._RENAMED, "cut", "prune")


@pytest.mark.parametrize("use", ["coreprune.cut", "from coreprune import cut"])
def test_an_old_name_works_and_warns_once_at_every_place_that_uses_it(renamed, use):
    user = types.ModuleType("user")
    user.coreprune = coreprune
    code = compile(f"def f():\n    {use}\ndef g():\n    {use}\n", "their_code.py", "exec")
    exec(code, vars(user))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            user.f()
            user.g()
    assert [(w.filename, w.lineno) for w in caught] == [("their_code.py", 2), ("their_code.py", 4)]
    assert {w.category for w in caught} == {DeprecationWarning}
    assert str(caught[0].message) == "coreprune.cut is now coreprune.prune."
    with pytest.warns(DeprecationWarning, match="is now"):
        assert coreprune.cut is coreprune.prune
    assert "cut" not in vars(coreprune), "the next place that uses it has to warn too"


def test_every_old_name_leads_to_a_public_one():
    assert set(coreprune._RENAMED.values()) <= set(coreprune.__all__)
    assert not set(coreprune._RENAMED) & set(coreprune.__all__)
