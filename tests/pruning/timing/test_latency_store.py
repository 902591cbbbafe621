"""The file of measured times: what is read, kept apart, replaced and refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from coreprune.errors import InputError
from coreprune.pruning.timing import store as module
from coreprune.pruning.timing.store import Store, default_path

BROKEN = [
    "",
    "{",
    "[]",
    '{"schema": 2, "seconds": {}}',
    '{"schema": 1}',
    '{"schema": 1, "seconds": {"here": {"a": "x"}}}',
]
BROKEN += [
    '{"schema": 1, "seconds": {"here": {"a": -1}}}',
    '{"schema": 1, "seconds": {"here": {"a": NaN}}}',
    "[" * 100_000,
]


def test_what_is_put_is_there_for_the_next_run(tmp_path):
    place = tmp_path / "deep" / "times.json"
    first = Store.open(place, "here")
    assert first.seconds == {}
    first.put({"a": 1.5})
    first.put({"b": 2.5})
    assert first.added == 2
    second = Store.open(str(place), "here")
    assert second.seconds == {"a": 1.5, "b": 2.5}
    assert second.added == 0


def test_environments_are_kept_apart_in_one_file(tmp_path):
    place = tmp_path / "times.json"
    Store.open(place, "one thread").put({"a": 1.0})
    Store.open(place, "two threads").put({"a": 0.5})
    assert Store.open(place, "one thread").seconds == {"a": 1.0}
    assert Store.open(place, "two threads").seconds == {"a": 0.5}
    assert Store.open(place, "another torch").seconds == {}


def test_two_runs_at_once_lose_nothing(tmp_path):
    place = tmp_path / "times.json"
    one, two = Store.open(place, "here"), Store.open(place, "here")
    one.put({"a": 1.0})
    two.put({"b": 2.0})
    assert Store.open(place, "here").seconds == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_in_the_cache_is_replaced_and_one_of_the_callers_is_not(tmp_path, monkeypatch, caplog, text):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mine, place = tmp_path / "mine.json", default_path("here")
    place.parent.mkdir(parents=True)
    for path in (mine, place):
        path.write_text(text)
    with pytest.raises(InputError, match=r"mine\.json is no file of measured times .*Name another file, or delete it"):
        Store.open(mine, "here")
    assert mine.read_text() == text
    store = Store.open(None, "here")
    assert "measured again" in caplog.text
    store.put({"a": 1.0})
    assert Store.open(None, "here").seconds == {"a": 1.0}


def test_a_disk_that_refuses_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    store = Store(tmp_path / "file" / "times.json", "here")
    with caplog.at_level(logging.WARNING):
        store.put({"a": 1.0})
        store.put({"b": 2.0})
    assert store.seconds == {"a": 1.0, "b": 2.0}, "this run has its times"
    assert caplog.text.count("not kept for later runs") == 1


def test_the_folder_is_that_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path("x").parent == tmp_path / "coreprune"
    assert default_path("x") != default_path("y")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert default_path("x").parent == tmp_path / "home" / ".cache" / "coreprune"
    assert default_path("x").name.startswith("latency-")


def test_the_file_is_json_with_a_schema(tmp_path):
    Store.open(tmp_path / "t.json", "here").put({"a": 1.0})
    assert json.loads((tmp_path / "t.json").read_text()) == {"schema": module.SCHEMA, "seconds": {"here": {"a": 1.0}}}
