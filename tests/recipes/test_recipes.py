"""The recipes at toy size: they run, go on where they stopped, prune in rounds, and refuse what makes no sense."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """A recipe, and the module that all of them use."""
    monkeypatch.setattr(sys, "path", [str(RECIPES), *sys.path])

    def loaded(name: str) -> tuple[ModuleType, ModuleType]:
        return importlib.import_module(name), importlib.import_module("experiment")

    return loaded


def options(experiment: ModuleType, out: Path, **more):
    found = experiment.parser("", ("functional", "l2"), (0.5,)).parse_args(["--toy", "--out", str(out), "--seeds", "1"])
    for name, value in {"batch": 16, "workers": 0, "queries": 16, **more}.items():
        setattr(found, name, value)
    return found


@pytest.mark.parametrize("name", [p.stem for p in sorted(RECIPES.glob("*_*.py"))])
def test_every_recipe_runs(name, load, tmp_path):
    recipe, experiment = load(name)
    asked = options(experiment, tmp_path, epochs=1)
    task = recipe.recipe(asked)
    rows = experiment.run(task, asked)
    assert [row["method"] for row in rows] == ["functional", "l2"]
    assert all(0 <= row[key] <= 1 for row in rows for key in ("dense", "pruned", "tuned"))
    assert task.reported
    logs = [p for p in tmp_path.glob("*.jsonl") if p.name != "results.jsonl"]
    assert len(logs) == 2
    assert all("validation" in json.loads(p.read_text().splitlines()[-1]) for p in logs)


def test_an_interrupted_experiment_goes_on_and_rounds_reach_the_same_share(load, tmp_path, monkeypatch):
    recipe, experiment = load("mnist_lenet")
    asked = options(experiment, tmp_path, rounds=2, epochs=1, seeds=2)
    task = recipe.recipe(asked)
    left, seen = [], experiment.prune

    def counting(*args, **kwargs):
        if len(left) == 5:
            raise KeyboardInterrupt
        result = seen(*args, **kwargs)
        left.append(result.report.macs)
        return result

    monkeypatch.setattr(experiment, "prune", counting)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(task, asked)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 2
    dense, half = left[0][0], left[1][1]
    assert 0.4 < half / dense <= 0.5
    monkeypatch.setattr(experiment, "prune", seen)
    rows = experiment.run(task, asked)
    assert len(rows) == 4
    assert (tmp_path / "results.jsonl").read_text().splitlines()[:2] == lines


def test_other_training_stands_apart(load, tmp_path):
    recipe, experiment = load("mnist_lenet")
    task = recipe.recipe(options(experiment, tmp_path))
    experiment.run(task, options(experiment, tmp_path, epochs=1, methods=["l2"]))
    rows = experiment.run(task, options(experiment, tmp_path, epochs=1, lr=1e-9, soft=1.0, methods=["l2"]))
    own, other = rows
    assert own["key"] != other["key"]
    assert (other["lr"], other["soft"]) == (1e-9, 1.0)
    assert other["tuned"] == other["pruned"]  # such a rate changes nothing
    found = experiment.table(task, rows)
    assert list(found.columns[0].cells) == ["l2, epochs 1", "l2, epochs 1, lr 1e-09, soft 1"]
    assert list(found.columns[-1].cells) == ["1", "1"]


def test_what_makes_no_sense_is_refused(load, tmp_path):
    recipe, experiment = load("mnist_lenet")
    task = recipe.recipe(options(experiment, tmp_path))
    for wrong, said in (({"methods": ["best"]}, "best"), ({"rounds": 0}, "rounds"), ({"shares": [1.5]}, "shares")):
        with pytest.raises(SystemExit, match=said):
            experiment.run(task, options(experiment, tmp_path, **wrong))
