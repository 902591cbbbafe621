"""Objects that other packages register by name: lazily, and without harm from broken ones."""

from __future__ import annotations

import logging
import sys

import pytest

from coreprune._plugins import Registry, imported, registered
from coreprune.errors import InputError

GROUP = "coreprune.test"


@pytest.fixture
def install(install_package):
    """install(name, lines of entry_points.txt, code of its module)."""
    return lambda name, lines, code="": install_package(name, f"[{GROUP}]\n{lines}\n", code)


def adapted(name, found):
    return (name, found)


def test_a_registered_object_is_found_by_its_name(install):
    install("pluginone", "mine = pluginone:thing", "thing = 7")
    assert registered(GROUP)["mine"]() == 7
    registry = Registry(GROUP, {"ours": lambda: "built in"}, adapted)
    assert list(registry) == ["ours", "mine"]
    assert len(registry) == 2
    assert registry["mine"]() == ("mine", 7)
    assert registry["ours"]() == "built in"
    assert "other" not in registry
    assert registry.get("other") is None


def test_nothing_is_imported_until_the_object_is_asked_for(install):
    install("pluginlazy", "mine = pluginlazy:thing", "thing = 7")
    registry = Registry(GROUP, {}, adapted)
    assert "mine" in registry
    make = registry["mine"]
    assert "pluginlazy" not in sys.modules
    make()
    assert "pluginlazy" in sys.modules


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ("pluginbad:thing", "raise RuntimeError('half installed')"),
        ("pluginbad:other", "thing = 7"),
        ("nosuchmodule:thing", ""),
    ],
)
def test_a_broken_package_does_harm_only_when_it_is_asked_for(install, value, code):
    install("pluginbad", f"bad = {value}", code)
    install("plugingood", "good = plugingood:thing", "thing = 7")
    registry = Registry(GROUP, {}, adapted)
    assert sorted(registry) == ["bad", "good"]
    assert registry["good"]() == ("good", 7)
    with pytest.raises(InputError, match=r"'bad' is registered by the package pluginbad .* cannot be imported"):
        registry["bad"]()


def test_damaged_metadata_is_logged_and_hides_no_other_package(install, caplog):
    install("plugindamaged", "no equals sign")
    install("plugingood", "good = plugingood:thing", "thing = 7")
    with caplog.at_level(logging.WARNING):
        assert list(registered(GROUP)) == ["good"]
    assert "cannot be read" in caplog.text


def test_our_own_names_win_and_say_so(install, caplog):
    install("pluginthief", "ours = pluginthief:thing", "thing = 7")
    registry = Registry(GROUP, {"ours": lambda: "built in"}, adapted)
    with caplog.at_level(logging.WARNING):
        assert list(registry) == ["ours"]
    assert "'ours' is a name of coreprune's own" in caplog.text
    assert registry["ours"]() == "built in"


def test_the_first_of_two_packages_wins_and_says_so(install, caplog):
    install("plugina", "mine = plugina:thing", "thing = 'a'")
    install("pluginb", "mine = pluginb:thing", "thing = 'b'")
    with caplog.at_level(logging.WARNING):
        found = registered(GROUP)["mine"]()
    assert found in ("a", "b")
    assert "is ignored" in caplog.text


def test_imported_reads_module_and_name():
    assert imported("os.path:join").__name__ == "join"
    assert imported("pathlib:Path.home").__name__ == "home"


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("os.path", "must read package.module:name"),
        (":join", "must read package.module:name"),
        ("nosuchmodule:x", "cannot import 'nosuchmodule'"),
        ("os:nosuchname", "module 'os' has no 'nosuchname'"),
    ],
)
def test_imported_says_what_is_wrong(reference, says):
    with pytest.raises(InputError, match=says):
        imported(reference)
